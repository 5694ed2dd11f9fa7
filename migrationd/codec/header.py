"""File header and CONFIGURATION.

    be32 magic  be32 version
    07  be32 n  n bytes machine type
        { 05  cstr8 name  be32 version  body }*     configuration/target-page-bits: be32
                                                    configuration/capabilities: be32 n, n cstr8
                                                    configuration/uuid: 16 bytes

Reference: stream format 1.1 and 1.3.
"""

from migrationd.codec.buffer import ReadBuffer
from migrationd.codec.constants import (
    QEMU_VM_CONFIGURATION,
    QEMU_VM_FILE_MAGIC,
    QEMU_VM_FILE_VERSION,
    QEMU_VM_SUBSECTION,
    TARGET_PAGE_BITS_MAX,
    TARGET_PAGE_BITS_MIN,
)
from migrationd.codec.records import Configuration, FileHeader
from migrationd.errors import StreamCorrupt, StreamUnsupported

MACHINE_NAME_LIMIT = 1024
CAPABILITY_LIMIT = 64

_PREFIX = "configuration/"
_PAGE_BITS = _PREFIX + "target-page-bits"
_CAPABILITIES = _PREFIX + "capabilities"
_UUID = _PREFIX + "uuid"


def decode_file_header(buffer: ReadBuffer) -> FileHeader:
    """Decode magic and version.

    Raises:
        NeedData: They are not complete.
        StreamCorrupt: Not a migration stream.
        StreamUnsupported: Another version.
    """
    magic = buffer.uint(4)
    if magic != QEMU_VM_FILE_MAGIC:
        raise StreamCorrupt(
            f"Not a migration stream: it begins with {magic:#010x}, not 0x5145564d (QEVM)",
            position=buffer.position,
        )
    version = buffer.uint(4, 4)
    if version != QEMU_VM_FILE_VERSION:
        raise StreamUnsupported(
            f"stream version {version}, only 3 is known", position=buffer.position + 4
        )
    buffer.skip(8)
    return FileHeader(version)


def encode_file_header(header: FileHeader) -> bytes:
    """Encode magic and version."""
    return QEMU_VM_FILE_MAGIC.to_bytes(4, "big") + header.version.to_bytes(4, "big")


def decode_configuration(buffer: ReadBuffer) -> Configuration:
    """Decode CONFIGURATION, whose type byte is at the cursor.

    Raises:
        NeedData: It is not complete; one byte beyond it is needed to see its end.
        StreamCorrupt: A length or value is out of range.
        StreamUnsupported: An unknown subsection.
    """
    length = buffer.uint(4, 1)
    if length > MACHINE_NAME_LIMIT:
        raise _corrupt(buffer, f"machine type name of {length} bytes")
    machine = buffer.peek(length, 5).decode("latin-1")
    at = 5 + length
    page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None
    while buffer.uint(1, at) == QEMU_VM_SUBSECTION:
        name_length = buffer.uint(1, at + 1)
        name = buffer.peek(name_length, at + 2).decode("latin-1")
        version = buffer.uint(4, at + 2 + name_length)
        at += 6 + name_length
        if version != 1:
            raise _corrupt(buffer, f"subsection '{name}' version {version}")
        if name == _PAGE_BITS:
            page_bits = buffer.uint(4, at)
            if not TARGET_PAGE_BITS_MIN <= page_bits <= TARGET_PAGE_BITS_MAX:
                raise _corrupt(buffer, f"target page bits {page_bits}")
            at += 4
        elif name == _CAPABILITIES:
            capabilities, at = _decode_capabilities(buffer, at)
        elif name == _UUID:
            uuid = buffer.peek(16, at)
            at += 16
        else:
            raise StreamUnsupported(
                f"unknown subsection '{name}'", position=buffer.position, section="configuration"
            )
    buffer.skip(at)
    return Configuration(machine, page_bits, capabilities, uuid)


def encode_configuration(configuration: Configuration) -> bytes:
    """Encode CONFIGURATION with its type byte."""
    machine = configuration.machine.encode("latin-1")
    out = bytes([QEMU_VM_CONFIGURATION]) + len(machine).to_bytes(4, "big") + machine
    if configuration.target_page_bits is not None:
        out += _subsection(_PAGE_BITS) + configuration.target_page_bits.to_bytes(4, "big")
    if configuration.capabilities is not None:
        out += _subsection(_CAPABILITIES) + len(configuration.capabilities).to_bytes(4, "big")
        for name in configuration.capabilities:
            out += encode_cstr8(name)
    if configuration.uuid is not None:
        out += _subsection(_UUID) + configuration.uuid
    return out


def encode_cstr8(text: str) -> bytes:
    """A counted string: one length byte, then Latin-1 bytes."""
    raw = text.encode("latin-1")
    return bytes([len(raw)]) + raw


def _decode_capabilities(buffer: ReadBuffer, at: int) -> tuple[tuple[str, ...], int]:
    count = buffer.uint(4, at)
    if count > CAPABILITY_LIMIT:
        raise _corrupt(buffer, f"{count} capabilities")
    at += 4
    names = []
    for _ in range(count):
        length = buffer.uint(1, at)
        names.append(buffer.peek(length, at + 1).decode("latin-1"))
        at += 1 + length
    return tuple(names), at


def _subsection(name: str) -> bytes:
    return bytes([QEMU_VM_SUBSECTION]) + encode_cstr8(name) + (1).to_bytes(4, "big")


def _corrupt(buffer: ReadBuffer, message: str) -> StreamCorrupt:
    return StreamCorrupt(message, position=buffer.position, section="configuration")
