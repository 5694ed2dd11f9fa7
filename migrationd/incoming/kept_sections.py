"""Sections of an arriving stream that are kept: device state, dirty bitmaps, disk contents.

Live handlers say something in each pass over RAM, mostly that they have nothing to say.
Such parts are not kept: a slow migration has tens of thousands of them.
"""

from collections.abc import Iterable
from dataclasses import replace

from migrationd.codec.constants import (
    BLK_MIG_FLAG_DEVICE_BLOCK,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.dirty_bitmap import SECTION as DIRTY_BITMAP
from migrationd.codec.records import OpaqueSection
from migrationd.errors import StreamCorrupt, StreamError, StreamLimit
from migrationd.guest.device import DeviceState
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.migration.dirty_bitmaps import on_arrival

BLOCK = "block"
"""Section of the block migration of QEMU up to 9.0."""

MAX_KEPT_BYTES = 1 << 30
"""All sections of one guest together."""

_SECTION_COST_BYTES = 256
"""What a section takes here besides its body."""

_EMPTY_BITMAPS = b"\x01"


class KeptSections:
    """Collects the sections of one stream in their order.

    Args:
        mapping: ``block-bitmap-mapping``: under which names dirty bitmaps are kept.
        devices: Where they are collected.
    """

    def __init__(self, mapping: BitmapMapping | None, devices: list[DeviceState]) -> None:
        self._bitmaps = on_arrival(mapping)
        self._devices = devices
        self._keys: set[tuple[str, int]] = set()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._keys)

    def keep(self, section: OpaqueSection, position: int, *, in_setup: bool) -> None:
        """Keep a section, if it says anything.

        Raises:
            StreamError: It came twice, never started, is malformed, or there is too much.
        """
        key = (section.idstr, section.instance_id)
        if section.kind in (QEMU_VM_SECTION_FULL, QEMU_VM_SECTION_START):
            if key in self._keys:
                raise StreamCorrupt(
                    f"duplicate section, instance {section.instance_id}",
                    position=position,
                    section=section.idstr,
                )
            self._keys.add(key)
        elif key not in self._keys:
            raise StreamCorrupt(
                "a part of a section that never started", position=position, section=section.idstr
            )
        body = self._body(section, position)
        if section.kind == QEMU_VM_SECTION_PART and _is_idle(section.idstr, body):
            return
        self._bytes += len(body) + _SECTION_COST_BYTES
        if self._bytes > MAX_KEPT_BYTES:
            raise StreamLimit(
                f"device sections of more than {MAX_KEPT_BYTES} bytes",
                position=position,
                section=section.idstr,
            )
        kept = section if body is section.body else replace(section, body=body)
        self._devices.append(DeviceState.of_section(kept, in_setup=in_setup))

    def _body(self, section: OpaqueSection, position: int) -> bytes:
        if section.idstr != DIRTY_BITMAP:
            return section.body
        try:
            return self._bitmaps.translate(section.body)
        except StreamError as error:
            error.position = position
            raise


def renamed(
    sections: Iterable[OpaqueSection], mapping: BitmapMapping | None
) -> list[OpaqueSection]:
    """Sections of a file with the dirty bitmaps under the names of here.

    Raises:
        StreamCorrupt: They are malformed.
    """
    bitmaps = on_arrival(mapping)
    return [
        replace(section, body=bitmaps.translate(section.body))
        if section.idstr == DIRTY_BITMAP
        else section
        for section in sections
    ]


def _is_idle(idstr: str, body: bytes) -> bool:
    """Whether a part of a live handler holds nothing."""
    if idstr == DIRTY_BITMAP:
        return body == _EMPTY_BITMAPS
    if idstr != BLOCK or len(body) % 8:
        return False
    # Words of eight bytes up to the first one that brings a disk's contents.
    return not any(byte & BLK_MIG_FLAG_DEVICE_BLOCK for byte in body[7::8])
