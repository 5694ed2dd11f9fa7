"""Certificates, made anew for each test: authorities, and directories as QEMU reads them."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL_NAMES = ("localhost", "127.0.0.1")


@dataclass
class Pair:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_authority(name: str = "Test CA", issuer: Pair | None = None) -> Pair:
    """An authority; another one vouches for it, or it does itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    above = issuer.certificate.subject if issuer else subject
    builder = _builder(subject, above, key, -1, 30)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    builder = builder.add_extension(_usage(signs_certificates=True), True)
    return Pair(builder.sign(issuer.key if issuer else key, hashes.SHA256()), key)


def make_revocations(
    authority: Pair, revoked: tuple[Pair, ...] = (), *, days: tuple[float, float] = (-1, 30)
) -> bytes:
    """An authority's list of certificates that are not valid any more, in PEM."""
    now = datetime.now(UTC)
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=authority.certificate.subject,
        last_update=now + timedelta(days=days[0]),
        next_update=now + timedelta(days=days[1]),
        revoked_certificates=[
            x509.RevokedCertificateBuilder(pair.certificate.serial_number, now).build()
            for pair in revoked
        ],
    )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def make_leaf(
    authority: Pair | None,
    name: str,
    *,
    is_server: bool,
    names: tuple[str, ...] = LOCAL_NAMES,
    days: tuple[float, float] = (-1, 30),
) -> Pair:
    """A certificate for one end; signed by itself without an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    issuer = authority.certificate.subject if authority else subject
    builder = _builder(subject, issuer, key, *days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(), True)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), False)
    if is_server:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_general_name(text) for text in names]), False
        )
    return Pair(builder.sign(authority.key if authority else key, hashes.SHA256()), key)


def write_directory(
    path: Path,
    authority: Pair,
    *,
    server: Pair | None = None,
    client: Pair | None = None,
    password: bytes | None = None,
) -> Path:
    """The files of ``tls-creds-x509``."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "ca-cert.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    protection: KeySerializationEncryption = (
        BestAvailableEncryption(password) if password else NoEncryption()
    )
    for end, pair in (("server", server), ("client", client)):
        if pair is not None:
            (path / f"{end}-cert.pem").write_bytes(pair.certificate.public_bytes(Encoding.PEM))
            (path / f"{end}-key.pem").write_bytes(
                pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
            )
    return path


def make_directory(path: Path) -> Path:
    """An authority and both ends, for this host; for what wants TLS to simply work."""
    authority = make_authority()
    return write_directory(
        path,
        authority,
        server=make_leaf(authority, "server", is_server=True),
        client=make_leaf(authority, "client", is_server=False),
    )


def _name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "migrationd tests"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    first_day: float,
    last_day: float,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=first_day))
        .not_valid_after(now + timedelta(days=last_day))
    )


def _usage(*, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
