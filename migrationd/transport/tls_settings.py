"""What a channel needs to know to be encrypted; made from objects by who has them."""

import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WhyRefused = Callable[[Sequence[bytes]], str | None]
"""Asked about a valid chain of certificates (DER, the peer's own first); None: it is welcome."""


@dataclass(frozen=True, slots=True)
class TlsClient:
    """TLS of the connecting side.

    Attributes:
        context: With certificates or keys loaded.
        checks_names: Whether the server's certificate must be for the host that was asked for.
        host: Name to check for; None takes the address's host.
        why_refused: Says what speaks against a server whose certificate is valid.
    """

    context: ssl.SSLContext
    checks_names: bool
    host: str | None = None
    why_refused: WhyRefused | None = None


@dataclass(frozen=True, slots=True)
class TlsServer:
    """TLS of the listening side.

    Attributes:
        context: With certificates or keys loaded.
        authorize: Called with the client's certificate (DER); raises an error of ours where it
            may not come in. None lets every valid one in.
        why_refused: Says what speaks against a client whose certificate is valid.
    """

    context: ssl.SSLContext
    authorize: Callable[[bytes | None], None] | None = None
    why_refused: WhyRefused | None = None
