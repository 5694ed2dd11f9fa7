"""``tls-creds-psk``: a key that both ends know.

Reference: ``keys.psk`` of QEMU and GnuTLS: lines ``user:key in hexadecimal``.
"""

import binascii
import ssl
from typing import Any

from migrationd.errors import ObjectError
from migrationd.objects.base import Properties, read_small_file, text_of
from migrationd.objects.credentials import TlsCredentials

_FILE = "keys.psk"
_CIPHERS = "ECDHE-PSK-CHACHA20-POLY1305:PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256"


class PskCredentials(TlsCredentials):
    """Pre-shared keys; the file is read when the object is made.

    Args:
        properties: ``dir``, ``endpoint``, ``username`` (client only, ``qemu``), ``priority``.

    Raises:
        ObjectError: The file cannot be read, or has no such user.
    """

    qom_type = "tls-creds-psk"
    chooses_suites = False

    def __init__(self, properties: Properties) -> None:
        super().__init__(properties)
        path = f"{self._required_directory()}/{_FILE}"
        self._username = text_of(properties, "username")
        if self.is_server and self._username is not None:
            raise ObjectError("username should not be set when endpoint=server")
        try:
            text = read_small_file(path).decode("utf-8")
        except OSError as error:
            raise ObjectError(f"Unable to access credentials {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ObjectError(f"PSK file {path} is not UTF-8") from None
        self._keys = _keys_of(text, path)
        self._username = self._username or "qemu"
        if not self.is_server and self._username not in self._keys:
            raise ObjectError(f"Username {self._username} not found in PSK file {path}")

    def context(self) -> ssl.SSLContext:
        """A context that knows the keys.

        Raises:
            ObjectError: Python's TLS has no pre-shared keys (before 3.13), or the priority
                cannot be met.
        """
        context: Any = self._apply_priority(self._new_context())
        if not getattr(ssl, "HAS_PSK", False):
            raise ObjectError(
                "TLS with pre-shared keys needs Python 3.13 or later; use tls-creds-x509, "
                "or run migrationd with a newer Python"
            )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers(_CIPHERS)
        if self.is_server:
            context.set_psk_server_callback(self._key_of_client)
        else:
            context.set_psk_client_callback(self._key_for_server)
        return context  # type: ignore[no-any-return]

    def _key_of_client(self, identity: str | None) -> bytes:
        return self._keys.get(identity or "", b"")

    def _key_for_server(self, _hint: str | None) -> tuple[str | None, bytes]:
        assert self._username is not None
        return self._username, self._keys[self._username]


def _keys_of(text: str, path: str) -> dict[str, bytes]:
    keys: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        user, colon, digits = line.strip().partition(":")
        try:
            key = binascii.unhexlify(digits)
        except ValueError:
            key = b""
        if not colon or not user or not 0 < len(key) <= 256:
            raise ObjectError(f"PSK file {path}, line {number}: expected user:hexkey")
        keys[user] = key
    return keys
