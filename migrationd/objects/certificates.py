"""Whether certificates can serve, told before anybody connects.

Reference: the sanity check of QEMU's ``tls-creds-x509``, texts of 11.1.
"""

from datetime import UTC, datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrationd.errors import ObjectError
from migrationd.objects.base import read_small_file

_CHAIN_LIMIT = 16

_NAMES = {
    NameOID.BUSINESS_CATEGORY: "businessCategory",
    NameOID.COMMON_NAME: "CN",
    NameOID.COUNTRY_NAME: "C",
    NameOID.DN_QUALIFIER: "dnQualifier",
    NameOID.DOMAIN_COMPONENT: "DC",
    NameOID.EMAIL_ADDRESS: "EMAIL",
    NameOID.GENERATION_QUALIFIER: "generationQualifier",
    NameOID.GIVEN_NAME: "givenName",
    NameOID.INITIALS: "initials",
    NameOID.JURISDICTION_COUNTRY_NAME: "jurisdictionOfIncorporationCountryName",
    NameOID.JURISDICTION_LOCALITY_NAME: "jurisdictionOfIncorporationLocalityName",
    NameOID.JURISDICTION_STATE_OR_PROVINCE_NAME: "jurisdictionOfIncorporationStateOrProvinceName",
    NameOID.LOCALITY_NAME: "L",
    NameOID.ORGANIZATIONAL_UNIT_NAME: "OU",
    NameOID.ORGANIZATION_NAME: "O",
    NameOID.POSTAL_CODE: "postalCode",
    NameOID.PSEUDONYM: "pseudonym",
    NameOID.SERIAL_NUMBER: "serialNumber",
    NameOID.STATE_OR_PROVINCE_NAME: "ST",
    NameOID.STREET_ADDRESS: "street",
    NameOID.SURNAME: "surName",
    NameOID.TITLE: "title",
    NameOID.USER_ID: "UID",
    x509.ObjectIdentifier("2.5.4.13"): "description",
    x509.ObjectIdentifier("2.5.4.20"): "telephoneNumber",
    x509.ObjectIdentifier("2.5.4.41"): "name",
    x509.ObjectIdentifier("1.3.6.1.5.5.7.8.5"): "XmppAddr",
}
"""What a QEMU, that is GnuTLS, calls the parts of a name: rules are written with these."""

T = TypeVar("T", bound=x509.ExtensionType)


def check_certificates(authorities_path: str, own_path: str | None, *, is_server: bool) -> None:
    """Check that certificates are valid now and fit their purpose and each other.

    Args:
        authorities_path: File of the authorities' certificates.
        own_path: File of our own chain, our own certificate first; None if we have none.
        is_server: Which end our own is for.

    Raises:
        ObjectError: Names the file and what is wrong with it.
    """
    authorities = _load(authorities_path)
    own = _load(own_path) if own_path is not None else []
    role = "server" if is_server else "client"
    if own_path is not None:
        _check_times(own[0], own_path, role)
        _check_leaf(own[0], own_path, role)
    for authority in authorities:
        _check_times(authority, authorities_path, "CA")
        _check_authority(authority, authorities_path)
    if own_path is not None:
        _check_chain(own, authorities, own_path, authorities_path)


def distinguished_name(name: x509.Name) -> str:
    """A name as authorization objects are asked about it: in the certificate's order."""
    return ",".join("+".join(map(_attribute_text, part)) for part in name.rdns)


def name_of(certificate: bytes) -> str:
    """Distinguished name of a certificate in DER.

    Raises:
        ObjectError: It cannot be read.
    """
    try:
        return distinguished_name(x509.load_der_x509_certificate(certificate).subject)
    except ValueError as error:
        raise ObjectError(f"the name of the peer's certificate cannot be read: {error}") from None


def _attribute_text(attribute: "x509.NameAttribute[str | bytes]") -> str:
    """``CN=somebody``; what has no name is written as bytes: ``1.2.3.4=#0c0161``."""
    if attribute.oid in _NAMES:
        return attribute.rfc4514_string(_NAMES)
    sequence = x509.Name([attribute]).public_bytes()
    for _ in range(3):
        sequence, _ = _content(sequence)
    _, value = _content(sequence)
    return f"{attribute.oid.dotted_string}=#{value.hex()}"


def _content(der: bytes) -> tuple[bytes, bytes]:
    """Content of the first element, and what follows it."""
    size, start = der[1], 2
    if size & 0x80:
        start += size & 0x7F
        size = int.from_bytes(der[2:start], "big")
    return der[start : start + size], der[start + size :]


def _load(path: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(read_small_file(path))
    except OSError as error:
        raise ObjectError(f"Unable to access credentials {path}: {error.strerror}") from None
    except ValueError:
        raise ObjectError(
            f"Unable to import certificate {path}: No certificate was found."
        ) from None


def _check_times(certificate: x509.Certificate, path: str, role: str) -> None:
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise ObjectError(f"The {role} certificate {path} has expired")
    if certificate.not_valid_before_utc > now:
        raise ObjectError(f"The {role} certificate {path} is not yet active")


def _check_leaf(certificate: x509.Certificate, path: str, role: str) -> None:
    if _is_authority(certificate):
        raise ObjectError(
            f"The certificate {path} basic constraints show a CA, but we need one for a {role}"
        )
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and usage.critical and not usage.value.digital_signature:
        raise ObjectError(f"Certificate {path} usage does not permit digital signature")
    purpose = _extension(certificate, x509.ExtendedKeyUsage)
    wanted = (
        ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    )
    if (
        purpose is not None
        and purpose.critical
        and wanted not in purpose.value
        and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in purpose.value
    ):
        raise ObjectError(f"Certificate {path} purpose does not allow use with a TLS {role}")


def _check_authority(certificate: x509.Certificate, path: str) -> None:
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None:
        raise ObjectError(f"The certificate {path} is missing basic constraints for a CA")
    if not constraints.value.ca:
        raise ObjectError(f"The certificate {path} basic constraints do not show a CA")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and usage.critical and not usage.value.key_cert_sign:
        raise ObjectError(f"Certificate {path} usage does not permit certificate signing")


def _check_chain(
    own: list[x509.Certificate],
    authorities: list[x509.Certificate],
    own_path: str,
    authorities_path: str,
) -> None:
    """Walk from our own certificate to one of the authorities."""
    certificate = own[0]
    for _ in range(_CHAIN_LIMIT):
        if any(_has_issued(authority, certificate) for authority in authorities):
            return
        issuer = next((other for other in own[1:] if _has_issued(other, certificate)), None)
        if issuer is None:
            break
        certificate = issuer
    if _has_issued(certificate, certificate):
        raise ObjectError(
            f"Our own certificate {own_path} failed validation against {authorities_path}: "
            f"The certificate hasn't got a known issuer"
        )
    raise ObjectError(f"Cert '{distinguished_name(certificate.subject)}' has no issuer in CA chain")


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _is_authority(certificate: x509.Certificate) -> bool:
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.value.ca


def _extension(certificate: x509.Certificate, kind: type[T]) -> x509.Extension[T] | None:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None
    except ValueError as error:
        raise ObjectError(f"a certificate has a malformed extension: {error}") from None
