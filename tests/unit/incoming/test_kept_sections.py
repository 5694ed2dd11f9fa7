"""Which sections of an arriving stream are kept."""

import pytest

from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.records import OpaqueSection
from migrationd.errors import StreamCorrupt, StreamLimit
from migrationd.guest.device import DeviceState
from migrationd.incoming import kept_sections
from migrationd.incoming.kept_sections import KeptSections

EOS = (2).to_bytes(8, "big")
PROGRESS = (0x42 << 9 | 4).to_bytes(8, "big")
DATA = (1).to_bytes(8, "big") + b"\1d" + bytes(1 << 20)
START, PART, END, FULL = (
    QEMU_VM_SECTION_START,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FULL,
)


def section(kind: int, idstr: str, body: bytes) -> OpaqueSection:
    return OpaqueSection(kind, 4, idstr, 0, 1, body, has_footer=True)


def keep(*sections: OpaqueSection) -> list[DeviceState]:
    devices: list[DeviceState] = []
    kept = KeptSections(None, devices)
    assert not kept
    for one in sections:
        kept.keep(one, 77, in_setup=one.kind == START)
    assert kept
    return devices


def test_a_part_that_comes_before_the_first_page_is_not_of_the_setup_phase() -> None:
    devices: list[DeviceState] = []
    kept = KeptSections(None, devices)
    for one in (
        section(FULL, "early", b"x"),
        section(START, "block", EOS),
        section(PART, "block", PROGRESS + DATA + EOS),
    ):
        kept.keep(one, 0, in_setup=True)
    assert [device.is_early for device in devices] == [True, False, False]
    assert [device.is_of_setup for device in devices] == [True, True, False]


def test_parts_that_say_nothing_are_not_kept() -> None:
    devices = keep(
        section(START, "block", EOS),
        *[section(PART, "block", PROGRESS + EOS)] * 1000,
        section(PART, "block", PROGRESS + DATA + EOS),
        section(END, "block", PROGRESS + EOS),
        section(START, "dirty-bitmap", b"\1"),
        *[section(PART, "dirty-bitmap", b"\1")] * 1000,
        section(END, "dirty-bitmap", b"\1"),
        section(FULL, "serial", b""),
    )
    assert [(device.idstr, device.kind) for device in devices] == [
        ("block", START),
        ("block", PART),
        ("block", END),
        ("dirty-bitmap", START),
        ("dirty-bitmap", END),
        ("serial", FULL),
    ]


def test_what_a_disk_holds_may_look_like_anything() -> None:
    """A body whose length is a multiple of eight, with contents."""
    name = b"\6device"
    body = (1).to_bytes(8, "big") + name + bytes(1 << 20) + EOS
    body = body + bytes(1)
    assert len(body) % 8 == 0
    assert len(keep(section(START, "block", EOS), section(PART, "block", body))) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([section(FULL, "a", b""), section(FULL, "a", b"")], "duplicate section"),
        ([section(END, "block", EOS)], "never started"),
        ([section(START, "dirty-bitmap", b"\x20\1")], "names no bitmap"),
    ],
)
def test_what_is_refused(sections: list[OpaqueSection], message: str) -> None:
    with pytest.raises(StreamCorrupt, match=message) as caught:
        keep(*sections)
    assert caught.value.position == 77


def test_there_is_a_limit_on_empty_sections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sections, "MAX_KEPT_BYTES", 100_000)
    many = [OpaqueSection(FULL, n, f"d{n}", 0, 1, b"", has_footer=True) for n in range(1000)]
    with pytest.raises(StreamLimit, match="more than 100000 bytes"):
        keep(*many)
