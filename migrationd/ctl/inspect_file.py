"""``migrationctl inspect``: what a migration file holds, and a device's fields."""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrationd.codec.constants import (
    QEMU_VM_SECTION_END,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_PART,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.device_fields import DeviceField
from migrationd.codec.records import OpaqueSection
from migrationd.ctl.file_summary import FileSummary
from migrationd.ctl.printable import printable
from migrationd.ctl.progress import size_text
from migrationd.errors import StoreError, StreamCorrupt
from migrationd.migration.dirty_bitmaps import DirtyBitmap
from migrationd.units import parse_whole

ROW_ELEMENTS = 8
"""Longer arrays of numbers are shown in one line."""

_INSTANCE_MAX = (1 << 32) - 1

KINDS = {
    QEMU_VM_SECTION_START: "start",
    QEMU_VM_SECTION_PART: "part",
    QEMU_VM_SECTION_END: "end",
    QEMU_VM_SECTION_FULL: "device",
}


def print_summary(summary: FileSummary, console: Console) -> None:
    """Print everything but fields."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(summary):
        table.add_row(name, _text(value))
    console.print(table, highlight=False)
    console.print()
    console.print(_block_table(summary), highlight=False)
    console.print()
    console.print(_device_table(summary), highlight=False)


def as_json(summary: FileSummary) -> dict[str, Any]:
    """The same for programs; sizes in bytes."""
    configuration = summary.configuration
    described = summary.described()
    return {
        "file": str(summary.path),
        "form": summary.container.form,
        "file-bytes": summary.container.size,
        "allocated-bytes": summary.container.allocated,
        "stream-position": summary.container.position,
        "machine": configuration.machine if configuration else None,
        "uuid": configuration.uuid.hex() if configuration and configuration.uuid else None,
        "capabilities": list(configuration.capabilities or ()) if configuration else [],
        "page-size": summary.page_size,
        "run-state": summary.run_state,
        "ram-blocks": [
            {
                "name": block.idstr,
                "used-length": block.used_length,
                "pages": block.page_count,
                "present-pages": block.present_count,
                "named-pages": int(block.named.sum()),
                "records": block.records,
            }
            for block in summary.blocks
        ],
        "sections": [
            {
                "name": section.idstr,
                "instance-id": section.instance_id,
                "version-id": section.version_id,
                "section-id": section.section_id,
                "kind": KINDS[section.kind],
                "bytes": len(section.body),
                "described": (section.idstr, section.instance_id) in described,
            }
            for section in summary.sections
        ],
        "dirty-bitmaps": [
            {
                "node": bitmap.node,
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "marked-bytes": bitmap.dirty_bytes,
                "enabled": bitmap.enabled,
                "persistent": bitmap.persistent,
                "complete": bitmap.complete,
            }
            for bitmap in summary.dirty_bitmaps()
        ],
        "vmdescription-bytes": len(summary.description) if summary.description else None,
        "records": dict(summary.records),
        "commands": [command.number for command in summary.commands],
    }


def find_devices(summary: FileSummary, name: str) -> list[OpaqueSection]:
    """Sections of a device.

    Args:
        summary: The file.
        name: idstr, or its last part; ``NAME:INSTANCE`` for one of several.

    Raises:
        StoreError: There is none.
    """
    wanted, _, number = name.rpartition(":")
    instance = parse_whole(number, _INSTANCE_MAX)
    if not wanted or instance is None:
        wanted, instance = name, None
    names = (wanted, name)
    found = [
        section
        for section in summary.sections
        if any(section.idstr == n or section.idstr.endswith(f"/{n}") for n in names)
        and (instance is None or section.idstr == name or section.instance_id == instance)
    ]
    if not found:
        known = ", ".join(dict.fromkeys(section.idstr for section in summary.sections))
        raise StoreError(f"no section '{name}' in '{summary.path}'; there are: {known}")
    return found


def print_device(summary: FileSummary, section: OpaqueSection, console: Console) -> None:
    """Print the fields of one section."""
    title = f"{printable(section.idstr)}, instance {section.instance_id}"
    title += f", version {section.version_id}, {len(section.body)} bytes"
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    fields, problem = fields_of(summary, section)
    table = Table(box=None, pad_edge=False)
    table.add_column("offset", justify="right")
    for name in ("field", "type", "value"):
        table.add_column(name, overflow="fold")
    for offset, path, kind, value in _rows(fields):
        table.add_row(str(offset), *map(_text, (path, kind, value)))
    console.print(table, highlight=False)
    if problem:
        console.print(f"note: {printable(problem)}", highlight=False, markup=False)


def fields_of(summary: FileSummary, section: OpaqueSection) -> tuple[list[DeviceField], str | None]:
    """Fields of a section, and what is wrong with its description."""
    body = section.body
    whole = [DeviceField("", "bytes", 0, len(body), body)]
    if section.kind != QEMU_VM_SECTION_FULL:
        return whole, "the section of a live handler has no description"
    described = summary.described().get((section.idstr, section.instance_id))
    if described is None:
        return whole, "the file does not describe this device"
    return described.fields(body)


def _facts(summary: FileSummary) -> Iterator[tuple[str, str]]:
    container, configuration = summary.container, summary.configuration
    yield "file", str(summary.path)
    yield "form", container.form
    size = size_text(container.size)
    if container.allocated < container.size:
        size += f", {size_text(container.allocated)} on disk"
    yield "size", size
    if container.position:
        yield "stream begins at", str(container.position)
    if container.libvirt is not None:
        state = "running" if container.libvirt.was_running else "paused"
        yield "libvirt", f"{len(container.libvirt.domain_xml)} bytes of domain XML, was {state}"
    yield "machine", configuration.machine if configuration else "not named in the stream"
    if configuration and configuration.uuid:
        yield "uuid", configuration.uuid.hex()
    if configuration and configuration.capabilities:
        yield "capabilities", ", ".join(configuration.capabilities)
    yield "run state", summary.run_state or "does not travel"
    zero = summary.ram_bytes - summary.present_bytes
    share = f"{zero / summary.ram_bytes:.1%}" if summary.ram_bytes else "-"
    yield "RAM", f"{size_text(summary.ram_bytes)}, {share} of it zero pages"
    if summary.records:
        yield "records", ", ".join(f"{count} {kind}" for kind, count in summary.records.items())
    if summary.pages_elsewhere:
        yield "note", "pages went over multifd channels, which are not in this file"
    described = len(summary.described())
    try:
        for bitmap in summary.dirty_bitmaps():
            yield "dirty bitmap", _bitmap_text(bitmap)
    except StreamCorrupt as error:
        yield "dirty bitmaps", str(error)
    yield (
        "description",
        f"{len(summary.description)} bytes, {described} devices" if summary.description else "none",
    )


def _text(words: str) -> Text:
    """Words of the file: neither markup nor a terminal's commands."""
    return Text(printable(words))


def _bitmap_text(bitmap: DirtyBitmap) -> str:
    words = [
        f"'{bitmap.name}' of node '{bitmap.node}'",
        f"{size_text(bitmap.dirty_bytes)} marked",
        f"{size_text(bitmap.granularity)} per bit",
        "enabled" if bitmap.enabled else "disabled",
    ]
    words += ["persistent"] * bitmap.persistent + ["incomplete"] * (not bitmap.complete)
    return ", ".join(words)


def _block_table(summary: FileSummary) -> Table:
    table = Table(box=None, pad_edge=False, title="RAM blocks", title_justify="left")
    table.add_column("block", overflow="fold")
    for name in ("size", "pages", "not zero", "zero share"):
        table.add_column(name, justify="right")
    for block in summary.blocks:
        table.add_row(
            _text(block.idstr),
            size_text(block.used_length),
            str(block.page_count),
            str(block.present_count),
            f"{block.zero_share:.1%}",
        )
    return table


def _device_table(summary: FileSummary) -> Table:
    described = summary.described()
    table = Table(box=None, pad_edge=False, title="Sections", title_justify="left")
    table.add_column("section", overflow="fold")
    table.add_column("kind")
    for name in ("instance", "version", "bytes", "fields"):
        table.add_column(name, justify="right")
    for run in _runs(summary.sections):
        section = run[0]
        description = described.get((section.idstr, section.instance_id))
        count = "-"
        if section.kind == QEMU_VM_SECTION_FULL and description is not None:
            count = str(len(description.fields(section.body)[0]))
        table.add_row(
            _text(section.idstr),
            KINDS[section.kind] + (f" × {len(run)}" if len(run) > 1 else ""),
            str(section.instance_id),
            str(section.version_id),
            str(sum(len(part.body) for part in run)),
            count,
        )
    return table


def _runs(sections: list[OpaqueSection]) -> Iterator[list[OpaqueSection]]:
    """Sections in order, parts of a live handler that follow one another together."""
    for _, group in groupby(
        enumerate(sections),
        # Anything but a part stands for itself.
        key=lambda item: item[1].idstr if item[1].kind == QEMU_VM_SECTION_PART else item[0],
    ):
        yield [section for _, section in group]


def _rows(fields: list[DeviceField]) -> Iterator[tuple[int, str, str, str]]:
    """Lines of a device: long arrays of numbers in one."""
    at = 0
    while at < len(fields):
        first = fields[at]
        end = at + 1
        base, bracket, index = first.path.rpartition("[")
        if bracket and index == "0]" and isinstance(first.value, int):
            while end < len(fields) and fields[end].path == f"{base}[{end - at}]":
                end += 1
        if end - at > ROW_ELEMENTS:
            values = [int(entry.value) for entry in fields[at:end]]
            yield first.offset, f"{base}[0…{end - at - 1}]", first.type, _numbers(values)
        else:
            for entry in fields[at:end]:
                yield entry.offset, entry.path, entry.type, entry.text
        at = end


def _numbers(values: list[int]) -> str:
    if not any(values):
        return "all zero"
    shown = " ".join(str(value) for value in values[:16])
    return shown if len(values) <= 16 else f"{shown} …"


def device_json(summary: FileSummary, section: OpaqueSection) -> dict[str, Any]:
    """Fields of one section for programs; bytes in hexadecimal."""
    fields, problem = fields_of(summary, section)
    return {
        "name": section.idstr,
        "instance-id": section.instance_id,
        "version-id": section.version_id,
        "bytes": len(section.body),
        "note": problem,
        "fields": [
            {
                "path": entry.path,
                "type": entry.type,
                "offset": entry.offset,
                "value": entry.value.hex() if isinstance(entry.value, bytes) else entry.value,
            }
            for entry in fields
        ],
    }


def dump_json(tree: dict[str, Any], console: Console) -> None:
    """Print a JSON object."""
    console.print(json.dumps(tree, indent=2), highlight=False, markup=False, soft_wrap=True)
