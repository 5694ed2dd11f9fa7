"""What a channel needs to know to be encrypted; made from objects by who has them."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TlsClient:
    """TLS of the connecting side.

    Attributes:
        context: With certificates or keys loaded.
        checks_names: Whether the server's certificate must be for the host that was asked for.
        host: Name to check for; None takes the address's host.
    """

    context: ssl.SSLContext
    checks_names: bool
    host: str | None = None


@dataclass(frozen=True, slots=True)
class TlsServer:
    """TLS of the listening side.

    Attributes:
        context: With certificates or keys loaded.
        authorize: Called with the client's certificate (DER); raises an error of ours where it
            may not come in. None lets every valid one in.
    """

    context: ssl.SSLContext
    authorize: Callable[[bytes | None], None] | None = None
