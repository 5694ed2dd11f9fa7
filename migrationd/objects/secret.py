"""``secret``: a password or key, as it is or encrypted with another secret.

Reference: ``secret`` of QEMU; the encryption is AES-256-CBC with PKCS #7 padding.
"""

import base64
import binascii

from migrationd.errors import ObjectError
from migrationd.objects.base import FindObject, Properties, UserObject, read_small_file, text_of

_KEY_BYTES = 32
_IV_BYTES = 16


class Secret(UserObject):
    """A secret; what it holds is read when it is made.

    Args:
        properties: ``data`` or ``file``; ``format``, ``keyid``, ``iv``.
        find: Finds the secret that it is encrypted with.

    Attributes:
        data: The secret itself.

    Raises:
        ObjectError: It cannot be read, or its properties contradict each other.
    """

    qom_type = "secret"

    def __init__(self, properties: Properties, find: FindObject) -> None:
        super().__init__(properties)
        raw = _raw_data(properties)
        is_base64 = text_of(properties, "format") == "base64"
        key_id = text_of(properties, "keyid")
        if key_id is not None:
            key = secret_data(key_id, find)
            iv = text_of(properties, "iv")
            # The stored form of encrypted bytes is base64, unless it says that it is raw.
            raw = _decrypt(_from_base64(raw) if is_base64 else raw, key, iv)
        elif text_of(properties, "iv") is not None:
            raise ObjectError("IV should not be set if the secret is not encrypted")
        elif is_base64:
            raw = _from_base64(raw)
        self.data = raw

    def __repr__(self) -> str:
        return "Secret()"


def secret_data(object_id: str, find: FindObject) -> bytes:
    """What a secret holds.

    Raises:
        ObjectError: There is none of this id, or it is something else.
    """
    secret = find(object_id)
    if secret is None:
        raise ObjectError(f"No secret with id '{object_id}'")
    if not isinstance(secret, Secret):
        raise ObjectError(f"Object with id '{object_id}' is not a secret")
    return secret.data


def _raw_data(properties: Properties) -> bytes:
    data, path = text_of(properties, "data"), text_of(properties, "file")
    if data is not None and path is not None:
        raise ObjectError("'file' and 'data' are mutually exclusive")
    if data is not None:
        return data.encode()
    if path is None:
        raise ObjectError("Either 'file' or 'data' must be provided")
    try:
        return read_small_file(path)
    except OSError as error:
        raise ObjectError(
            f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
        ) from None


def _from_base64(data: bytes) -> bytes:
    try:
        # Newlines are what tools put at the end of such files.
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        raise ObjectError("Base64 data contains invalid characters") from None


def _decrypt(data: bytes, key: bytes, iv_text: str | None) -> bytes:
    if len(key) != _KEY_BYTES:
        raise ObjectError(f"Key should be {_KEY_BYTES} bytes in length")
    if iv_text is None:
        raise ObjectError("IV is required to decrypt secret")
    iv = _from_base64(iv_text.encode())
    if len(iv) != _IV_BYTES:
        raise ObjectError(f"IV should be {_IV_BYTES} bytes in length not {len(iv)}")
    if not data or len(data) % _IV_BYTES:
        raise ObjectError(f"Secret's length {len(data)} is no multiple of {_IV_BYTES}")
    # Needed by few; the import takes its time.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    decryptor = Cipher(algorithms.AES256(key), modes.CBC(iv)).decryptor()
    plain = decryptor.update(data) + decryptor.finalize()
    unpadder = PKCS7(_IV_BYTES * 8).unpadder()
    try:
        return unpadder.update(plain) + unpadder.finalize()
    except ValueError:
        raise ObjectError(
            f"Incorrect number of padding bytes ({plain[-1]}) found on decrypted data"
        ) from None
