"""multifd: the hello of a channel and the header of a packet.

    hello   be32 magic  be32 version  uuid[16]  u8 id  39 x 0                      64 bytes
    packet  be32 magic  be32 version  be32 flags  be32 pages_alloc  be32 normal_pages
            be32 next_packet_size  be64 packet_num  be32 zero_pages  28 x 0
            ramblock[256], NUL padded  be64 offset x P                     320 + 8 P bytes
            next_packet_size bytes of page data, only if normal_pages > 0

P is the number of target pages in 512 KiB. The offsets of the normal pages come first, then
those of the zero pages. A SYNC packet of 7.2 may carry pages, its next_packet_size is stale
when it carries none; since 9.0 it carries nothing.

Reference: stream format 3.1-3.3.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from migrationd.errors import StreamCorrupt, StreamUnsupported

MULTIFD_MAGIC = 0x11223344
MULTIFD_VERSION = 1
MULTIFD_PACKET_BYTES = 512 << 10
"""Page data of one packet, before compression."""

MULTIFD_FLAG_SYNC = 0x01
MULTIFD_FLAG_DEVICE_STATE = 0x40
MULTIFD_METHOD_MASK = 0x3E
MULTIFD_METHODS: dict[str, int] = {"none": 0x00, "zlib": 0x02, "zstd": 0x04}
"""Method bits of each ``multifd-compression`` that is built."""

HELLO_BYTES = 64
FIXED_BYTES = 320
"""Of a packet header, before the offsets."""

COMPRESSED_LIMIT_BYTES = 1 << 20
"""Most compressed bytes of one packet: QEMU's receive buffer."""

_NUMBER_AT, _NUMBER_END = 24, 32
_NAME_AT, _NAME_BYTES = 64, 256
_AHEAD_PACKETS = 16
_hello = struct.Struct(">II16sB39x")
_fixed = struct.Struct(">IIIIIIQI28x")
_unpack_offset = struct.Struct(">Q").unpack_from
_METHOD_NAMES = {0x02: "zlib", 0x04: "zstd", 0x08: "qpl", 0x10: "uadk", 0x20: "qatzip"}


@dataclass(frozen=True, slots=True)
class Hello:
    """What a channel begins with.

    Attributes:
        channel: Its number, from 0.
        uuid: The source's UUID, 16 bytes; all zero when it has none.
    """

    channel: int
    uuid: bytes


def encode_hello(hello: Hello) -> bytes:
    """The first 64 bytes of a channel."""
    return _hello.pack(MULTIFD_MAGIC, MULTIFD_VERSION, hello.uuid, hello.channel)


def decode_hello(data: bytes) -> Hello:
    """Read a hello.

    Args:
        data: 64 bytes.

    Raises:
        StreamCorrupt: Wrong magic.
        StreamUnsupported: Another version.
    """
    magic, version, uuid, channel = _hello.unpack(data)
    if magic != MULTIFD_MAGIC:
        raise StreamCorrupt(
            f"received packet magic {magic:x} and expected magic {MULTIFD_MAGIC:x}",
            section="multifd",
        )
    if version != MULTIFD_VERSION:
        raise StreamUnsupported(
            f"received packet version {version} and expected version {MULTIFD_VERSION}",
            section="multifd",
        )
    return Hello(channel, uuid)


