"""Commands of postcopy and the received-page bitmap."""

import numpy as np
import pytest

from migrationd.codec import postcopy
from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.command import decode_command
from migrationd.codec.package import decode_package
from migrationd.codec.records import Command
from migrationd.errors import StreamCorrupt


def commands(wire: bytes) -> list[Command]:
    buffer = ReadBuffer(len(wire), len(wire), 0)
    buffer.feed(wire)
    found = []
    while len(buffer):
        found.append(decode_command(buffer))
    return found


def test_advise_as_qemu_sends_it() -> None:
    wire = postcopy.encode_advise([4096, 4096], 4096)
    assert wire.hex() == "0800030010" + "0000000000001000" * 2
    (command,) = commands(wire)
    assert postcopy.decode_advise(command.payload) == postcopy.Advise(4096, 4096)


def test_advise_of_huge_pages_is_a_summary() -> None:
    (command,) = commands(postcopy.encode_advise([4096, 2 << 20, 2 << 20], 4096))
    assert postcopy.decode_advise(command.payload) == postcopy.Advise(0x201000, 4096)


def test_advise_without_ram() -> None:
    assert postcopy.decode_advise(b"") is None


@pytest.mark.parametrize("payload", ["00" * 15, "00" * 16, "0000000000001000" + "00000000000000ff"])
def test_bad_advise(payload: str) -> None:
    with pytest.raises(StreamCorrupt, match="ADVISE"):
        postcopy.decode_advise(bytes.fromhex(payload))


def test_discard_as_qemu_sends_it() -> None:
    wire = postcopy.encode_discards("pc.ram", np.array([[1, 0xFF]]), 4096)
    assert wire.hex() == "0800060019" + "0006" + b"pc.ram".hex() + "00" + (
        "0000000000001000" + "00000000000ff000"
    )
    (command,) = commands(wire)
    discard = postcopy.decode_discard(command.payload)
    assert (discard.idstr, discard.ranges.tolist()) == ("pc.ram", [[0x1000, 0xFF000]])


def test_discards_are_split_and_nothing_is_lost() -> None:
    ranges = np.array([[2 * i, 1] for i in range(30)])
    found = [postcopy.decode_discard(c.payload) for c in commands(
        postcopy.encode_discards("m", ranges, 4096))]  # fmt: skip
    assert [len(discard.ranges) for discard in found] == [12, 12, 6]
    flat = [pair for discard in found for pair in discard.ranges.tolist()]
    assert flat == [[2 * i * 4096, 4096] for i in range(30)]
    assert len(commands(postcopy.encode_discards("m", ranges, 4096, 2048))) == 1


def test_nothing_to_discard_is_no_command() -> None:
    assert postcopy.encode_discards("m", np.empty((0, 2), np.int64), 4096) == b""


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0",
        b"\1\1m\0" + bytes(16),
        b"\0\0\0" + bytes(16),
        b"\0\1m\1" + bytes(16),
        b"\0\1m\0",
        b"\0\1m\0" + bytes(15),
        b"\0\xffm\0" + bytes(16),
    ],
)
def test_bad_discard(payload: bytes) -> None:
    with pytest.raises(StreamCorrupt, match="RAM_DISCARD"):
        postcopy.decode_discard(payload)


def test_a_package_decodes() -> None:
    body = postcopy.encode_listen() + postcopy.encode_ping(0x42) + postcopy.encode_run()
    wire = postcopy.encode_packaged(body)
    assert wire[:9].hex() == "0800070004" + f"{len(body):08x}"
    package = decode_package(wire[9:], position=9, has_footers=True)
    assert [r.number for r in package.records if isinstance(r, Command)] == [4, 2, 5]


def test_recovery_commands_as_qemu_sends_them() -> None:
    assert postcopy.encode_recv_bitmap("pc.ram").hex() == "08000a0007" + "06" + b"pc.ram".hex()
    assert postcopy.encode_resume().hex() == "0800090000"
    assert postcopy.decode_recv_bitmap(b"\6pc.ram") == "pc.ram"
    for payload in (b"", b"\0", b"\2a", b"\1ab"):
        with pytest.raises(StreamCorrupt, match="RECV_BITMAP"):
            postcopy.decode_recv_bitmap(payload)


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (64, 8), (65, 16), (256, 32)])
def test_bitmap_there_and_back(pages: int, size: int) -> None:
    received = np.random.default_rng(pages).random(pages) < 0.5
    packed = postcopy.pack_received(received)
    assert len(packed) == size == postcopy.bitmap_bytes(pages)
    assert np.array_equal(postcopy.unpack_received("m", packed, pages), received)
    first = [bool(packed[i // 8] >> (i % 8) & 1) for i in range(pages)]
    assert first == received.tolist()


def test_bitmap_of_the_wrong_size() -> None:
    with pytest.raises(StreamCorrupt, match="16 bytes for 64 pages"):
        postcopy.unpack_received("m", bytes(16), 64)
