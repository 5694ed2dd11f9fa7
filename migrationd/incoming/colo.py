"""COLO, the secondary's side: a parked replica that follows a guest which runs elsewhere.

A checkpoint is staged as the bytes that came, and looked through to its end; only when it is
whole does it change the replica. So the replica is that of the last whole checkpoint,
whenever its primary is lost.

Reference: stream format 6.8.
"""

import logging
from collections import Counter
from collections.abc import Iterator

from migrationd.codec.colo import (
    MESSAGE_BYTES,
    SIZE_BYTES,
    ColoMessage,
    encode_message,
    name_of,
)
from migrationd.codec.constants import MIG_CMD_SWITCHOVER_START, QEMU_VM_SECTION_FULL
from migrationd.codec.records import (
    Command,
    EndOfStream,
    MixedBatch,
    OpaqueSection,
    PageBatch,
    RamEos,
    Record,
    SectionFooter,
    SectionHeader,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder
from migrationd.codec.vmdescription import device_sizes
from migrationd.errors import (
    ChannelClosed,
    StreamCorrupt,
    StreamLimit,
    StreamTruncated,
    StreamUnsupported,
)
from migrationd.guest.device import DeviceState
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.run_state import GLOBAL_STATE
from migrationd.incoming.pages import check_fill, place_record
from migrationd.transport.channel import Channel

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10
DEVICE_LIMIT_BYTES = 256 << 20
STAGE_SLACK_BYTES = 64 << 20
"""A checkpoint may have this much, and its guest's RAM, as its RAM sections."""

Pages = PageBatch | MixedBatch | ZeroBatch
_PLACED = (PageBatch, MixedBatch, ZeroBatch)
_PASSED_OVER = (SectionHeader, SectionFooter, RamEos, EndOfStream)


class Replica:
    """Follows one primary; :meth:`follow` blocks, on the loading thread.

    Args:
        channel: The connection, behind the description of the first stream.
        guest: The replica, whole.
        decoder: Of the first stream.

    Attributes:
        checkpoints: Whole ones that came.
    """

    def __init__(
        self,
        channel: Channel,
        guest: ParkedGuest,
        decoder: StreamDecoder,
    ) -> None:
        self._channel = channel
        self._guest = guest
        self._decoder = decoder
        self._ahead = bytearray()
        self._limit = guest.ram_bytes + guest.ram_bytes // 256 + STAGE_SLACK_BYTES
        self.checkpoints = 0

    def follow(self) -> None:
        """Take checkpoint after checkpoint.

        Raises:
            ChannelError: The primary is gone, or the channel was shut down.
            StreamError: What it sends is no checkpoint; the replica is as it was.
        """
        self._say(ColoMessage.CHECKPOINT_READY)
        while True:
            self._expect(ColoMessage.CHECKPOINT_REQUEST)
            self._say(ColoMessage.CHECKPOINT_REPLY)
            self._expect(ColoMessage.VMSTATE_SEND)
            staged, after = self._stage()
            self._expect(ColoMessage.VMSTATE_SIZE)
            devices = self._devices(after)
            self._say(ColoMessage.VMSTATE_RECEIVED)
            self._commit(staged, devices)
            self._decoder = after
            self.checkpoints += 1
            self._say(ColoMessage.VMSTATE_LOADED)

    def _stage(self) -> tuple[bytes, StreamDecoder]:
        """RAM sections, checked to their end, and the decoder that has seen them."""
        decoder = self._decoder.checkpoint()
        staged = bytearray()
        while True:
            while (record := decoder.next_record()) is not None:
                self._check(record, decoder)
            if decoder.finished:
                break
            chunk = self._take() or self._receive()
            if len(staged) + len(chunk) > self._limit:
                raise StreamLimit(
                    f"a checkpoint of more than {self._limit} bytes", position=decoder.position
                )
            staged += chunk
            decoder.feed(chunk)
        used = decoder.position
        self._ahead = staged[used:] + self._ahead
        return bytes(memoryview(staged)[:used]), decoder

    def _check(self, record: Record, decoder: StreamDecoder) -> None:
        """Whether a record may be in a checkpoint, and can be placed once all of it is there."""
        if isinstance(record, ZeroBatch):
            check_fill(record, decoder.position, self._guest.ram[record.block].idstr)
        is_switchover = isinstance(record, Command) and record.number == MIG_CMD_SWITCHOVER_START
        if not is_switchover and not isinstance(record, _PLACED + _PASSED_OVER):
            raise StreamUnsupported(
                f"{type(record).__name__} in a checkpoint",
                position=decoder.position,
                section="COLO",
            )

    def _devices(self, after: StreamDecoder) -> list[DeviceState]:
        size = int.from_bytes(self._read(SIZE_BYTES), "big")
        if size > DEVICE_LIMIT_BYTES:
            raise StreamLimit(f"{size} bytes of devices", section="COLO")
        decoder = after.checkpoint()
        body = self._read(size)
        devices = []
        for record in _records(decoder, body):
            if isinstance(record, OpaqueSection) and record.kind == QEMU_VM_SECTION_FULL:
                devices.append(DeviceState.of_section(record, in_setup=False))
            elif not isinstance(record, EndOfStream):
                raise StreamCorrupt(
                    f"{type(record).__name__} among the devices", position=decoder.position
                )
        if not decoder.finished or decoder.position != size:
            raise StreamTruncated(
                f"the devices are not {size} bytes", position=decoder.position, section="COLO"
            )
        self._check_devices(devices)
        return devices

    def _check_devices(self, devices: list[DeviceState]) -> None:
        """All that the guest has, each once; whether the run state travels depends on it."""
        keys = [(device.idstr, device.instance_id) for device in devices]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise StreamCorrupt(f"{_named(twice[0])} came twice", section="COLO")
        for device in self._guest.devices:
            key = (device.idstr, device.instance_id)
            if device.is_device and key not in keys and device.idstr != GLOBAL_STATE:
                raise StreamCorrupt(f"the checkpoint lacks {_named(key)}", section="COLO")

    def _commit(self, staged: bytes, devices: list[DeviceState]) -> None:
        """Make the checkpoint the replica's state; nothing here waits for anybody."""
        guest = self._guest
        decoder = self._decoder.checkpoint()
        for record in _records(decoder, staged):
            if isinstance(record, _PLACED):
                place_record(guest.ram[record.block], record, decoder.position)
        kept = [device for device in guest.devices if not device.is_device]
        guest.complete([*kept, *devices], _still_true(guest, devices), guest.seen)

    def _say(self, message: ColoMessage) -> None:
        self._channel.send(encode_message(message))

    def _expect(self, message: ColoMessage) -> None:
        number = int.from_bytes(self._read(MESSAGE_BYTES), "big")
        if number != message:
            raise StreamCorrupt(
                f"the primary says {name_of(number)}, not {message.name}", section="COLO"
            )

    def _take(self) -> bytes:
        """What was received ahead."""
        ahead, self._ahead = bytes(self._ahead[:CHUNK_BYTES]), self._ahead[CHUNK_BYTES:]
        return ahead

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            data += self._take() or self._receive()
        self._ahead = data[size:] + self._ahead
        return bytes(data[:size])

    def _receive(self) -> bytes:
        """Some bytes; waits for the first as long as it takes."""
        view = bytearray(CHUNK_BYTES)
        count = self._channel.recv_into(memoryview(view), None)
        if not count:
            raise ChannelClosed("the primary closed the connection")
        return bytes(memoryview(view)[:count])


def _named(key: tuple[str, int]) -> str:
    return "device '{}' instance {}".format(*key)


def _records(decoder: StreamDecoder, data: bytes) -> Iterator[Record]:
    """All records of these bytes."""
    for start in range(0, len(data), CHUNK_BYTES):
        decoder.feed(memoryview(data)[start : start + CHUNK_BYTES])
        if start + CHUNK_BYTES >= len(data):
            decoder.feed_eof()
        while (record := decoder.next_record()) is not None:
            yield record


def _still_true(guest: ParkedGuest, devices: list[DeviceState]) -> bytes | None:
    """The description of the first stream, as long as it says what devices are like now."""
    description = guest.vmdescription
    if description is None:
        return None
    try:
        said = {(size.idstr, size.instance_id): size.size for size in device_sizes(description)}
    except ValueError:
        return description
    is_true = all(
        said.get((item.idstr, item.instance_id), len(item.body)) == len(item.body)
        for item in devices
    )
    return description if is_true else b"{}"
