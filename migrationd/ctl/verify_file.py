"""``migrationctl verify``: whether a migration file is whole, and what is odd about it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from migrationd.codec.constants import (
    QEMU_VM_SECTION_FULL,
    QEMU_VM_SECTION_START,
)
from migrationd.codec.vmdescription import device_sizes
from migrationd.ctl.file_summary import FileSummary, summarize
from migrationd.errors import MigrationdError, StoreError, StreamCorrupt
from migrationd.store.container import open_file
from migrationd.store.mapped_ram_reader import read_contents
from migrationd.store.sidecar import read_sidecar

SUFFIX = ".mapped-ram"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result.

    Attributes:
        level: ``ok``, ``warning`` or ``error``.
        what: What was checked.
        text: What was found.
    """

    level: str
    what: str
    text: str


def verify(path: Path, *, position: int = 0) -> list[Finding]:
    """Check a file: structure, framing of sections, sums, description against sections.

    Args:
        path: The file.
        position: Where its stream begins.

    Returns:
        What was found; the file is whole if no level is ``error``.
    """
    try:
        summary = summarize(path, position=position)
    except MigrationdError as error:
        return [Finding("error", "structure", str(error))]
    return list(_check(summary))


def _check(summary: FileSummary) -> Iterator[Finding]:
    container = summary.container
    yield Finding(
        "ok",
        "structure",
        f"{container.form}, {len(summary.blocks)} RAM blocks, {len(summary.sections)} sections",
    )
    if not summary.blocks:
        yield Finding("error", "RAM", "there is no RAM section")
    if summary.end_position is not None and container.compression == "none":
        yield from _check_end(summary)
    yield from _check_footers(summary)
    yield from _check_description(summary)
    yield from _check_dirty_bitmaps(summary)
    yield from _check_pages(summary)
    if container.is_mapped_ram:
        yield from _check_bitmaps(summary)
        yield from _check_sidecar(summary)
    elif container.compression == "zstd":
        yield Finding("ok", "sums", "each zstd frame that carries a sum agrees with it")


def _check_end(summary: FileSummary) -> Iterator[Finding]:
    end = (summary.end_position or 0) + summary.container.position
    rest = summary.container.size - end
    if rest:
        yield Finding("warning", "end", f"{rest} bytes behind the end of the stream, at {end}")
    else:
        yield Finding("ok", "end", f"the stream ends with the file, at {end}")


def _check_footers(summary: FileSummary) -> Iterator[Finding]:
    framed = [section for section in summary.sections if section.has_footer]
    if len(framed) == len(summary.sections):
        yield Finding("ok", "framing", f"{len(framed)} sections end with their footer")
    else:
        yield Finding(
            "warning",
            "framing",
            f"{len(summary.sections) - len(framed)} sections without a footer: cut by the "
            "description's sizes",
        )
    keys = [
        (section.idstr, section.instance_id)
        for section in summary.sections
        if section.kind in (QEMU_VM_SECTION_FULL, QEMU_VM_SECTION_START)
    ]
    for idstr, instance in sorted({key for key in keys if keys.count(key) > 1}):
        yield Finding("error", "framing", f"section '{idstr}' instance {instance} comes twice")


def _check_description(summary: FileSummary) -> Iterator[Finding]:
    if summary.description is None:
        yield Finding("warning", "description", "none: devices cannot be taken apart")
        return
    try:
        sizes = device_sizes(summary.description)
    except ValueError as error:
        yield Finding("error", "description", str(error))
        return
    if not sizes:
        yield Finding("warning", "description", "it lists no device")
        return
    found = [(d.idstr, d.instance_id) for d in summary.devices]
    if [(size.idstr, size.instance_id) for size in sizes] != found:
        yield Finding("error", "description", "it lists other devices than the file holds")
        return
    wrong = [
        f"'{size.idstr}' {len(device.body)} bytes, described as {size.size}"
        for size, device in zip(sizes, summary.devices, strict=True)
        if size.size != len(device.body)
    ]
    if wrong:
        # Old releases describe arrays with empty elements wrongly.
        yield Finding("warning", "description", "; ".join(wrong))
    described = summary.described()
    problems = [
        f"'{device.idstr}': {problem}"
        for device in summary.devices
        if (entry := described.get((device.idstr, device.instance_id))) is not None
        and (problem := entry.fields(device.body)[1]) is not None
    ]
    if problems:
        yield Finding("warning", "fields", "; ".join(problems))
    if not wrong and not problems:
        yield Finding("ok", "description", f"{len(sizes)} devices, sizes and fields agree")


def _check_dirty_bitmaps(summary: FileSummary) -> Iterator[Finding]:
    try:
        found = summary.dirty_bitmaps()
    except StreamCorrupt as error:
        yield Finding("error", "disk bitmaps", str(error))
        return
    incomplete = [bitmap.name for bitmap in found if not bitmap.complete]
    if incomplete:
        yield Finding("warning", "disk bitmaps", f"without an end: {', '.join(incomplete)}")
    elif found:
        yield Finding("ok", "disk bitmaps", f"{len(found)}, each with its end")


def _check_pages(summary: FileSummary) -> Iterator[Finding]:
    if summary.pages_elsewhere:
        yield Finding("warning", "pages", "went over multifd channels, which are not in the file")
        return
    unnamed = {
        block.idstr: block.page_count - int(np.count_nonzero(block.named))
        for block in summary.blocks
    }
    missing = {name: count for name, count in unnamed.items() if count}
    if missing:
        text = ", ".join(f"{count} of '{name}'" for name, count in missing.items())
        yield Finding("warning", "pages", f"never named, so taken as zero: {text}")
    else:
        pages = sum(block.page_count for block in summary.blocks)
        present = sum(block.present_count for block in summary.blocks)
        yield Finding("ok", "pages", f"{pages} pages, {present} of them not zero")


def _check_bitmaps(summary: FileSummary) -> Iterator[Finding]:
    """Bits behind the last page, and pages in holes."""
    fd = open_file(summary.path)
    try:
        contents = read_contents(fd, str(summary.path), position=summary.container.position)
        for block in contents.blocks:
            raw = np.frombuffer(os.pread(fd, block.bitmap_bytes, block.bitmap_position), np.uint8)
            if np.unpackbits(raw, bitorder="little")[block.page_count :].any():
                text = f"'{block.idstr}' has bits behind its last page"
                yield Finding("error", "bitmaps", text)
                return
    finally:
        os.close(fd)
    yield Finding("ok", "bitmaps", f"{len(contents.blocks)}, inside their blocks")


def _check_sidecar(summary: FileSummary) -> Iterator[Finding]:
    """The record of a daemon's directory, if the file is in one."""
    if summary.path.suffix != SUFFIX:
        return
    path = summary.path.with_suffix(".json")
    try:
        sidecar = read_sidecar(path)
    except StoreError as error:
        yield Finding("error", "record", str(error))
        return
    if sidecar is None or sidecar.file_bytes is None:
        return
    found = (summary.container.size, summary.metadata_crc32)
    if found == (sidecar.file_bytes, sidecar.metadata_crc32):
        yield Finding("ok", "sums", f"size and sum are those of '{path}'; owner: {sidecar.owner}")
    else:
        yield Finding("error", "sums", f"the file is not the one that '{path}' describes")
