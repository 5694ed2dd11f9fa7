"""Runs a recorded stream through the decoder, into plain memory and back to bytes."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from migrationd.codec.encode import StreamEncoder
from migrationd.codec.ram import inflate_page
from migrationd.codec.records import (
    Command,
    CompressedPage,
    MixedBatch,
    MultifdFlush,
    OpaqueSection,
    Package,
    PageBatch,
    RamBlockList,
    RamEos,
    Record,
    VmDescription,
    XbzrleBatch,
    XbzrlePage,
    ZeroBatch,
)
from migrationd.codec.stream import StreamDecoder
from migrationd.errors import StreamError
from migrationd.pageops.xbzrle import decode_page

PAGE_SIZE = 4096
"""Of every recorded stream."""

Step = tuple[Any, ...]


@dataclass
class Replay:
    """What a stream held.

    Attributes:
        encoded: The records encoded again.
        memory: Contents of each RAM block.
        counts: Page records by kind.
        commands: Command numbers, in order, those of a package left out.
        sections: Opaque sections, those of a package included.
        blocks: Names and lengths of the RAM blocks.
        description: VMDESCRIPTION.
        finished: Whether the decoder saw the end of the stream.
        end: Stream position of the next undecoded byte.
        error: What ended it, if not the end of the stream.
    """

    encoded: bytearray = field(default_factory=bytearray)
    memory: dict[str, bytearray] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    commands: list[int] = field(default_factory=list)
    sections: list[OpaqueSection] = field(default_factory=list)
    blocks: list[tuple[str, int]] = field(default_factory=list)
    description: bytes | None = None
    finished: bool = False
    end: int = 0
    error: StreamError | None = None


def pieces(data: bytes, sizes: Iterable[int]) -> Iterator[memoryview]:
    """Cut ``data`` into pieces of these sizes; the last one takes what is left."""
    view = memoryview(data)
    for size in sizes:
        if not view:
            return
        yield view[:size]
        view = view[size:]
    if view:
        yield view


def records(decoder: StreamDecoder, parts: Iterable[bytes | memoryview]) -> Iterator[Record]:
    """Every record of a stream; views in a record hold until the next one is taken."""
    for part in parts:
        decoder.feed(part)
        while (record := decoder.next_record()) is not None:
            yield record
    decoder.feed_eof()
    while (record := decoder.next_record()) is not None:
        yield record


def replay(data: bytes) -> Replay:
    """Decode a main stream, apply its pages, encode it again."""
    result = Replay()
    decoder = StreamDecoder()
    encoder = StreamEncoder()
    try:
        for record in records(decoder, pieces(data, [100_000] * (len(data) // 100_000))):
            result.encoded += encoder.encode(record)
            _apply(result, decoder, record)
    except StreamError as error:
        result.error = error
    result.finished = decoder.finished
    result.end = decoder.position
    return result


def _apply(result: Replay, decoder: StreamDecoder, record: Record) -> None:
    if isinstance(record, RamBlockList):
        for block in record.blocks:
            result.memory[block.idstr] = bytearray(block.used_length)
            result.blocks.append((block.idstr, block.used_length))
    elif isinstance(record, Command):
        result.commands.append(record.number)
    elif isinstance(record, VmDescription):
        result.description = record.json
    elif isinstance(record, OpaqueSection):
        result.sections.append(record)
    elif isinstance(record, Package):
        result.sections += [r for r in record.records if isinstance(r, OpaqueSection)]
    elif isinstance(record, RamEos):
        result.counts["eos"] += 1
    elif isinstance(record, MultifdFlush):
        result.counts["mfdflush"] += 1
    else:
        for kind, block, page, content in page_steps(record):
            result.counts[kind] += 1
            size = decoder.page_size
            memory = result.memory[decoder.blocks[block].idstr]
            if kind == "xbzrle":
                edited = memory[page * size : (page + 1) * size]
                decode_page(content, edited)
                content = edited
            elif kind == "compress":
                content = inflate_page(content, size)
            elif kind == "zero":
                content = content * size
            memory[page * size : (page + 1) * size] = content
            assert len(memory) == decoder.blocks[block].used_length


def page_steps(record: Record) -> Iterator[tuple[str, int, int, bytes]]:
    """A page record as single pages: kind, block, page and content, whatever its batch is."""
    if isinstance(record, PageBatch):
        for page, content in zip(record.pages.tolist(), record.data, strict=True):
            yield "page", record.block, page, content.tobytes()
    elif isinstance(record, ZeroBatch):
        for page in record.pages.tolist():
            yield "zero", record.block, page, bytes([record.fill])
    elif isinstance(record, MixedBatch):
        for page, content in _mixed(record):
            kind = "page" if content else "zero"
            yield kind, record.block, page, content or b"\0"
    elif isinstance(record, XbzrleBatch):
        for index in range(len(record.pages)):
            yield from page_steps(record.single(index))
    elif isinstance(record, XbzrlePage):
        yield "xbzrle", record.block, record.page, record.encoded
    elif isinstance(record, CompressedPage):
        yield "compress", record.block, record.page, record.compressed


def _mixed(record: MixedBatch) -> Iterator[tuple[int, bytes | None]]:
    """Page number and content; None for a zero page."""
    for page, at in zip(record.pages, record.content_at, strict=True):
        yield page, bytes(record.buffer[at : at + PAGE_SIZE]) if at >= 0 else None


def steps(decoder: StreamDecoder, parts: Iterable[bytes | memoryview]) -> list[Step]:
    """The records in a form that can be compared: batches as single pages."""
    out: list[Step] = []
    for record in records(decoder, parts):
        single = list(page_steps(record))
        out += single or [(record,)]
    return out
