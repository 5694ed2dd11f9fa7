"""Block dirty bitmaps of a guest: which ones it has, and under which names they travel.

They stay in the sections that they came in. ``block-bitmap-mapping`` renames them: an alias
of the stream becomes a node and a bitmap where they arrive, and those an alias where they
leave. What it does not list stays behind (a QEMU that meets an alias it does not know gives
all bitmaps up); without a mapping names stay as they are.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from migrationd.codec.dirty_bitmap import (
    IS_ENABLED,
    IS_PERSISTENT,
    SECTION,
    BitmapReader,
    BitmapWriter,
    Bits,
    Chunk,
    Complete,
    Start,
    dirty_count,
)
from migrationd.guest.device import DeviceState
from migrationd.migration.bitmap_mapping import BitmapMapping

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Renamed:
    """New names of a bitmap, and whether it is to be kept on disk; None: as it is."""

    node: str
    bitmap: str
    persistent: bool | None = None


Rename = Callable[[str, str], Renamed | None]
"""Node and bitmap to their new names; None: it stays behind."""


@dataclass(slots=True)
class DirtyBitmap:
    """A bitmap as it is kept.

    Attributes:
        node: Block node.
        name: Name.
        granularity: Bytes of disk per bit.
        enabled: Whether it records writes where the guest runs.
        persistent: Whether it is to be kept on disk.
        dirty_bytes: What it marks, in whole granules.
        complete: Whether it came to its end.
    """

    node: str
    name: str
    granularity: int
    enabled: bool
    persistent: bool
    dirty_bytes: int = 0
    complete: bool = False


class BitmapTranslator:
    """Checks the sections of one stream in their order and renames what they hold.

    Args:
        rename: How; None: not at all.
    """

    def __init__(self, rename: Rename | None) -> None:
        self._rename = rename
        self._reader = BitmapReader()
        self._writer = BitmapWriter()
        self._left_behind: set[tuple[str, str]] = set()

    def translate(self, body: bytes) -> bytes:
        """The body as it is to be kept or sent.

        Raises:
            StreamCorrupt: It is malformed.
        """
        chunks = self._reader.read(body)
        if self._rename is None:
            return body
        return self._writer.write(self._renamed(chunks, self._rename))

    def _renamed(self, chunks: Iterable[Chunk], rename: Rename) -> Iterable[Chunk]:
        for chunk in chunks:
            new = rename(chunk.node, chunk.bitmap)
            if new is None:
                self._say_left_behind(chunk)
                continue
            content = chunk.content
            if isinstance(content, Start) and new.persistent is not None:
                flags = content.flags & ~IS_PERSISTENT
                content = replace(content, flags=flags | IS_PERSISTENT * new.persistent)
            yield Chunk(new.node, new.bitmap, content)

    def _say_left_behind(self, chunk: Chunk) -> None:
        key = (chunk.node, chunk.bitmap)
        if key not in self._left_behind:
            self._left_behind.add(key)
            log.warning("dirty bitmap %r of node %r stays behind", *key[::-1])


def on_arrival(mapping: BitmapMapping | None) -> BitmapTranslator:
    """From the names of the stream to those of here."""
    if mapping is None:
        return BitmapTranslator(None)
    names = {
        (node.alias, bitmap.alias): Renamed(node.node_name, bitmap.name, bitmap.persistent)
        for node in mapping
        for bitmap in node.bitmaps
    }
    return BitmapTranslator(lambda node, bitmap: names.get((node, bitmap)))


def for_departure(
    devices: Sequence[DeviceState], mapping: BitmapMapping | None
) -> tuple[DeviceState, ...]:
    """Sections of a guest with its bitmaps under the names of the stream.

    Args:
        devices: As the guest has them.
        mapping: ``block-bitmap-mapping``; None: all bitmaps go, under their own names.

    Raises:
        StreamCorrupt: What is kept is malformed.
    """
    sent = list(devices)
    if mapping is not None:
        names = {
            (node.node_name, bitmap.name): Renamed(node.alias, bitmap.alias, bitmap.persistent)
            for node in mapping
            for bitmap in node.bitmaps
        }
        sent = _rewritten(devices, lambda node, bitmap: names.get((node, bitmap)))
    if not bitmaps_of(sent):
        sent = [device for device in sent if not _is_bitmap(device)]
    return tuple(sent)


def without_incomplete(devices: Sequence[DeviceState]) -> list[DeviceState]:
    """The same sections without bitmaps whose end never came: they lack what is dirty.

    Raises:
        StreamCorrupt: What is kept is malformed.
    """
    found = bitmaps_of(devices)
    lost = {(bitmap.node, bitmap.name) for bitmap in found if not bitmap.complete}
    if not lost:
        return list(devices)
    return _rewritten(
        devices, lambda node, name: None if (node, name) in lost else Renamed(node, name)
    )


def has_bitmaps(devices: Sequence[DeviceState]) -> bool:
    """Whether there is any section of dirty bitmaps."""
    return any(map(_is_bitmap, devices))


def bitmaps_of(devices: Sequence[DeviceState]) -> tuple[DirtyBitmap, ...]:
    """The bitmaps that a guest has.

    Raises:
        StreamCorrupt: What is kept is malformed.
    """
    reader = BitmapReader()
    found: dict[tuple[str, str], DirtyBitmap] = {}
    for device in filter(_is_bitmap, devices):
        for chunk in reader.read(device.body):
            key = (chunk.node, chunk.bitmap)
            match chunk.content:
                case Start(granularity, flags):
                    found[key] = DirtyBitmap(
                        *key, granularity, bool(flags & IS_ENABLED), bool(flags & IS_PERSISTENT)
                    )
                case Bits() as bits:
                    bitmap = found[key]
                    bitmap.dirty_bytes += bitmap.granularity * dirty_count(bits, bitmap.granularity)
                case Complete():
                    found[key].complete = True
    return tuple(found.values())


def _is_bitmap(device: DeviceState) -> bool:
    return device.idstr == SECTION


def _rewritten(devices: Sequence[DeviceState], rename: Rename) -> list[DeviceState]:
    translator = BitmapTranslator(rename)
    return [
        replace(device, body=translator.translate(device.body)) if _is_bitmap(device) else device
        for device in devices
    ]
