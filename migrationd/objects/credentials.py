"""What all TLS credentials have in common."""

import re
import ssl

from migrationd.errors import ObjectError
from migrationd.objects.base import Properties, UserObject, flag_of, text_of

_VERSIONS = {
    "VERS-TLS1.2": ssl.TLSVersion.TLSv1_2,
    "VERS-TLS1.3": ssl.TLSVersion.TLSv1_3,
}
_BASE = re.compile(r"(NORMAL|PFS|SECURE128|SECURE192|SECURE256|@SYSTEM|@QEMU)\Z")


class TlsCredentials(UserObject):
    """Credentials for one end of a connection.

    Attributes:
        is_server: Which end.
        verify_peer: Whether the other end's certificate is checked.
        directory: Where the files are.

    Raises:
        ObjectError: ``endpoint`` is neither ``client`` nor ``server``.
    """

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties)
        endpoint = text_of(properties, "endpoint") or "client"
        if endpoint not in ("client", "server"):
            raise ObjectError(f"Parameter 'endpoint' does not accept value '{endpoint}'")
        self.is_server = endpoint == "server"
        self.verify_peer = flag_of(properties, "verify-peer", default=True)
        self.directory = text_of(properties, "dir")
        self._priority = text_of(properties, "priority") or "NORMAL"

    @property
    def checks_names(self) -> bool:
        """Whether a server's certificate must be for the host that was asked for."""
        return False

    def context(self) -> ssl.SSLContext:
        """A context for connections.

        Raises:
            ObjectError: These credentials cannot be used here.
        """
        raise NotImplementedError

    def _required_directory(self) -> str:
        if self.directory is None:
            raise ObjectError("Missing 'dir' property value")
        return self.directory

    def _new_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if self.is_server else ssl.PROTOCOL_TLS_CLIENT
        )
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        if self.is_server:
            # Nobody resumes a session: a ticket would only be unread bytes.
            context.num_tickets = 0
        return context

    def _apply_priority(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version, context.maximum_version = _versions_of(self._priority)
        return context


def _versions_of(priority: str) -> tuple[ssl.TLSVersion, ssl.TLSVersion]:
    """Lowest and highest TLS version that a GnuTLS priority string allows.

    Ciphers are the library's choice: a word about them that could only be ignored is refused.
    """
    base, *words = priority.split(":")
    allowed = set(_VERSIONS)
    if not _BASE.match(base):
        raise ObjectError(f"Unable to set TLS session priority {priority}: '{base}' is not known")
    for word in words:
        name = word[1:]
        if name == "VERS-ALL" or name == "VERS-TLS-ALL":
            names = set(_VERSIONS)
        elif name in _VERSIONS:
            names = {name}
        elif name in ("VERS-TLS1.0", "VERS-TLS1.1", "VERS-SSL3.0") and word[0] in "-!":
            continue  # they are off already
        else:
            names = set()
        if not names or word[0] not in "+-!":
            raise ObjectError(
                f"Unable to set TLS session priority {priority}: '{word}' is not supported; only "
                f"TLS 1.2 and 1.3 can be chosen"
            )
        allowed = allowed | names if word[0] == "+" else allowed - names
    if not allowed:
        raise ObjectError(f"Unable to set TLS session priority {priority}: no version is left")
    versions = sorted(_VERSIONS[name] for name in allowed)
    return versions[0], versions[-1]


class AnonymousCredentials(TlsCredentials):
    """``tls-creds-anon``: can be made, as at QEMU, but not used.

    Encryption with anybody keeps nobody out; and OpenSSL has it for TLS 1.2 only.
    """

    qom_type = "tls-creds-anon"

    def context(self) -> ssl.SSLContext:
        """Refuse.

        Raises:
            ObjectError: Always.
        """
        raise ObjectError(
            "anonymous TLS credentials authenticate nobody and are not supported; "
            "use tls-creds-x509"
        )
