"""State of cpr-transfer: which descriptors pass from a source to its destination.

    be32 magic  be32 version 1
    { 01  be32 n, n bytes: name and NUL  be32 id  20 }*  00
    subsections: { 05  cstr8 name  be32 version  body }*

The byte ``20`` of each entry carries the entry's descriptor, so that the state is sent in
pieces: what lies between two such bytes goes without one. A body has no length: what
follows the list is kept as it came, and only this program's own subsection is read.

Reference: stream format 6.10.
"""

from dataclasses import dataclass

from migrationd.errors import StreamCorrupt, StreamLimit, StreamTruncated, StreamUnsupported

CPR_MAGIC = 0x51435052
CPR_VERSION = 1
FD_MARK = b" "
"""The byte that carries a descriptor."""

CPR_LIMIT_BYTES = 1 << 20
"""Longest state that is taken."""

ENTRY_LIMIT = 1024
"""Most descriptors of one state."""

WORKLOAD_SUBSECTION = "CprState/migrationd"
"""Ours: be32 n and n bytes, with which a workload's destination refuses what does not fit."""

_NAME_LIMIT = 1024
_MORE, _END, _SUBSECTION = 1, 0, 5
_NO_VFIO_DEVICES = b"\x05\x15CprState/vfio devices\x00\x00\x00\x01\x00"


@dataclass(frozen=True, slots=True)
class CprEntry:
    """One descriptor.

    Attributes:
        name: What it is of: a RAM block's idstr, or a device's.
        number: Tells several of one name apart; signed.
    """

    name: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class CprState:
    """What goes over the cpr channel.

    Attributes:
        entries: One for each descriptor, in the order of the descriptors.
        tail: What follows the list, as it came.
    """

    entries: tuple[CprEntry, ...]
    tail: bytes = b""

    @property
    def plain_tail(self) -> bytes:
        """The tail without the empty list of devices, which QEMU 10.0 does not know."""
        return self.tail.replace(_NO_VFIO_DEVICES, b"")


def encode_cpr_state(state: CprState) -> tuple[bytes, ...]:
    """Encode a state as the pieces between descriptors.

    Returns:
        One piece more than there are descriptors. Behind each but the last goes ``FD_MARK``
        with a descriptor, so that joined by it they are the whole state.
    """
    pieces = [CPR_MAGIC.to_bytes(4, "big") + CPR_VERSION.to_bytes(4, "big")]
    for entry in state.entries:
        name = entry.name.encode("ascii") + b"\0"
        number = entry.number.to_bytes(4, "big", signed=True)
        pieces[-1] += bytes((_MORE,)) + len(name).to_bytes(4, "big") + name + number
        pieces.append(b"")
    pieces[-1] += bytes((_END,)) + state.tail
    return tuple(pieces)


def decode_cpr_state(data: bytes) -> CprState:
    """Decode a whole state.

    Args:
        data: Everything up to the end of the input.

    Raises:
        StreamError: It is none, with the position.
    """
    reader = _Reader(data)
    magic = reader.uint(4)
    if magic != CPR_MAGIC:
        raise StreamCorrupt(f"no CPR state: it begins with {magic:#010x}", position=0)
    version = reader.uint(4)
    if version != CPR_VERSION:
        raise StreamUnsupported(f"a CPR state of version {version} is not taken", position=4)
    entries: list[CprEntry] = []
    while more := reader.uint(1):
        if more != _MORE:
            raise StreamCorrupt(f"a list of descriptors with {more:#04x}", position=reader.at - 1)
        if len(entries) == ENTRY_LIMIT:
            raise StreamLimit(f"more than {ENTRY_LIMIT} descriptors", position=reader.at)
        entries.append(_entry(reader))
    if len(set(entries)) != len(entries):
        raise StreamCorrupt("the CPR state names a descriptor twice", position=reader.at)
    tail = data[reader.at :]
    if tail and tail[0] != _SUBSECTION:
        raise StreamCorrupt(f"no subsection: it begins with {tail[0]:#04x}", position=reader.at)
    return CprState(tuple(entries), tail)


def _entry(reader: "_Reader") -> CprEntry:
    length = reader.uint(4)
    if not 2 <= length <= _NAME_LIMIT:
        raise StreamCorrupt(f"a name of {length} bytes", position=reader.at - 4)
    raw = reader.take(length)
    name = raw[:-1]
    if raw[-1] or not name.isascii() or not name.decode("ascii").isprintable():
        raise StreamCorrupt(f"a name {raw[:64]!r}", position=reader.at - length)
    number = int.from_bytes(reader.take(4), "big", signed=True)
    if reader.take(1) != FD_MARK:
        raise StreamCorrupt(
            f"'{name.decode('ascii')}' comes without its descriptor", position=reader.at - 1
        )
    return CprEntry(name.decode("ascii"), number)


def encode_workload_tail(body: bytes) -> bytes:
    """Our subsection with this body."""
    name = WORKLOAD_SUBSECTION.encode("ascii")
    head = bytes((_SUBSECTION, len(name))) + name + (1).to_bytes(4, "big")
    return head + len(body).to_bytes(4, "big") + body


def decode_workload_tail(tail: bytes) -> bytes | None:
    """The body of our subsection; None if the tail is something else."""
    head = encode_workload_tail(b"")[:-4]
    if not tail.startswith(head):
        return None
    length = int.from_bytes(tail[len(head) : len(head) + 4], "big")
    body = tail[len(head) + 4 :]
    return body if len(body) == length else None


class _Reader:
    """A cursor that ends with a typed error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        piece = self._data[self.at : self.at + count]
        if len(piece) < count:
            raise StreamTruncated("the CPR state ends early", position=len(self._data))
        self.at += count
        return piece

    def uint(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")
