"""Cuts a row of FULL sections anew, with the sizes and names of the VMDESCRIPTION.

Used where footers alone led astray (a device body that holds what looks like a footer
and the head of a section), and for streams without footers. Depth first: the size
that the description gives is tried first, then every other place where the head of
the next device follows; the whole row must come out even.

Reference: stream format 7.5 and 7.6; a described size can be wrong, names cannot.
"""

import re
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.constants import (
    QEMU_VM_EOF,
    QEMU_VM_SECTION_FOOTER,
    QEMU_VM_SECTION_FULL,
    QEMU_VM_VMDESCRIPTION,
)
from migrationd.codec.header import encode_cstr8
from migrationd.codec.records import OpaqueSection
from migrationd.codec.vmdescription import DeviceSize, device_sizes

_ATTEMPTS = 100_000
"""Places that are tried before the search is given up."""

_SEARCH_BYTES = 64 << 20
"""Bytes that are searched in vain, besides four times the input, before it is given up."""

_PARSED_PLACES = 64
"""Places that are parsed as a description before the input has ended."""

_INCOMPLETE_PLACES = 1024
"""Places that are remembered until what they announce has arrived."""

_FOOTER_BYTES = 5
_HEAD_BYTES = 7
_DESCRIPTION_HEAD = re.compile(
    bytes([QEMU_VM_EOF, QEMU_VM_VMDESCRIPTION]) + rb"(?=[\x00-\xff]{4}\{)", re.DOTALL
)


def find_description_at_end(buffer: ReadBuffer, limit: int) -> Iterator[tuple[int, bytes]]:
    """Find what may be EOF and a VMDESCRIPTION that reaches to the last byte of the input.

    Args:
        buffer: Input.
        limit: Most bytes of a description.

    Yields:
        Offset from the cursor of the EOF byte, and the JSON.
    """
    begin = max(buffer.start, buffer.end - limit - _HEAD_BYTES)
    for match in _DESCRIPTION_HEAD.finditer(buffer.data, begin, buffer.end):
        at = match.start() - buffer.start
        size = buffer.uint(4, at + 2)
        if at + 6 + size == len(buffer):
            yield at, buffer.peek(size, at + 6)


class DescriptionFinder:
    """Finds EOF and VMDESCRIPTION in input that is still arriving; looks at each byte once.

    Args:
        start: Offset from the cursor to begin at.
        limit: Most bytes of a description.
    """

    def __init__(self, start: int, limit: int) -> None:
        self._searched = start
        self._limit = limit
        self._incomplete: list[tuple[int, int]] = []
        self._tries = 0

    def find(self, buffer: ReadBuffer) -> Iterator[tuple[int, bytes]]:
        """Go on searching.

        Yields:
            Offset from the cursor of the EOF byte, and the JSON; of a few places only, for
            each one costs the time to parse it.
        """
        for match in _DESCRIPTION_HEAD.finditer(
            buffer.data, buffer.start + self._searched, buffer.end
        ):
            at = match.start() - buffer.start
            stop = at + 6 + buffer.uint(4, at + 2)
            if stop <= at + 6 + self._limit and len(self._incomplete) < _INCOMPLETE_PLACES:
                heappush(self._incomplete, (stop, at))
        self._searched = max(self._searched, len(buffer) - _HEAD_BYTES + 1)
        while self._incomplete and self._incomplete[0][0] <= len(buffer):
            stop, at = heappop(self._incomplete)
            if self._tries < _PARSED_PLACES and buffer.peek(1, stop - 1) == b"}":
                self._tries += 1
                yield at, buffer.peek(stop - at - 6, at + 6)


def described(description: bytes) -> list[DeviceSize]:
    """Devices that a description lists; empty if it is none or lists none."""
    try:
        return device_sizes(description)
    except ValueError:
        return []


def cut(
    raw: bytes, devices: Sequence[DeviceSize], *, has_footers: bool
) -> list[OpaqueSection] | None:
    """Cut a row of FULL sections.

    Args:
        raw: From the first header to the end of the last section.
        devices: The sections that must come out, in order.
        has_footers: Whether each section ends with a footer.

    Returns:
        The sections; None if they do not fall into place.
    """
    heads = [_head_pattern(device) for device in devices]
    tail_bytes = _FOOTER_BYTES if has_footers else 0
    if not devices or heads[0].match(raw) is None:
        return None

    def ends(index: int, at: int) -> Iterator[int]:
        """Where section ``index``, which begins at ``at``, may end; the described end first."""
        head = heads[index].match(raw, at)
        if head is None:
            return
        footer = bytes([QEMU_VM_SECTION_FOOTER]) + raw[at + 1 : at + 5] if has_footers else b""

        def is_end(stop: int) -> bool:
            return raw.startswith(footer, stop - tail_bytes)

        if index == len(devices) - 1:
            if len(raw) - tail_bytes >= head.end() and is_end(len(raw)):
                yield len(raw)
            return
        hinted = head.end() + devices[index].size + tail_bytes
        if hinted <= len(raw) and is_end(hinted) and heads[index + 1].match(raw, hinted):
            yield hinted
        for match in heads[index + 1].finditer(raw, head.end() + tail_bytes):
            if match.start() != hinted and is_end(match.start()):
                yield match.start()

    starts = [0]
    searches = [ends(0, 0)]
    tried: set[tuple[int, int]] = set()
    unread_bytes = _SEARCH_BYTES + 4 * len(raw)
    for _ in range(_ATTEMPTS):
        stop = next(searches[-1], None)
        if stop is None:
            searches.pop()
            unread_bytes -= len(raw) - starts.pop()
            if not searches or unread_bytes < 0:
                return None
        elif len(starts) == len(devices):
            return _sections(raw, [*starts, stop], heads, has_footers=has_footers)
        elif (len(starts), stop) not in tried:
            tried.add((len(starts), stop))
            searches.append(ends(len(starts), stop))
            starts.append(stop)
    return None


def _head_pattern(device: DeviceSize) -> re.Pattern[bytes]:
    """Header of a device's FULL section, whatever its id and version are."""
    return re.compile(
        re.escape(bytes([QEMU_VM_SECTION_FULL]))
        + rb"([\x00-\xff]{4})"
        + re.escape(encode_cstr8(device.idstr) + device.instance_id.to_bytes(4, "big"))
        + rb"([\x00-\xff]{4})",
        re.DOTALL,
    )


def _sections(
    raw: bytes, bounds: list[int], heads: list[re.Pattern[bytes]], *, has_footers: bool
) -> list[OpaqueSection]:
    out = []
    for index, pattern in enumerate(heads):
        head = pattern.match(raw, bounds[index])
        assert head is not None
        name_at = bounds[index] + 6
        name = raw[name_at : name_at + raw[name_at - 1]]
        body_end = bounds[index + 1] - (_FOOTER_BYTES if has_footers else 0)
        out.append(
            OpaqueSection(
                QEMU_VM_SECTION_FULL,
                int.from_bytes(head[1], "big"),
                name.decode("latin-1"),
                int.from_bytes(raw[name_at + len(name) : name_at + len(name) + 4], "big"),
                int.from_bytes(head[2], "big"),
                raw[head.end() : body_end],
                has_footers,
            )
        )
    return out
