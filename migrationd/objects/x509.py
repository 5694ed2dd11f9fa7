"""``tls-creds-x509``: certificates and keys in a directory.

    ca-cert.pem                         whom to trust
    ca-crl.pem                          whom not any more; optional
    server-cert.pem, server-key.pem     endpoint=server
    client-cert.pem, client-key.pem     endpoint=client; optional
    dh-params.pem                       endpoint=server; optional

Reference: QEMU's file names, checks and texts (11.1).
"""

import os
import ssl

from migrationd.errors import ObjectError
from migrationd.objects.base import FindObject, Properties, flag_of, text_of
from migrationd.objects.certificates import check_certificates
from migrationd.objects.credentials import TlsCredentials
from migrationd.objects.revocation import Revocations
from migrationd.objects.secret import secret_data


class X509Credentials(TlsCredentials):
    """Certificates; the files are read when the object is made.

    Args:
        properties: ``dir``, ``endpoint``, ``verify-peer``, ``sanity-check``, ``passwordid``,
            ``priority``.
        find: Finds the secret of ``passwordid``.

    Raises:
        ObjectError: A file is missing or cannot be used.
    """

    qom_type = "tls-creds-x509"

    def __init__(self, properties: Properties, find: FindObject) -> None:
        super().__init__(properties)
        directory = self._required_directory()
        self._authorities = f"{directory}/ca-cert.pem"
        _check_access(self._authorities)
        end = "server" if self.is_server else "client"
        self._certificate = f"{directory}/{end}-cert.pem"
        self._key = f"{directory}/{end}-key.pem"
        self._has_own = self._find_own(end)
        revocations = _optional(f"{directory}/ca-crl.pem")
        self._dh_params = _optional(f"{directory}/dh-params.pem") if self.is_server else None
        if flag_of(properties, "sanity-check", default=True):
            check_certificates(
                self._authorities,
                self._certificate if self._has_own else None,
                is_server=self.is_server,
            )
        password_id = text_of(properties, "passwordid")
        # Without one, OpenSSL would ask at the terminal.
        password = secret_data(password_id, find) if password_id is not None else b""
        self._context = self._load(password)
        if revocations is not None and self.verify_peer:
            self.why_refused = Revocations(revocations).why_refused

    @property
    def checks_names(self) -> bool:
        """Whether a server's certificate must be for the host that was asked for."""
        return self.verify_peer

    def context(self) -> ssl.SSLContext:
        """The context with all files loaded.

        Raises:
            ObjectError: ``priority`` cannot be met.
        """
        return self._apply_priority(self._context)

    def _find_own(self, end: str) -> bool:
        exists = [os.path.exists(path) for path in (self._certificate, self._key)]
        if all(exists):
            _check_access(self._certificate)
            _check_access(self._key)
            return True
        if any(exists):
            _check_access(self._key if exists[0] else self._certificate)
        if self.is_server:
            raise ObjectError(f"Missing {end} cert '{self._certificate}' & key '{self._key}'")
        return False

    def _load(self, password: bytes) -> ssl.SSLContext:
        context = self._new_context()
        context.check_hostname = not self.is_server and self.verify_peer
        context.verify_mode = ssl.CERT_REQUIRED if self.verify_peer else ssl.CERT_NONE
        try:
            context.load_verify_locations(self._authorities)
        except (ssl.SSLError, OSError):
            raise ObjectError(
                f"Unable to import certificate {self._authorities}: No certificate was found."
            ) from None
        # Whoever is in the file is trusted, also an authority that another one vouches for.
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        if self._has_own:
            self._load_own(context, password)
        if self._dh_params is not None:
            try:
                context.load_dh_params(self._dh_params)
            except (ssl.SSLError, OSError):
                raise ObjectError(f"Unable to load DH parameters from {self._dh_params}") from None
        return context

    def _load_own(self, context: ssl.SSLContext, password: bytes) -> None:
        try:
            context.load_cert_chain(self._certificate, self._key, password=password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ObjectError(
                    f"Cannot set certificate '{self._certificate}' & key '{self._key}': "
                    f"The certificate and the given key do not match."
                ) from None
            raise ObjectError(f"Unable to import private key {self._key}") from None
        except (OSError, ValueError):
            raise ObjectError(f"Unable to import private key {self._key}") from None


def _optional(path: str) -> str | None:
    if not os.path.exists(path):
        return None
    _check_access(path)
    return path


def _check_access(path: str) -> None:
    try:
        status = os.stat(path)
        if not os.path.isfile(path):
            raise OSError(22, "not a regular file")
        if not os.access(path, os.R_OK):
            raise OSError(13, os.strerror(13))
    except OSError as error:
        raise ObjectError(f"Unable to access credentials {path}: {error.strerror}") from None
    if status.st_size > 1 << 20:
        raise ObjectError(f"Unable to access credentials {path}: file too large")
