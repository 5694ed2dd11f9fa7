"""``NAME.order``: the order in which a guest at rest asked for its pages.

    8 bytes magic   be32 CRC of what follows   be32 blocks   be32 entries
    { cstr8 name   be64 pages }*
    { be16 block   be48 page }*

It is a hint: a file that is missing, damaged or of another guest is as good as none.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from migrationd.codec.header import encode_cstr8

_MAGIC = b"MDORDER1"
_HEAD_BYTES = 20
_ENTRY_BYTES = 8
_PAGE_BITS = 48
_LIMIT_BYTES = 16 << 20

Order = npt.NDArray[np.int64]
Blocks = Sequence[tuple[str, int]]
"""Name and target pages of each block, in the order of the block list."""


def write_order(path: Path, blocks: Blocks, order: Order) -> None:
    """Replace the file; no sync, for nothing is lost with it.

    Args:
        path: File.
        blocks: Blocks of the guest.
        order: Shape ``(n, 2)``: block index, page.

    Raises:
        OSError: It cannot be written.
    """
    entries = (order[:, 0] << _PAGE_BITS | order[:, 1]).astype(">u8").tobytes()
    body = (
        len(blocks).to_bytes(4, "big")
        + len(order).to_bytes(4, "big")
        + b"".join(encode_cstr8(name) + pages.to_bytes(8, "big") for name, pages in blocks)
        + entries
    )
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(_MAGIC + zlib.crc32(body).to_bytes(4, "big") + body)
        os.rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_order(path: Path, blocks: Blocks) -> Order | None:
    """Read the file; None if there is none that belongs to these blocks."""
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            return None
        raw = path.read_bytes()
    except OSError:
        return None
    body = raw[12:]
    if raw[:8] != _MAGIC or len(raw) < _HEAD_BYTES:
        return None
    if int.from_bytes(raw[8:12], "big") != zlib.crc32(body):
        return None
    head = len(blocks).to_bytes(4, "big")
    count = int.from_bytes(body[4:8], "big")
    names = b"".join(encode_cstr8(name) + pages.to_bytes(8, "big") for name, pages in blocks)
    begin = 8 + len(names)
    if body[:4] != head or body[8:begin] != names or len(body) != begin + count * _ENTRY_BYTES:
        return None
    packed = np.frombuffer(body, ">u8", count, begin).astype(np.int64)
    order = np.stack((packed >> _PAGE_BITS, packed & ((1 << _PAGE_BITS) - 1)), axis=1)
    page_counts = np.array([pages for _, pages in blocks], np.int64)
    if count and not (
        order[:, 0].min() >= 0
        and order[:, 0].max() < len(blocks)
        and bool(np.all(order[:, 1] < page_counts[order[:, 0]]))
    ):
        return None
    return order
