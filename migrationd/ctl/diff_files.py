"""``migrationctl diff``: which pages and which device fields differ between two files."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrationd.codec.constants import QEMU_VM_SECTION_FULL
from migrationd.codec.device_fields import DeviceDescription, DeviceField, describe_devices
from migrationd.ctl.printable import printable
from migrationd.ctl.progress import size_text
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import Pages, page_runs
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock

CHUNK_PAGES = 4096
SHOWN_RUNS = 8
SHOWN_FIELDS = 12

Key = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """One RAM block.

    Attributes:
        only_in: 0 or 1 if only that file has the block, else None.
        lengths: Bytes in each file, None where it is not.
        pages: Numbers of the pages that differ, ascending.
        first_byte: Offset in the block of the first byte that differs, or None.
    """

    idstr: str
    only_in: int | None
    lengths: tuple[int | None, int | None]
    pages: Pages
    first_byte: int | None
    page_size: int = 4096

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return self.only_in is None and self.lengths[0] == self.lengths[1] and not len(self.pages)


@dataclass(frozen=True, slots=True)
class DeviceDifference:
    """One device section.

    Attributes:
        only_in: 0 or 1 if only that file has the section, else None.
        fields: Path and the texts of both values, for each field that differs.
    """

    name: str
    only_in: int | None
    fields: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """Two guests.

    Attributes:
        identity: Name and both values of what the configurations say differently.
        blocks: Every block.
        devices: Sections that differ.
        device_count: Sections that were compared.
    """

    identity: tuple[tuple[str, str, str], ...]
    blocks: tuple[BlockDifference, ...]
    devices: tuple[DeviceDifference, ...]
    device_count: int

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return (
            not self.identity and not self.devices and all(block.is_equal for block in self.blocks)
        )


def compare(left: ParkedGuest, right: ParkedGuest) -> Difference:
    """Compare two guests: what a destination would be given."""
    identity = [
        (name, _text(one), _text(other))
        for name in ("machine", "target_page_bits", "uuid")
        if (one := getattr(left.identity, name)) != (other := getattr(right.identity, name))
    ]
    blocks = tuple(_compare_blocks(left, right))
    devices, count = _compare_devices(left, right)
    return Difference(tuple(identity), blocks, tuple(devices), count)


def differing_pages(left: RamBlock, right: RamBlock) -> Pages:
    """Numbers of pages that differ, in blocks of one page size; absent pages are zero."""
    found = []
    size = left.page_size
    count = min(left.page_count, right.page_count)
    for start in range(0, count, CHUNK_PAGES):
        end = min(start + CHUNK_PAGES, count)
        words = [_words(block, start, end) for block in (left, right)]
        flags = [block.present[start:end] for block in (left, right)]
        either = flags[0] | flags[1]
        if not either.any():
            continue
        # What an absent page's place holds does not count: it is compared as zero.
        both = flags[0] & flags[1]
        differs = both.copy()
        if both.all():
            differs = (words[0] != words[1]).any(axis=1)
        elif both.any():
            differs[both] = (words[0][both] != words[1][both]).any(axis=1)
        for content, mine in zip(words, flags, strict=True):
            alone = mine & np.logical_not(both)
            if alone.any():
                differs[alone] = content[alone].any(axis=1)
        found.append(np.flatnonzero(differs) + start)
    longer = max(left, right, key=lambda block: block.page_count)
    if longer.page_count > count:
        found.append(np.arange(count, longer.page_count))
    assert size == right.page_size
    return np.concatenate(found) if found else np.empty(0, np.int64)


def print_difference(
    difference: Difference, names: tuple[str, str], console: Console, *, everything: bool
) -> None:
    """Print what differs; long lists are cut unless everything is asked for."""
    if difference.is_equal:
        pages = sum((block.lengths[0] or 0) // block.page_size for block in difference.blocks)
        console.print(
            f"equal: {pages} pages, {difference.device_count} device sections", highlight=False
        )
        return
    for side, name in zip("-+", names, strict=True):
        console.print(f"{side} {printable(name)}", highlight=False, markup=False, soft_wrap=True)
    for name, one, other in difference.identity:
        text = printable(f"{name}: {one} → {other}")
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for block in difference.blocks:
        if not block.is_equal:
            _print_block(block, console, everything=everything)
    for device in difference.devices:
        _print_device(device, console, everything=everything)


def as_json(difference: Difference) -> dict[str, object]:
    """The same for programs."""
    return {
        "equal": difference.is_equal,
        "identity": [list(entry) for entry in difference.identity],
        "ram-blocks": [
            {
                "name": block.idstr,
                "only-in": block.only_in,
                "lengths": list(block.lengths),
                "differing-pages": len(block.pages),
                "runs": page_runs(block.pages).tolist(),
            }
            for block in difference.blocks
            if not block.is_equal
        ],
        "devices": [
            {
                "name": device.name,
                "only-in": device.only_in,
                "fields": [list(entry) for entry in device.fields],
            }
            for device in difference.devices
        ],
    }


def _words(block: RamBlock, start: int, end: int) -> npt.NDArray[np.uint64]:
    size = block.page_size
    view = block.memory.view[start * size : end * size]
    return view.view(np.uint64).reshape(end - start, size // 8)


def _compare_blocks(left: ParkedGuest, right: ParkedGuest) -> Iterator[BlockDifference]:
    ours = {block.idstr: block for block in left.ram}
    others = {block.idstr: block for block in right.ram}
    for idstr in dict.fromkeys((*ours, *others)):
        one, other = ours.get(idstr), others.get(idstr)
        if one is None or other is None or one.page_size != other.page_size:
            there = [block for block in (one, other) if block is not None]
            yield BlockDifference(
                idstr,
                None if len(there) == 2 else 0 if one else 1,
                (one.used_length if one else None, other.used_length if other else None),
                np.arange(max(block.page_count for block in there)),
                None,
                there[0].page_size,
            )
            continue
        pages = differing_pages(one, other)
        first = None
        if len(pages) and pages[0] < min(one.page_count, other.page_count):
            content = [np.frombuffer(block.page(int(pages[0])), np.uint8) for block in (one, other)]
            first = int(pages[0]) * one.page_size + int(np.argmax(content[0] != content[1]))
        yield BlockDifference(
            idstr, None, (one.used_length, other.used_length), pages, first, one.page_size
        )


def _compare_devices(left: ParkedGuest, right: ParkedGuest) -> tuple[list[DeviceDifference], int]:
    ours, others = _keyed(left.devices), _keyed(right.devices)
    described = _described(left), _described(right)
    found = []
    for key in dict.fromkeys((*ours, *others)):
        one, other = ours.get(key), others.get(key)
        name = f"{key[0]}, instance {key[1]}" if key[1] else key[0]
        if one is None or other is None:
            found.append(DeviceDifference(name, 0 if one else 1))
        elif (one.body, one.version_id) != (other.body, other.version_id):
            fields = tuple(_compare_fields(one, other, described))
            found.append(DeviceDifference(name, None, fields))
    return found, len(set(ours) | set(others))


def _keyed(devices: tuple[DeviceState, ...]) -> dict[Key, DeviceState]:
    """Sections by name, instance, kind, and number among those that are equal in these."""
    keyed: dict[Key, DeviceState] = {}
    seen: dict[tuple[str, int, int], int] = {}
    for device in devices:
        head = (device.idstr, device.instance_id, device.kind)
        keyed[(*head, seen.get(head, 0))] = device
        seen[head] = seen.get(head, 0) + 1
    return keyed


def _described(guest: ParkedGuest) -> dict[tuple[str, int], DeviceDescription]:
    try:
        found = describe_devices(guest.vmdescription or b"{}")
    except ValueError:
        return {}
    return {(device.idstr, device.instance_id): device for device in found}


def _compare_fields(
    one: DeviceState,
    other: DeviceState,
    described: tuple[dict[tuple[str, int], DeviceDescription], ...],
) -> Iterator[tuple[str, str, str]]:
    if one.version_id != other.version_id:
        yield "version", str(one.version_id), str(other.version_id)
    values = []
    for device, descriptions in zip((one, other), described, strict=True):
        entry = descriptions.get((device.idstr, device.instance_id))
        if device.kind == QEMU_VM_SECTION_FULL and entry is not None:
            fields = entry.fields(device.body)[0]
        else:
            fields = [DeviceField("", "bytes", 0, len(device.body), device.body)]
        values.append({field.path: field for field in fields})
    for path in dict.fromkeys((*values[0], *values[1])):
        left, right = values[0].get(path), values[1].get(path)
        if left is None or right is None or left.value != right.value:
            yield path or "the body", _field_text(left, right), _field_text(right, left)


def _field_text(field: DeviceField | None, other: DeviceField | None) -> str:
    if field is None:
        return "absent"
    if isinstance(field.value, bytes) and other is not None and isinstance(other.value, bytes):
        return _around(field.value, other.value)
    return field.text


def _around(mine: bytes, other: bytes) -> str:
    """Where two byte strings begin to differ."""
    shorter = min(len(mine), len(other))
    at = next((i for i in range(shorter) if mine[i] != other[i]), shorter)
    return f"at {at}: {mine[at : at + 12].hex(' ', 4) or 'ends'}"


def _print_block(block: BlockDifference, console: Console, *, everything: bool) -> None:
    if block.only_in is not None:
        where = "-+"[block.only_in]
        length = size_text(block.lengths[block.only_in] or 0)
        text = f"{where} RAM block {printable(block.idstr)}, {length}"
        console.print(text, highlight=False, markup=False)
        return
    total = max(filter(None, block.lengths)) // block.page_size
    text = f"RAM block {printable(block.idstr)}: {len(block.pages)} of {total} pages differ"
    if block.lengths[0] != block.lengths[1]:
        text += f", lengths {block.lengths[0]} → {block.lengths[1]}"
    if block.first_byte is not None:
        text += f", first at {block.first_byte:#x}"
    console.print(text, highlight=False, markup=False)
    runs = page_runs(block.pages).tolist()
    shown = runs if everything else runs[:SHOWN_RUNS]
    for first, count in shown:
        start = first * block.page_size
        end = start + count * block.page_size
        console.print(f"    {start:#x}-{end:#x}  {count} pages", highlight=False)
    if len(runs) > len(shown):
        console.print(f"    … and {len(runs) - len(shown)} more ranges (--all)", highlight=False)


def _print_device(device: DeviceDifference, console: Console, *, everything: bool) -> None:
    if device.only_in is not None:
        text = f"{'-+'[device.only_in]} section {printable(device.name)}"
        console.print(text, highlight=False, markup=False)
        return
    text = f"section {printable(device.name)}: {len(device.fields)} fields differ"
    console.print(text, highlight=False, markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 4))
    shown = device.fields if everything else device.fields[:SHOWN_FIELDS]
    for path, one, other in shown:
        table.add_row(*(Text(printable(word)) for word in (path, one, "→", other)))
    console.print(table, highlight=False)
    if len(device.fields) > len(shown):
        rest = len(device.fields) - len(shown)
        console.print(f"    … and {rest} more fields (--all)", highlight=False)


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return "none" if value is None else str(value)
