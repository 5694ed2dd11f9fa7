"""GnuTLS priority strings, as far as Python's TLS can be told the same.

    BASE[:WORD]...    WORD: +NAME, -NAME or !NAME, or %OPTION

A word takes effect or is refused, never ignored. Python can choose versions, and for TLS 1.2
ciphers and key exchanges; the ciphers of TLS 1.3 are OpenSSL's choice. So a string that takes
one of those away leaves TLS 1.2 alone.
"""

import re
import ssl
from dataclasses import dataclass

from migrationd.errors import ObjectError

_VERSIONS = {
    "VERS-TLS1.2": ssl.TLSVersion.TLSv1_2,
    "VERS-TLS1.3": ssl.TLSVersion.TLSv1_3,
}
_OLD_VERSIONS = ("VERS-TLS1.0", "VERS-TLS1.1", "VERS-SSL3.0", "VERS-DTLS0.9", "VERS-DTLS1.0")

_CIPHERS = {
    "AES-256-GCM": "AES256-GCM-SHA384",
    "CHACHA20-POLY1305": "CHACHA20-POLY1305",
    "AES-128-GCM": "AES128-GCM-SHA256",
}
"""GnuTLS's name to the end of OpenSSL's; TLS 1.3 has the same three by default."""

_STRONG = frozenset(("AES-256-GCM", "CHACHA20-POLY1305"))

_EXCHANGES = {
    "ECDHE-ECDSA": "ECDHE-ECDSA-",
    "ECDHE-RSA": "ECDHE-RSA-",
    "DHE-RSA": "DHE-RSA-",
    "RSA": "",
}
_NOT_SUITES = frozenset(("CHACHA20-POLY1305",))
"""What there is no suite of for the exchange by RSA alone."""

_NEVER_USED = re.compile(
    r"(3DES-CBC|ARCFOUR-\d+|AES-\d+-(CBC|CCM|CCM-8)|CAMELLIA-\d+-(CBC|GCM)|DES-CBC|NULL|MD5|SHA1"
    r"|SHA256|SHA384|ANON-DH|ANON-ECDH|DHE-DSS|PSK|DHE-PSK|ECDHE-PSK|RSA-PSK|SRP(-RSA|-DSS)?)\Z"
)
"""What can be taken away: once ciphers are chosen, none of these is among them."""

_HARMLESS = re.compile(r"(%COMPAT|%SAFE_RENEGOTIATION|%DISABLE_SAFE_RENEGOTIATION|[+]COMP-NULL)\Z")
"""What OpenSSL does in any case, or never does."""

_BASES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    **dict.fromkeys(
        ("NORMAL", "SECURE128", "@SYSTEM", "@QEMU"),
        (frozenset(_CIPHERS), frozenset(_EXCHANGES)),
    ),
    **dict.fromkeys(("SECURE192", "SECURE256"), (_STRONG, frozenset(_EXCHANGES))),
    "PFS": (frozenset(_CIPHERS), frozenset(_EXCHANGES) - {"RSA"}),
}


@dataclass(frozen=True, slots=True)
class Priority:
    """What a context is to allow.

    Attributes:
        minimum: Lowest TLS version.
        maximum: Highest TLS version.
        suites: Cipher suites of TLS 1.2 as OpenSSL lists them; None: its default.
    """

    minimum: ssl.TLSVersion
    maximum: ssl.TLSVersion
    suites: str | None


def parse_priority(text: str) -> Priority:
    """Understand a priority string.

    Raises:
        ObjectError: A word is not known or cannot be met, or nothing is left.
    """

    def refuse(why: str) -> ObjectError:
        return ObjectError(f"Unable to set TLS session priority {text}: {why}")

    base, *words = text.split(":")
    if base not in _BASES:
        raise refuse(f"'{base}' is not known")
    ciphers, exchanges = (set(names) for names in _BASES[base])
    versions = set(_VERSIONS)
    is_chosen = False
    for word in words:
        # OpenSSL's default has some of the weak ones: they go by choosing others.
        is_weak = word[:1] in ("-", "!") and _NEVER_USED.match(word[1:]) is not None
        is_chosen = is_chosen or is_weak
        if is_weak or _HARMLESS.match(word):
            continue
        if not _apply(word, versions, ciphers, exchanges):
            raise refuse(
                f"'{word}' is not supported; TLS 1.2 and 1.3, "
                f"{', '.join(_CIPHERS)} and {', '.join(_EXCHANGES)} can be chosen"
            )
    if not versions:
        raise refuse("no version is left")
    if not is_chosen and ciphers == set(_CIPHERS) and exchanges == set(_EXCHANGES):
        chosen = sorted(_VERSIONS[name] for name in versions)
        return Priority(chosen[0], chosen[-1], None)
    if ciphers != set(_CIPHERS):
        versions.discard("VERS-TLS1.3")
    if not versions:
        raise refuse("the ciphers of TLS 1.3 cannot be chosen, and no other version is left")
    suites = [
        _EXCHANGES[exchange] + _CIPHERS[cipher]
        for exchange in _EXCHANGES
        for cipher in _CIPHERS
        if exchange in exchanges
        and cipher in ciphers
        and not (exchange == "RSA" and cipher in _NOT_SUITES)
    ]
    if not suites:
        raise refuse("no cipher suite is left")
    chosen = sorted(_VERSIONS[name] for name in versions)
    return Priority(chosen[0], chosen[-1], ":".join(suites))


def _apply(word: str, versions: set[str], ciphers: set[str], exchanges: set[str]) -> bool:
    """Let a word take effect; False if it cannot."""
    sign, name = word[:1], word[1:]
    if sign not in ("+", "-", "!"):
        return False
    for known, chosen, every in (
        (_VERSIONS, versions, ("VERS-ALL", "VERS-TLS-ALL")),
        (_CIPHERS, ciphers, ("CIPHER-ALL",)),
        (_EXCHANGES, exchanges, ("KX-ALL",)),
    ):
        names = set(known) if name in every else {name} & set(known)
        if names:
            if sign == "+":
                chosen |= names
            else:
                chosen -= names
            return True
    return name in _OLD_VERSIONS and sign != "+"  # they are off already
