"""Why a certificate was refused, in one plain line."""

import contextlib
import ssl
import threading

_CALLBACK = "_msg_callback"
_CERTIFICATE_MESSAGE = 11
_PLAIN = {
    9: "is not yet valid",
    10: "has expired",
    12: "cannot be checked: the revocation list has expired",
    18: "is signed by itself; nobody in ca-cert.pem vouches for it",
    19: "comes from an authority that is not in ca-cert.pem",
    20: "was issued by an authority that is not in ca-cert.pem",
    21: "was issued by an authority that is not in ca-cert.pem",
    23: "was revoked",
    26: "was not issued for this purpose",
}
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate from us; there is none "
    "in the directory of our credentials",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer says that our certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the peer says that our certificate was revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the peer does not accept our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not accept our certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know the authority of our certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the peer has no credentials that fit ours",
    "TLSV1_ALERT_ACCESS_DENIED": "the peer denies us access",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS; set tls-creds at both ends",
    "HTTP_REQUEST": "the peer does not speak TLS",
    "NO_SHARED_CIPHER": "the peer's credentials do not fit ours",
}

_LOCK = threading.Lock()
_WATCHERS: "list[CertificateSeen]" = []


class CertificateSeen:
    """Keeps the first certificate of the other end until the handshake is over.

    OpenSSL shows a certificate only once it has accepted it. Its message callback, which
    Python has for debugging, shows it before; without it, errors lack the certificate's name.

    Args:
        context: Of the connection that is about to be made; it takes the callback from there.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context: ssl.SSLContext | None = context
        self._connection: ssl.SSLObject | None = None
        self.certificate: bytes | None = None
        with _LOCK:
            _WATCHERS.append(self)
            with contextlib.suppress(AttributeError, TypeError):
                setattr(context, _CALLBACK, _on_message)

    def watch(self, connection: ssl.SSLObject) -> None:
        """Say which connection it is."""
        self._connection = connection

    def forget(self) -> None:
        """Watch no longer; the callback costs time with each record."""
        with _LOCK:
            context, self._context, self._connection = self._context, None, None
            if context is None:
                return
            _WATCHERS.remove(self)
            if all(other._context is not context for other in _WATCHERS):
                with contextlib.suppress(AttributeError, TypeError):
                    setattr(context, _CALLBACK, None)

    def take(self, connection: ssl.SSLObject, certificate: bytes | None) -> None:
        """Keep the first certificate of our connection."""
        if self._connection is connection and self.certificate is None:
            self.certificate = certificate

    def name(self) -> str:
        """The certificate in words."""
        if self.certificate is None:
            return "the peer's certificate"
        from cryptography import x509

        try:
            subject = x509.load_der_x509_certificate(self.certificate).subject.rfc4514_string()
        except ValueError:
            return "the peer's malformed certificate"
        return f"certificate '{_printable(subject)}'"

    def valid_names(self) -> str:
        """Hosts that the certificate is for."""
        if self.certificate is None:
            return "other hosts"
        from cryptography import x509

        try:
            names = (
                x509.load_der_x509_certificate(self.certificate)
                .extensions.get_extension_for_class(x509.SubjectAlternativeName)
                .value
            )
        except (ValueError, x509.ExtensionNotFound):
            return "other hosts"
        texts = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
        return _printable(", ".join(texts[:8])) or "other hosts"


def why_refused(error: ssl.SSLError, seen: CertificateSeen, host: str | None) -> str:
    """One plain line for an error of the TLS library."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (62, 64):
            return f"{seen.name()} is for {seen.valid_names()}, not for '{host}'"
        reason = _PLAIN.get(error.verify_code)
        return f"{seen.name()} {reason or 'is not valid: ' + error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the peer closed the connection"
    name = error.reason or ""
    return _ALERTS.get(name) or name.replace("_", " ").lower() or "unknown error"


def _on_message(
    connection: ssl.SSLObject,
    direction: str,
    _version: object,
    _content: object,
    kind: object,
    data: bytes,
) -> None:
    if direction == "read" and kind == _CERTIFICATE_MESSAGE:
        with _LOCK:
            for seen in _WATCHERS:
                seen.take(connection, _first_certificate(data))


def _first_certificate(message: bytes) -> bytes | None:
    """DER of the first certificate in a Certificate message, of TLS 1.2 or 1.3."""
    body = message[4:]
    for start in (0, 1 + (body[0] if body else 0)):
        list_size = int.from_bytes(body[start : start + 3], "big")
        size = int.from_bytes(body[start + 3 : start + 6], "big")
        certificate = body[start + 6 : start + 6 + size]
        is_whole = start + 3 + list_size == len(body) and size + 3 <= list_size
        if is_whole and size and len(certificate) == size:
            return bytes(certificate)
    return None


def _printable(text: str) -> str:
    """A peer's text for one line of ours."""
    return "".join(char if char.isprintable() else "?" for char in text)[:200]
