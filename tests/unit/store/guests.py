"""A small guest for the store's tests."""

import os
from pathlib import Path

import numpy as np

from migrationd.codec.records import Configuration, OpaqueSection
from migrationd.store.parked_directory import NewGuest, ParkedDirectory

PAGE = 4096
BLOCKS = (("pc.ram", 600 * PAGE), ("0000:00:02.0/vga.vram", 64 * PAGE), ("pc.bios", 3 * PAGE))
CONFIGURATION = Configuration("pc-i440fx-10.0", uuid=bytes(range(16)))
START, PART, END, FULL = 1, 2, 3, 4


def section(
    idstr: str, body: bytes = b"body", *, kind: int = FULL, section_id: int = 0
) -> OpaqueSection:
    return OpaqueSection(kind, section_id, idstr, 0, 1, body, has_footer=True)


EARLY = (section("0000:00:05.0/virtio-mem-early", section_id=90),)
LATE = (
    section("timer", bytes(24), section_id=0),
    section("cpu", b"\x7e\0\0\0\x05" * 20, section_id=5),
    section("globalstate", b"\0\0\0\x08running".ljust(104, b"\0"), section_id=6),
)


def page(number: int) -> bytes:
    return bytes([number % 255 + 1]) * PAGE


def present_pages() -> list[np.ndarray]:
    """Every third page of each block."""
    return [np.arange(length // PAGE) % 3 == 0 for _, length in BLOCKS]


def begin(directory: ParkedDirectory, machine: str = CONFIGURATION.machine) -> NewGuest:
    configuration = Configuration(machine, uuid=CONFIGURATION.uuid)
    return directory.begin(configuration, EARLY, BLOCKS, PAGE)


def fill(new: NewGuest) -> None:
    for block, present in zip(new.layout.blocks, present_pages(), strict=True):
        for number in np.flatnonzero(present).tolist():
            os.pwrite(new.fd, page(number), block.pages_position + number * PAGE)


def commit(new: NewGuest) -> None:
    new.commit(present_pages(), LATE, b"{}", switchover_start=True, seen={"section_footers": True})
    os.close(new.fd)


def store_guest(path: Path, name: str = "vm1") -> Path:
    """Store a guest; returns its file."""
    directory = ParkedDirectory(path, name)
    new = begin(directory)
    fill(new)
    commit(new)
    directory.close()
    return path / f"{name}.mapped-ram"
