"""Everything of the stream that is not RAM: its head and, after the switchover, its tail.

Reference: element order, stream format 1.4; device sections are replayed as they
came (7.7), only their ids are made unique again.
"""

from collections.abc import Sequence

from migrationd.codec.constants import (
    MIG_CMD_OPEN_RETURN_PATH,
    MIG_CMD_PING,
    MIG_CMD_SWITCHOVER_START,
    QEMU_VM_FILE_VERSION,
)
from migrationd.codec.encode import StreamEncoder, encode_opaque_section
from migrationd.codec.records import (
    Command,
    Configuration,
    EndOfStream,
    FileHeader,
    OpaqueSection,
    VmDescription,
)
from migrationd.codec.vmdescription import with_configuration
from migrationd.guest.base import Guest
from migrationd.guest.device import DeviceState
from migrationd.migration.dialect import Dialect

EMPTY_VMDESCRIPTION = b"{}"
"""A destination reads a description after the end; any JSON will do."""


READY_PING = 2
"""Number of the PING behind the block list, where there is one."""


def free_section_id(devices: Sequence[DeviceState]) -> int:
    """Smallest section id that no device of the guest uses."""
    used = {device.section_id for device in devices}
    return next(number for number in range(len(used) + 1) if number not in used)


def stream_head(
    guest: Guest,
    dialect: Dialect,
    *,
    return_path: bool,
    uuid: bytes | None,
    advise: bytes = b"",
    capabilities: tuple[str, ...] | None = None,
) -> bytes:
    """File header, configuration, first commands and early device sections.

    Args:
        guest: The guest to send.
        dialect: Its wire dialect.
        return_path: Whether to open the return path.
        uuid: UUID to send for ``validate-uuid``, 16 bytes, or None.
        advise: Command that announces postcopy, if any.
        capabilities: Those that both ends must have on; None sends none.
    """
    encode_record = StreamEncoder().encode
    parts = [encode_record(FileHeader(QEMU_VM_FILE_VERSION))]
    configuration = _configuration(guest, uuid, capabilities)
    if dialect.send_configuration and configuration is not None:
        parts.append(encode_record(configuration))
    if return_path:
        parts.append(encode_record(Command(MIG_CMD_OPEN_RETURN_PATH, b"")))
        parts.append(encode_record(Command(MIG_CMD_PING, (1).to_bytes(4, "big"))))
    parts.append(advise)
    parts += [encode_device(device, dialect) for device in guest.devices if device.is_of_setup]
    return b"".join(parts)


def ready_ping() -> bytes:
    """A PING whose answer says that everything before it was read."""
    return StreamEncoder().encode(Command(MIG_CMD_PING, READY_PING.to_bytes(4, "big")))


def stream_tail(
    guest: Guest,
    dialect: Dialect,
    ram_end: bytes,
    *,
    uuid: bytes | None = None,
    capabilities: tuple[str, ...] | None = None,
) -> bytes:
    """From the switchover to the last byte: END sections, devices, EOF, VMDESCRIPTION."""
    encode_record = StreamEncoder().encode
    parts = []
    if dialect.send_switchover_start:
        parts.append(encode_record(Command(MIG_CMD_SWITCHOVER_START, b"")))
    late = [d for d in guest.devices if not d.is_of_setup]
    parts += [encode_device(d, dialect) for d in late if not d.is_device]
    parts.append(ram_end)
    parts += full_sections(guest, dialect)
    parts.append(encode_record(EndOfStream()))
    if dialect.send_vmdescription:
        description = guest.vmdescription or EMPTY_VMDESCRIPTION
        if (configuration := _configuration(guest, uuid, capabilities)) is not None:
            description = with_configuration(description, configuration)
        parts.append(encode_record(VmDescription(description)))
    return b"".join(parts)


def _configuration(
    guest: Guest, uuid: bytes | None, capabilities: tuple[str, ...] | None
) -> Configuration | None:
    """What a stream of the guest begins with."""
    identity = guest.identity
    if identity.machine is None:
        return None
    return Configuration(identity.machine, identity.target_page_bits, capabilities, uuid)


def full_sections(guest: Guest, dialect: Dialect) -> list[bytes]:
    """FULL sections of a guest: the state of its devices when it stands still."""
    return [encode_device(device, dialect) for device in guest.devices if device.is_device]


def encode_device(device: DeviceState, dialect: Dialect) -> bytes:
    """A device section as it came."""
    return encode_opaque_section(
        OpaqueSection(
            kind=device.kind,
            section_id=device.section_id,
            idstr=device.idstr,
            instance_id=device.instance_id,
            version_id=device.version_id,
            body=device.body,
            has_footer=dialect.send_section_footers,
        )
    )
