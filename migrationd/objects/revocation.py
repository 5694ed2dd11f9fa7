"""``ca-crl.pem``: certificates that nobody may come with any more.

As at QEMU a list speaks of the certificates of its own authority, anywhere in the peer's chain,
and where an authority has no list, nothing of it was revoked. OpenSSL's own check wants a list
of every authority, or looks at the last certificate alone.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509

from migrationd.errors import ObjectError
from migrationd.objects.base import read_small_file

_PEM = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


class Revocations:
    """The lists of one file.

    Args:
        path: One list or more, in PEM.

    Raises:
        ObjectError: The file cannot be read, or has no list.
    """

    def __init__(self, path: str) -> None:
        try:
            texts = _PEM.findall(read_small_file(path))
            self._lists = [x509.load_pem_x509_crl(text) for text in texts]
        except (OSError, ValueError):
            self._lists = []
        if not self._lists:
            raise ObjectError(f"Unable to import CRL {path}")

    def why_refused(self, chain: Sequence[bytes]) -> str | None:
        """What speaks against a peer, in one line.

        Args:
            chain: Its certificates in DER, its own first, up to whom we trust.

        Returns:
            None: nothing.
        """
        if not chain:
            return "the peer's certificates cannot be checked for revocation: they are not known"
        for der in chain:
            try:
                certificate = x509.load_der_x509_certificate(der)
                name = f"certificate '{certificate.subject.rfc4514_string()}'"
            except ValueError as error:
                return f"the peer's certificate cannot be checked for revocation: {error}"
            for revocations in self._lists:
                if revocations.issuer == certificate.issuer:
                    reason = _why(revocations, certificate.serial_number)
                    if reason is not None:
                        return f"{name} {reason}"
        return None


def _why(revocations: x509.CertificateRevocationList, serial_number: int) -> str | None:
    if revocations.get_revoked_certificate_by_serial_number(serial_number) is not None:
        return "was revoked"
    now = datetime.now(UTC)
    if revocations.last_update_utc > now:
        return "cannot be checked: the revocation list is not yet valid"
    until = revocations.next_update_utc
    if until is not None and until < now:
        return "cannot be checked: the revocation list has expired"
    return None
