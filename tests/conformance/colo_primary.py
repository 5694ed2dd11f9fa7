"""A COLO primary that says what it is told to say, and a replica of a recorded guest."""

import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from migrationd.codec.records import (
    MixedBatch,
    OpaqueSection,
    PageBatch,
    RamBlockList,
    VmDescription,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder
from migrationd.daemon.shelter import MemoryBerth
from migrationd.errors import ChannelClosed, MigrationdError
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.incoming.arrival import specs_of
from migrationd.incoming.colo import Replica
from migrationd.incoming.pages import place_record
from tests.conformance.captures import all_captures

PAGE = 4096
REQUEST, SEND, SIZE = (number.to_bytes(4, "big") for number in (1, 3, 4))
READY, REPLY, RECEIVED, LOADED = (number.to_bytes(4, "big") for number in (0, 2, 5, 6))
RAM_ID = 2
"""Section id of RAM in the recorded stream."""

State = tuple[bytes, tuple[DeviceState, ...]]


@cache
def recorded() -> tuple[bytes, bytes, bytes]:
    """What QEMU 7.2 sent: its first stream, one checkpoint behind it; and what it was told."""
    files = {capture.name: capture.data() for capture in all_captures()}
    sent, said = files["72-colo-pc.c0.fwd"], files["72-colo-pc.c0.back"]
    first, mark, rest = sent.partition(REQUEST + SEND)
    return first, mark + rest, said


def recorded_devices() -> bytes:
    """The devices of the recorded checkpoint."""
    return recorded()[1].partition(b"\x7e" + RAM_ID.to_bytes(4, "big") + b"\0" + SIZE)[2][8:]


def pages(*content: tuple[int, bytes], block: str = "pc.ram") -> bytes:
    """Records of pages; one byte is a page filled with it."""
    records = []
    for page, data in content:
        is_fill = len(data) == 1
        word = page * PAGE | (0x02 if is_fill else 0x08)
        records.append(struct.pack(">QB", word, len(block)) + block.encode() + data)
    return b"".join(records)


def checkpoint(records: bytes = b"", devices: bytes | None = None) -> bytes:
    """All that a primary says for one, if it is answered."""
    body = recorded_devices() if devices is None else devices
    section = RAM_ID.to_bytes(4, "big")
    end = (0x10).to_bytes(8, "big") + b"\x7e" + section + b"\0"
    ram = b"\x03" + section + records + end
    return REQUEST + SEND + ram + SIZE + len(body).to_bytes(8, "big") + body


def device(idstr: str, body: bytes, *, number: int = 0, version: int = 2) -> bytes:
    """A FULL section."""
    head = struct.pack(">BIB", 4, 0, len(idstr)) + idstr.encode()
    return head + struct.pack(">II", number, version) + body + b"\x7e" + bytes(4)


class Script:
    """A channel: everything was said already, and then it is closed.

    Args:
        said: By the primary.
        on_loaded: Called when the replica says that a checkpoint is loaded.
        piece: Longest part that arrives at once.
    """

    def __init__(self, said: bytes, on_loaded: Callable[[], None], piece: int = 1 << 20) -> None:
        self._left = memoryview(said)
        self._on_loaded = on_loaded
        self._piece = piece
        self.answers = bytearray()

    def recv_into(self, view: memoryview, timeout_s: float | None) -> int:
        """See the channel."""
        part = self._left[: min(len(view), self._piece)]
        view[: len(part)] = part
        self._left = self._left[len(part) :]
        return len(part)

    def send(self, data: bytes) -> None:
        """See the channel."""
        self.answers += data
        if data == LOADED:
            self._on_loaded()


@cache
def _first() -> tuple[StreamDecoder, ParkedGuest]:
    decoder = StreamDecoder()
    decoder.feed(recorded()[0])
    decoder.feed_eof()
    guest: ParkedGuest | None = None
    devices: list[DeviceState] = []
    description = b""
    while (record := decoder.next_record()) is not None:
        match record:
            case RamBlockList():
                identity = GuestIdentity("pc-i440fx-7.2")
                guest = MemoryBerth().allocate(identity, (), specs_of(record, PAGE))
            case PageBatch() | MixedBatch() | ZeroBatch():
                assert guest is not None
                place_record(guest.ram[record.block], record, decoder.position)
            case OpaqueSection():
                devices.append(DeviceState.of_section(record, in_setup=False))
            case VmDescription():
                description = record.json
    assert guest is not None
    guest.complete(devices, description, SeenOnArrival())
    return decoder, guest


class Secondary:
    """A replica of the recorded guest, and what it was after its last whole checkpoint.

    Attributes:
        guest: The replica.
        answers: What it said.
    """

    def __init__(self) -> None:
        self._decoder, origin = _first()
        specs = [RamBlockSpec(item.idstr, item.used_length, PAGE) for item in origin.ram]
        self.guest = MemoryBerth().allocate(origin.identity, (), specs)
        for block, other in zip(self.guest.ram, origin.ram, strict=True):
            held = np.flatnonzero(other.present)
            block.place_batch(held, other.memory.view.reshape(-1, PAGE)[held], False)
        self.guest.complete(origin.devices, origin.vmdescription, origin.seen)
        self.whole = self.state()
        self.answers = b""

    def state(self) -> State:
        """All that a guest started from it would see."""
        ram = b"".join(block.memory.view.tobytes() for block in self.guest.ram)
        return ram, self.guest.devices

    def follow(self, said: bytes, piece: int = 1 << 20) -> MigrationdError:
        """Let a primary say this and close.

        Returns:
            What ended it; the replica is that of the last whole checkpoint then.
        """

        def loaded() -> None:
            self.whole = self.state()

        script = Script(said, loaded, piece)
        replica = Replica(script, self.guest, self._decoder)  # type: ignore[arg-type]
        with pytest.raises(MigrationdError) as ended:
            replica.follow()
        self.answers = bytes(script.answers)
        assert replica.checkpoints == self.answers.count(LOADED)
        assert self.state() == self.whole, "half of a checkpoint is in the replica"
        return ended.value

    def follow_to_the_end(self, said: bytes, piece: int = 1 << 20) -> None:
        """As :meth:`follow`; the primary does nothing wrong before it closes."""
        error = self.follow(said, piece)
        assert isinstance(error, ChannelClosed), error

    def close(self) -> None:
        """Release its memory."""
        self.guest.close()
