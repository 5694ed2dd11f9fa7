"""Words of a peer, a file or a user, safe to print."""


def printable(text: str) -> str:
    """The text with escapes for what a terminal would act on, and for what has no character.

    Line feeds stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
