"""What things of a workload may be called: the guest socket and the stream carry these names."""

import re

from migrationd.errors import GuestError

_NAME = re.compile(r"[\x21-\x7e]{1,255}")


def check_name(name: str, what: str) -> None:
    """Whether this can be the name of something.

    Args:
        name: Name.
        what: Of what, in words.

    Raises:
        GuestError: It cannot.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise GuestError(
            f"{name!r} is no name of {what}: 1 to 255 printable ASCII characters without spaces"
        )
