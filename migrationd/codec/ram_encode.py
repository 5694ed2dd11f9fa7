"""RAM records for the way out, as arrays.

Reference: stream format 2.1 and 2.2; the decoder is ``codec/ram.py``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from migrationd.codec.constants import (
    ENCODING_FLAG_XBZRLE,
    RAM_SAVE_FLAG_COMPRESS_PAGE,
    RAM_SAVE_FLAG_CONTINUE,
    RAM_SAVE_FLAG_EOS,
    RAM_SAVE_FLAG_MEM_SIZE,
    RAM_SAVE_FLAG_MULTIFD_FLUSH,
    RAM_SAVE_FLAG_PAGE,
    RAM_SAVE_FLAG_XBZRLE,
    RAM_SAVE_FLAG_ZERO,
)
from migrationd.codec.header import encode_cstr8
from migrationd.codec.records import RamBlockEntry

XBZRLE_HEAD_BYTES = 11
"""Of an XBZRLE|CONTINUE record: word, encoding flag and length."""


def page_headers(pages: npt.NDArray[np.int64], page_size: int) -> npt.NDArray[np.uint8]:
    """Words of PAGE|CONTINUE records.

    Args:
        pages: Target page numbers, shape ``(n,)``.
        page_size: Target page size in bytes.

    Returns:
        Big-endian words as bytes, shape ``(n, 8)``, contiguous.
    """
    words = (pages * page_size | (RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE)).astype(">u8")
    return words.view(np.uint8).reshape(len(pages), 8)


def zero_records(pages: npt.NDArray[np.int64], page_size: int) -> npt.NDArray[np.uint8]:
    """ZERO|CONTINUE records.

    Returns:
        Whole records, shape ``(n, 9)``, contiguous.
    """
    records = np.zeros((len(pages), 9), np.uint8)
    words = (pages * page_size | (RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE)).astype(">u8")
    records[:, :8] = words.view(np.uint8).reshape(len(pages), 8)
    return records


def xbzrle_records(
    pages: npt.NDArray[np.int64],
    page_size: int,
    edits: npt.NDArray[np.uint8],
    sizes: npt.NDArray[np.int64],
) -> npt.NDArray[np.uint8]:
    """XBZRLE|CONTINUE records.

    Args:
        pages: Target page numbers, shape ``(n,)``.
        page_size: Target page size in bytes.
        edits: All edits, one behind the other.
        sizes: Bytes of each page's edit, 1 to ``page_size``, shape ``(n,)``.

    Returns:
        Whole records, one behind the other: 11 bytes, then the edit.
    """
    head = np.empty((len(pages), XBZRLE_HEAD_BYTES), np.uint8)
    words = pages * page_size | (RAM_SAVE_FLAG_XBZRLE | RAM_SAVE_FLAG_CONTINUE)
    head[:, :8] = words.astype(">u8").view(np.uint8).reshape(-1, 8)
    head[:, 8] = ENCODING_FLAG_XBZRLE
    head[:, 9:] = sizes.astype(">u2").view(np.uint8).reshape(-1, 2)
    ends = np.cumsum(sizes)
    is_head = np.zeros(len(edits) + head.size, np.bool_)
    begins = ends - sizes + np.arange(len(pages)) * XBZRLE_HEAD_BYTES
    is_head[(begins[:, None] + np.arange(XBZRLE_HEAD_BYTES)).reshape(-1)] = True
    records = np.empty(len(is_head), np.uint8)
    records[is_head] = head.reshape(-1)
    records[~is_head] = edits
    return records


def deflated_records(
    pages: npt.NDArray[np.int64], page_size: int, deflated: Sequence[bytes]
) -> bytes:
    """COMPRESS_PAGE|CONTINUE records.

    Args:
        pages: Target page numbers, shape ``(n,)``.
        page_size: Target page size in bytes.
        deflated: A zlib stream of each page.
    """
    flags = RAM_SAVE_FLAG_COMPRESS_PAGE | RAM_SAVE_FLAG_CONTINUE
    return b"".join(
        (page * page_size | flags).to_bytes(8, "big") + len(data).to_bytes(4, "big") + data
        for page, data in zip(pages.tolist(), deflated, strict=True)
    )


def encode_named_header(page: int, page_size: int, idstr: str, *, is_zero: bool) -> bytes:
    """Word and block name of the first record of a block; the payload follows."""
    flag = RAM_SAVE_FLAG_ZERO if is_zero else RAM_SAVE_FLAG_PAGE
    return _named_word(page * page_size | flag, idstr)


def name_xbzrle_record(record: bytes, idstr: str) -> bytes:
    """An XBZRLE|CONTINUE record that names its block instead."""
    word = int.from_bytes(record[:8], "big") & ~RAM_SAVE_FLAG_CONTINUE
    return _named_word(word, idstr) + record[8:]


def _named_word(word: int, idstr: str) -> bytes:
    return word.to_bytes(8, "big") + encode_cstr8(idstr)


def encode_block_list(blocks: tuple[RamBlockEntry, ...], total_bytes: int | None = None) -> bytes:
    """MEM_SIZE record with its block list; optional fields are written where they are set."""
    if total_bytes is None:
        total_bytes = sum(block.used_length for block in blocks)
    out = [(total_bytes | RAM_SAVE_FLAG_MEM_SIZE).to_bytes(8, "big")]
    for block in blocks:
        out.append(encode_cstr8(block.idstr) + block.used_length.to_bytes(8, "big"))
        if block.page_size is not None:
            out.append(block.page_size.to_bytes(8, "big"))
        if block.address is not None:
            out.append(block.address.to_bytes(8, "big"))
        if (header := block.mapped_ram) is not None:
            out.append(
                header.version.to_bytes(4, "big")
                + header.page_size.to_bytes(8, "big")
                + header.bitmap_position.to_bytes(8, "big")
                + header.pages_position.to_bytes(8, "big")
            )
    return b"".join(out)


def encode_eos() -> bytes:
    """The record that ends a RAM body."""
    return RAM_SAVE_FLAG_EOS.to_bytes(8, "big")


def encode_multifd_flush() -> bytes:
    """The record that is a synchronisation point of the channels."""
    return RAM_SAVE_FLAG_MULTIFD_FLUSH.to_bytes(8, "big")