def packet_pages(page_size: int) -> int:
    """Most pages of one packet."""
    return max(1, MULTIFD_PACKET_BYTES // page_size)


def header_bytes(page_size: int) -> int:
    """Size of a packet header; the same for all packets."""
    return FIXED_BYTES + 8 * packet_pages(page_size)


class Packet(NamedTuple):
    """A packet header; its lengths were checked, its offsets not.

    Attributes:
        is_sync: Whether the channel waits behind this packet.
        method: Method bits.
        normal_pages: Pages whose contents follow.
        zero_pages: Zero pages that are listed.
        data_bytes: Bytes that follow.
        ramblock: Raw name of the block, 256 bytes with its padding.
    """

    is_sync: bool
    method: int
    normal_pages: int
    zero_pages: int
    data_bytes: int
    ramblock: bytes


class PacketDecoder:
    """Reads packet headers of one channel.

    Args:
        channel: Number of the channel, for errors.
        page_size: Target page size in bytes.
        method: What the pages must be compressed with: a key of :data:`MULTIFD_METHODS`.
    """

    def __init__(self, channel: int, page_size: int, method: str) -> None:
        self._channel = channel
        self._page_size = page_size
        self._pages = packet_pages(page_size)
        self._method = MULTIFD_METHODS[method]
        self._method_name = method
        self._steps = np.arange(_AHEAD_PACKETS * self._pages) * page_size
        self._offset_shift = page_size.bit_length() - 1 - 3
        self._ahead_start = self._ahead_end = 0
        self._ahead = b""
        self._last: Packet | None = None
        self._last_begin = self._last_rest = b""
        self.header_bytes = header_bytes(page_size)

    def decode(self, header: bytes | bytearray | memoryview) -> Packet:
        """Read a header of :attr:`header_bytes` bytes.

        Most differ from the one before in their number and offsets alone: a bytearray, whose
        parts are compared as a whole, is read in a sixth of the time.

        Raises:
            StreamCorrupt: The header contradicts the format or the settings.
            StreamUnsupported: A packet that carries device state.
        """
        if self._last is not None and (
            header[_NUMBER_END:FIXED_BYTES] == self._last_rest
            and header[:_NUMBER_AT] == self._last_begin
        ):
            return self._last
        self._last = self._decode(header)
        self._last_begin = bytes(header[:_NUMBER_AT])
        self._last_rest = bytes(header[_NUMBER_END:FIXED_BYTES])
        return self._last

    def _decode(self, header: bytes | bytearray | memoryview) -> Packet:
        magic, version, flags, allocated, normal, size, _, zero = _fixed.unpack_from(header)
        if magic != MULTIFD_MAGIC or version != MULTIFD_VERSION:
            raise self._corrupt(f"packet with magic {magic:#x}, version {version}")
        if flags & MULTIFD_FLAG_DEVICE_STATE:
            raise StreamUnsupported(
                "device state in a multifd packet is not taken",
                section=self._name,
                hint="turn the device's x-migration-multifd-transfer off at the source",
            )
        method = flags & MULTIFD_METHOD_MASK
        if flags & ~(MULTIFD_FLAG_SYNC | MULTIFD_METHOD_MASK):
            raise self._corrupt(f"packet with flags {flags:#x}")
        if allocated > self._pages:
            raise self._corrupt(f"packet for {allocated} pages, the most are {self._pages}")
        if normal + zero > allocated:
            raise self._corrupt(f"packet with {normal} + {zero} pages of {allocated}")
        if (normal or zero or method) and method != self._method:
            # 7.2 writes no method into a packet without pages, 9.0 writes it into all with some.
            raise self._corrupt(
                f"packet compressed with {_METHOD_NAMES.get(method, 'none')!r}, "
                f"multifd-compression is {self._method_name!r}",
                "set the same multifd-compression at both ends",
            )
        if normal:
            self._check_size(normal, size)
        return Packet(
            is_sync=bool(flags & MULTIFD_FLAG_SYNC),
            method=method,
            normal_pages=normal,
            zero_pages=zero,
            data_bytes=size if normal else 0,
            ramblock=bytes(header[_NAME_AT : _NAME_AT + _NAME_BYTES]),
        )

    def run(self, header: bytes | bytearray | memoryview, packet: Packet, used_length: int) -> int:
        """First page of a packet of consecutive normal pages: what most packets are.

        Args:
            header: What :meth:`decode` read.
            packet: What it gave.
            used_length: Bytes of the block.

        Returns:
            The page number; -1 where :meth:`offsets` has to look.
        """
        count = packet.normal_pages
        if packet.zero_pages or not count:
            return -1
        first: int = _unpack_offset(header, FIXED_BYTES)[0]
        end = first + count * self._page_size
        if first & (self._page_size - 1) or end > used_length:
            return -1
        if first < self._ahead_start or end > self._ahead_end:
            self._look_ahead(first)
        at = (first - self._ahead_start) >> self._offset_shift
        if header[FIXED_BYTES : FIXED_BYTES + 8 * count] != self._ahead[at : at + 8 * count]:
            return -1
        return first // self._page_size

    def _look_ahead(self, first: int) -> None:
        """Make the offsets of the next packets at once: as bytes they are soon compared."""
        self._ahead = (self._steps + first).astype(">u8").tobytes()
        self._ahead_start = first
        self._ahead_end = first + len(self._steps) * self._page_size

    def offsets(
        self, header: bytes | bytearray | memoryview, packet: Packet, used_length: int, block: str
    ) -> npt.NDArray[np.int64]:
        """Page numbers of a packet: the normal pages, then the zero pages.

        Args:
            header: What :meth:`decode` read.
            packet: What it gave.
            used_length: Bytes of the block.
            block: Its name, for errors.

        Returns:
            Shape ``(normal_pages + zero_pages,)``.

        Raises:
            StreamCorrupt: A page lies outside the block or between pages.
        """
        count = packet.normal_pages + packet.zero_pages
        raw = np.frombuffer(header, ">u8", count, FIXED_BYTES).astype(np.uint64)
        if count and (
            int(raw.max()) > used_length - self._page_size
            or int(np.bitwise_or.reduce(raw)) & (self._page_size - 1)
        ):
            mask = np.uint64(self._page_size - 1)
            wrong = raw[(raw > np.uint64(used_length - self._page_size)) | ((raw & mask) != 0)]
            raise StreamCorrupt(
                f"page at {int(wrong[0]):#x} is not one of the block of {used_length:#x} bytes",
                section=self._name,
                block=block,
            )
        return (raw // np.uint64(self._page_size)).astype(np.int64)

    @property
    def _name(self) -> str:
        return f"multifd channel {self._channel}"

    def _check_size(self, normal: int, size: int) -> None:
        plain = normal * self._page_size
        if self._method == MULTIFD_METHODS["none"]:
            if size != plain:
                raise self._corrupt(f"packet with {size} bytes for {normal} pages")
        elif not 0 < size <= COMPRESSED_LIMIT_BYTES:
            raise self._corrupt(f"packet with {size} compressed bytes for {normal} pages")

    def _corrupt(self, message: str, hint: str | None = None) -> StreamCorrupt:
        return StreamCorrupt(message, section=self._name, hint=hint)


def carries_pages(header: bytes) -> bool:
    """Whether the beginning of a packet, at least :data:`FIXED_BYTES`, announces pages."""
    _, _, _, _, normal, _, _, zero = _fixed.unpack_from(header)
    return bool(normal or zero)


def block_name(ramblock: bytes) -> str:
    """Name of a block out of its 256 padded bytes."""
    return ramblock.split(b"\0", 1)[0].decode("latin-1")


class PacketEncoder:
    """Writes packet headers of one channel.

    Args:
        page_size: Target page size in bytes.
        method: Key of :data:`MULTIFD_METHODS`.
    """

    def __init__(self, page_size: int, method: str) -> None:
        self._page_size = page_size
        self._pages = packet_pages(page_size)
        self._method = MULTIFD_METHODS[method]
        self._last: tuple[str, int, bool] | None = None
        self._headers = np.empty((0, 0), np.uint8)
        self._sizes = self._headers
        self.header_bytes = header_bytes(page_size)

    def headers(
        self, block: str, pages: npt.NDArray[np.int64], first_number: int, *, is_zero: bool
    ) -> npt.NDArray[np.uint8]:
        """Headers of full packets and a rest, of pages that are alike.

        Args:
            block: RAM block of all pages.
            pages: Page numbers, shape ``(n,)``, n at least 1.
            first_number: Packet number of the first one.
            is_zero: Whether they are zero pages that are only listed.

        Returns:
            Shape ``(packets, header bytes)``, contiguous; holds until the next call.
            next_packet_size is that of plain pages.
        """
        count = len(pages)
        if self._last != (block, count, is_zero):
            self._headers = self._make(block, count, is_zero)
            self._last = (block, count, is_zero)
        out = self._headers
        packets = len(out)
        numbers = out[:, 24:32].view(">u8")
        numbers[:, 0] = np.arange(first_number, first_number + packets)
        if self._method:
            # Somebody may have written the size of compressed data into it.
            out[:, 20:24] = self._sizes
        offsets = out[:, FIXED_BYTES:].view(">u8")
        if count == packets * self._pages:
            offsets[:] = (pages * self._page_size).reshape(packets, self._pages)
        else:
            padded = np.zeros(packets * self._pages, np.int64)
            padded[:count] = pages * self._page_size
            offsets[:] = padded.reshape(packets, self._pages)
        return out

    def _make(self, block: str, count: int, is_zero: bool) -> npt.NDArray[np.uint8]:
        """Headers with all that does not change from batch to batch."""
        packets = -(-count // self._pages)
        out = np.zeros((packets, self.header_bytes), np.uint8)
        name = block.encode("latin-1")
        counts = np.full(packets, self._pages)
        counts[-1] = count - (packets - 1) * self._pages
        fixed = out[:, :40].view(">u4")
        fixed[:, 0] = MULTIFD_MAGIC
        fixed[:, 1] = MULTIFD_VERSION
        fixed[:, 2] = self._method
        fixed[:, 3] = self._pages
        fixed[:, 8 if is_zero else 4] = counts
        if not is_zero:
            fixed[:, 5] = counts * self._page_size
        out[:, _NAME_AT : _NAME_AT + len(name)] = np.frombuffer(name, np.uint8)
        self._sizes = out[:, 20:24].copy()
        return out

    def sync(self, number: int) -> bytes:
        """A SYNC packet without pages."""
        head = _fixed.pack(MULTIFD_MAGIC, MULTIFD_VERSION, MULTIFD_FLAG_SYNC, 0, 0, 0, number, 0)
        return head.ljust(self.header_bytes, b"\0")


def set_data_bytes(header: npt.NDArray[np.uint8], size: int) -> None:
    """Change next_packet_size of one header, shape ``(header bytes,)``."""
    header[20:24] = np.frombuffer(size.to_bytes(4, "big"), np.uint8)
