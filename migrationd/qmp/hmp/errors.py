"""What a human command prints when it cannot be done."""


class UsageError(Exception):
    """The words are wrong; a hint at ``help`` follows the text.

    Args:
        text: One line.
        ends_line: False where QEMU loses the end of the line.
    """

    def __init__(self, text: str, *, ends_line: bool = True) -> None:
        super().__init__(text)
        self.text = text + ("\n" if ends_line else "")


class PlainError(Exception):
    """The text is all that is printed."""
