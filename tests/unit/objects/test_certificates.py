"""Names of certificates, as authorization rules are written for QEMU."""

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from migrationd.errors import ObjectError
from migrationd.objects.certificates import distinguished_name, name_of


def test_parts_are_called_what_gnutls_calls_them() -> None:
    parts = (
        (NameOID.COUNTRY_NAME, "DE"),
        (NameOID.STREET_ADDRESS, "Way 1"),
        (NameOID.SERIAL_NUMBER, "12"),
        (NameOID.SURNAME, "Doe"),
        (NameOID.EMAIL_ADDRESS, "joe@example.com"),
        (NameOID.COMMON_NAME, "a,b"),
    )
    name = x509.Name([x509.NameAttribute(oid, text) for oid, text in parts])
    assert distinguished_name(name) == (
        "C=DE,street=Way 1,serialNumber=12,surName=Doe,EMAIL=joe@example.com,CN=a\\,b"
    )


def test_parts_that_stand_together_keep_their_order() -> None:
    both = x509.RelativeDistinguishedName(
        [x509.NameAttribute(NameOID.COMMON_NAME, "x"), x509.NameAttribute(NameOID.USER_ID, "u")]
    )
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "o")
    name = x509.Name([both, x509.RelativeDistinguishedName([organization])])
    assert distinguished_name(name) == "CN=x+UID=u,O=o"


@pytest.mark.parametrize(
    ("text", "expected"), [("v", "0c0176"), ("v" * 300, "0c82012c" + "76" * 300)]
)
def test_what_has_no_name_is_written_as_bytes(text: str, expected: str) -> None:
    attribute = x509.NameAttribute(x509.ObjectIdentifier("1.3.6.1.4.1.9999.1"), text)
    assert distinguished_name(x509.Name([attribute])) == f"1.3.6.1.4.1.9999.1=#{expected}"


def test_a_certificate_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ObjectError, match=r"^the name of the peer's certificate cannot be read"):
        name_of(b"\x30\x00")
