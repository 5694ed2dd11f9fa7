"""What all TLS credentials have in common."""

import ssl
from typing import TYPE_CHECKING

from migrationd.errors import ObjectError
from migrationd.objects.base import Properties, UserObject, flag_of, text_of
from migrationd.objects.priority import parse_priority

if TYPE_CHECKING:
    from migrationd.transport.tls_settings import WhyRefused


class TlsCredentials(UserObject):
    """Credentials for one end of a connection.

    Attributes:
        is_server: Which end.
        verify_peer: Whether the other end's certificate is checked.
        directory: Where the files are.
        chooses_suites: Whether ``priority`` may choose ciphers.
        why_refused: What speaks against a chain of certificates that is valid, or None.

    Raises:
        ObjectError: ``endpoint`` is neither ``client`` nor ``server``.
    """

    chooses_suites = True

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties)
        endpoint = text_of(properties, "endpoint") or "client"
        if endpoint not in ("client", "server"):
            raise ObjectError(f"Parameter 'endpoint' does not accept value '{endpoint}'")
        self.is_server = endpoint == "server"
        self.verify_peer = flag_of(properties, "verify-peer", default=True)
        self.directory = text_of(properties, "dir")
        self.why_refused: WhyRefused | None = None
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
        priority = parse_priority(self._priority)
        context.minimum_version, context.maximum_version = priority.minimum, priority.maximum
        if priority.suites is not None:
            if not self.chooses_suites:
                raise ObjectError(
                    f"Unable to set TLS session priority {self._priority}: with pre-shared keys "
                    "only versions can be chosen"
                )
            context.set_ciphers(priority.suites)
        return context


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
