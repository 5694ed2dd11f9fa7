"""GnuTLS priority strings: versions, suites, and what is refused."""

import ssl
from ssl import TLSVersion

import pytest

from migrationd.errors import ObjectError
from migrationd.objects.priority import parse_priority

BOTH = (TLSVersion.TLSv1_2, TLSVersion.TLSv1_3)


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("NORMAL", BOTH),
        ("@SYSTEM", BOTH),
        ("SECURE128:%COMPAT:+COMP-NULL", BOTH),
        ("NORMAL:-VERS-TLS1.0:!VERS-TLS1.1", BOTH),
        ("NORMAL:-VERS-TLS1.3", (TLSVersion.TLSv1_2, TLSVersion.TLSv1_2)),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", (TLSVersion.TLSv1_3, TLSVersion.TLSv1_3)),
        ("NORMAL:-CIPHER-ALL:+CIPHER-ALL", BOTH),
    ],
)
def test_versions(text: str, versions: tuple[TLSVersion, TLSVersion]) -> None:
    priority = parse_priority(text)
    assert (priority.minimum, priority.maximum) == versions
    assert priority.suites is None


def names(suites: str | None) -> set[str]:
    """What OpenSSL makes of suites, without those of TLS 1.3."""
    assert suites is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(suites)
    found = {cipher["name"] for cipher in context.get_ciphers()}
    return {name for name in found if not name.startswith("TLS_")}


@pytest.mark.parametrize(
    ("text", "maximum", "suites"),
    [
        (
            "NORMAL:-CIPHER-ALL:+AES-256-GCM:-KX-ALL:+ECDHE-RSA",
            TLSVersion.TLSv1_2,
            {"ECDHE-RSA-AES256-GCM-SHA384"},
        ),
        (
            "SECURE256:-KX-ALL:+ECDHE-ECDSA",
            TLSVersion.TLSv1_2,
            {"ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"},
        ),
        (
            "PFS:-DHE-RSA:-ECDHE-ECDSA",
            TLSVersion.TLSv1_3,
            {
                "ECDHE-RSA-AES256-GCM-SHA384",
                "ECDHE-RSA-AES128-GCM-SHA256",
                "ECDHE-RSA-CHACHA20-POLY1305",
            },
        ),
        (
            "NORMAL:-AES-128-CBC:-KX-ALL:+RSA",
            TLSVersion.TLSv1_3,
            {"AES256-GCM-SHA384", "AES128-GCM-SHA256"},
        ),
    ],
)
def test_suites(text: str, maximum: TLSVersion, suites: set[str]) -> None:
    priority = parse_priority(text)
    assert priority.maximum is maximum
    assert names(priority.suites) == suites


def test_weak_ciphers_are_gone_when_they_are_taken_away() -> None:
    found = names(parse_priority("NORMAL:-3DES-CBC:!ARCFOUR-128:-SHA1").suites)
    assert found
    assert all("GCM" in name or "CHACHA20" in name for name in found)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("quatsch", "'quatsch' is not known"),
        ("", "'' is not known"),
        ("NORMAL:", "'' is not supported"),
        ("NORMAL:+CHACHA20", "'\\+CHACHA20' is not supported"),
        ("NORMAL:AES-256-GCM", "'AES-256-GCM' is not supported"),
        ("NORMAL:+AES-256-CBC", "is not supported"),
        ("NORMAL:+VERS-TLS1.0", "is not supported"),
        ("NORMAL:-GROUP-X25519", "is not supported"),
        ("NORMAL:%VERIFY_ALLOW_BROKEN", "is not supported"),
        ("NORMAL:-VERS-ALL", "no version is left"),
        ("NORMAL:-VERS-TLS1.2:-AES-128-GCM", "the ciphers of TLS 1.3 cannot be chosen"),
        ("NORMAL:-KX-ALL:+RSA:-CIPHER-ALL:+CHACHA20-POLY1305", "no cipher suite is left"),
        ("NORMAL:-CIPHER-ALL", "no cipher suite is left"),
    ],
)
def test_what_cannot_be_met_is_refused(text: str, why: str) -> None:
    with pytest.raises(ObjectError, match=f"Unable to set TLS session priority .*{why}"):
        parse_priority(text)
