"""Who is let in by chains of certificates and lists of revoked ones: as a QEMU does."""

import asyncio
import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from migrationd.errors import MigrationdError, ObjectError
from migrationd.objects.registry import ObjectRegistry
from migrationd.objects.revocation import Revocations
from migrationd.transport.channel import Channel
from migrationd.transport.tls import start_tls_client, start_tls_server
from tests.support.certificates import (
    Pair,
    make_authority,
    make_directory,
    make_leaf,
    make_revocations,
    write_directory,
)

ROOT = make_authority("root")
OTHER = make_authority("other")
MIDDLE = make_authority("middle", ROOT)
OF_ROOT = make_leaf(ROOT, "client", is_server=False)
OF_MIDDLE = make_leaf(MIDDLE, "client", is_server=False)
EXPIRED = "cannot be checked: the revocation list has expired"


async def why_refused(
    path: Path, client: tuple[Pair, ...], trusted: tuple[Pair, ...], revocations: bytes | None
) -> str | None:
    """What a server says of a client with this chain; None lets it in."""
    there = write_directory(path / "client", ROOT, client=client[0])
    (there / "client-cert.pem").write_bytes(_pem(*client))
    here = write_directory(path / "server", ROOT, server=make_leaf(ROOT, "server", is_server=True))
    if revocations is not None:
        (here / "ca-crl.pem").write_bytes(revocations)
    (here / "ca-cert.pem").write_bytes(_pem(*trusted))
    registry = ObjectRegistry()
    off = {"sanity-check": False}
    registry.add("tls-creds-x509", "client", {"dir": str(there), **off})
    registry.add("tls-creds-x509", "server", {"dir": str(here), "endpoint": "server", **off})
    one, other = (Channel(sock.detach()) for sock in socket.socketpair())
    results = await asyncio.gather(
        start_tls_client(one, registry.tls_client("client", None), "localhost", "here"),
        start_tls_server(other, registry.tls_server("server", None), "there"),
        return_exceptions=True,
    )
    for result in results:
        if isinstance(result, Channel):
            result.close()
    if isinstance(results[1], MigrationdError):
        return str(results[1])
    assert isinstance(results[1], Channel), results
    return None


def _pem(*pairs: Pair) -> bytes:
    return b"".join(pair.certificate.public_bytes(Encoding.PEM) for pair in pairs)


@pytest.mark.parametrize(
    ("client", "trusted", "revocations", "expected"),
    [
        ((OF_ROOT,), (ROOT,), None, None),
        ((OF_ROOT,), (ROOT,), make_revocations(ROOT, (OF_MIDDLE,)), None),
        ((OF_ROOT,), (ROOT,), make_revocations(ROOT, (OF_ROOT,)), "client was revoked"),
        # An authority without a list has revoked nothing.
        ((OF_ROOT,), (ROOT, OTHER), make_revocations(OTHER), None),
        ((OF_MIDDLE, MIDDLE), (ROOT,), make_revocations(ROOT), None),
        (
            (OF_MIDDLE, MIDDLE),
            (ROOT,),
            make_revocations(MIDDLE, (OF_MIDDLE,)),
            "client was revoked",
        ),
        ((OF_MIDDLE, MIDDLE), (ROOT,), make_revocations(ROOT, (MIDDLE,)), "middle was revoked"),
        (
            (OF_MIDDLE, MIDDLE),
            (ROOT,),
            make_revocations(MIDDLE) + make_revocations(ROOT, (MIDDLE,)),
            "middle was revoked",
        ),
        ((OF_ROOT,), (ROOT,), make_revocations(ROOT, days=(-2, -1)), f"client {EXPIRED}"),
        # Trust in an authority does not need trust in who vouches for it.
        ((OF_MIDDLE,), (MIDDLE,), None, None),
        ((OF_MIDDLE, MIDDLE), (MIDDLE,), None, None),
        ((OF_ROOT,), (MIDDLE,), None, "client comes from an authority that is not in"),
    ],
)
async def test_chains(
    client: tuple[Pair, ...],
    trusted: tuple[Pair, ...],
    revocations: bytes | None,
    expected: str | None,
    tmp_path: Path,
) -> None:
    reason = await why_refused(tmp_path, client, trusted, revocations)
    if expected is None:
        assert reason is None
    else:
        name, _, rest = expected.partition(" ")
        text = f"TLS handshake failed with there: certificate 'CN={name},O=migrationd tests' {rest}"
        assert reason is not None
        assert reason.startswith(text)


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN X509 CRL-----\nAA\n-----END X509 CRL-----\n"]
)
def test_a_file_without_a_list_is_refused(content: bytes, tmp_path: Path) -> None:
    directory = make_directory(tmp_path)
    (directory / "ca-crl.pem").write_bytes(content)
    with pytest.raises(ObjectError, match=r"^Unable to import CRL .*/ca-crl\.pem$"):
        ObjectRegistry().add("tls-creds-x509", "x", {"dir": str(directory)})


@pytest.mark.parametrize("chain", [[], [b"\x30\x00"]])
def test_what_cannot_be_checked_is_refused(chain: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "ca-crl.pem"
    path.write_bytes(make_revocations(ROOT))
    reason = Revocations(str(path)).why_refused(chain)
    assert reason is not None
    assert "cannot be checked for revocation" in reason
