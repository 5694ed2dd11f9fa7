"""Page records into the blocks they belong to; the same for each channel that brings them."""

from migrationd.codec.records import MixedBatch, PageBatch, ZeroBatch
from migrationd.errors import StreamUnsupported
from migrationd.guest.ram_block import RamBlock


def place_record(
    block: RamBlock, record: PageBatch | MixedBatch | ZeroBatch, position: int
) -> None:
    """Place the pages of one record.

    Args:
        block: Their block.
        record: From any channel's decoder.
        position: Where that decoder is, for errors.

    Raises:
        GuestError: The memory cannot be written.
        StreamUnsupported: Pages filled with another byte than zero.
    """
    match record:
        case PageBatch():
            block.place_batch(record.pages, record.data, record.is_run)
        case MixedBatch():
            block.place_mixed(record.pages, record.content_at, record.buffer)
        case ZeroBatch():
            check_fill(record, position, block.idstr)
            block.zero_batch(record.pages)


def check_fill(record: ZeroBatch, position: int, block: str) -> None:
    """Pages of one byte are taken if that is zero, as every QEMU sends them.

    Raises:
        StreamUnsupported: It is another one.
    """
    if record.fill:
        raise StreamUnsupported(
            f"a page filled with byte {record.fill:#04x} is not taken",
            position=position,
            block=block,
        )
