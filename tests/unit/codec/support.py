"""Small streams made by hand."""

from collections.abc import Iterable

from migrationd.codec.records import OpaqueSection, Record
from migrationd.codec.stream import StreamDecoder, StreamLimits

PAGE = 4096

HEAD = b"QEVM\0\0\0\3" + b"\x07\0\0\0\x02pc"


def be(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "big")


def cstr8(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def full(number: int, idstr: str, body: bytes, instance: int = 0, *, footer: bool = True) -> bytes:
    head = b"\x04" + be(number, 4) + cstr8(idstr) + be(instance, 4) + be(1, 4)
    return head + body + (b"\x7e" + be(number, 4) if footer else b"")


def ram_start(blocks: dict[str, int], *, footer: bool = True) -> bytes:
    """START of ``ram`` with id 1; lengths in pages."""
    listed = b"".join(cstr8(name) + be(pages * PAGE) for name, pages in blocks.items())
    total = sum(blocks.values()) * PAGE
    body = be(total | 0x04) + listed + be(0x10)
    return b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04" + body + (FOOTER if footer else b"")


FOOTER = b"\x7e\0\0\0\x01"
PART = b"\x02\0\0\0\x01"
END = b"\x03\0\0\0\x01" + be(0x10)


def vmdescription(devices: Iterable[tuple[str, int, int]]) -> bytes:
    """EOF and VMDESCRIPTION; devices as name, instance and size."""
    entries = ", ".join(
        f'{{"name": "{name}", "instance_id": {instance}, "size": {size}, "fields": []}}'
        for name, instance, size in devices
    )
    text = f'{{"page_size": 4096, "devices": [{entries}]}}'.encode()
    return b"\0\x06" + be(len(text), 4) + text


def decode(
    data: bytes,
    *,
    limits: StreamLimits | None = None,
    piece: int = 1 << 20,
    eof: bool = True,
    idle: bool = False,
) -> list[Record]:
    """All records; arrays in them hold only if ``piece`` covers the input."""
    decoder = StreamDecoder(limits)
    out: list[Record] = []
    for start in range(0, len(data), piece):
        decoder.feed(data[start : start + piece])
        drain(decoder, out)
    if idle:
        decoder.idle()
        drain(decoder, out)
    if eof:
        decoder.feed_eof()
        drain(decoder, out)
    return out


def drain(decoder: StreamDecoder, out: list[Record]) -> None:
    while (record := decoder.next_record()) is not None:
        out.append(record)


def devices(records: Iterable[Record]) -> list[tuple[str, int, bytes]]:
    return [(r.idstr, r.instance_id, r.body) for r in records if isinstance(r, OpaqueSection)]
