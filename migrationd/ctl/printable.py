"""Words of a peer, a file or a user, safe to print."""

from rich.console import Console


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


def say_error(text: str) -> None:
    """Say on standard error, in a line, why a command failed."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(printable(f"migrationctl: {text}"), markup=False)
