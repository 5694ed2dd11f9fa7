"""From what a stream brought to a guest: who it is, its blocks, and its last touches."""

from migrationd.codec.records import Configuration, RamBlockList
from migrationd.errors import StreamCorrupt, StreamUnsupported
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.held import HeldGuest
from migrationd.guest.ram_block import IGNORE_SHARED, RamBlockSpec
from migrationd.incoming.loader import Arrival
from migrationd.migration.dialect import describes_devices
from migrationd.migration.dirty_bitmaps import without_incomplete


def check_configuration(
    configuration: Configuration,
    own_uuid: bytes | None,
    position: int,
    *,
    ignores_shared: bool = False,
) -> None:
    """Refuse a stream that does not fit.

    Args:
        configuration: What the stream says.
        own_uuid: UUID that the guest must have, 16 bytes; None takes any.
        position: Stream position, for errors.
        ignores_shared: Whether ``x-ignore-shared`` is on here.

    Raises:
        StreamError: A capability is not the same at both ends, or the UUID is another one.
    """
    theirs = set(configuration.capabilities or ())
    here = {IGNORE_SHARED} if ignores_shared else set()
    for name in sorted(theirs ^ here):
        own, received = ("on", "off") if name in here else ("off", "on")
        raise StreamUnsupported(
            f"Capability {name} is {own}, but received capability is {received}",
            position=position,
            section="configuration",
        )
    check_uuid(configuration, own_uuid, position)


def check_uuid(configuration: Configuration, own_uuid: bytes | None, position: int) -> None:
    """Refuse another guest; as :func:`check_configuration`.

    Raises:
        StreamCorrupt: The UUID is another one.
    """
    theirs = configuration.uuid
    if theirs is not None and own_uuid is not None and theirs != own_uuid:
        raise StreamCorrupt(
            f"the source's UUID {theirs.hex()} is not this guest's {own_uuid.hex()}",
            position=position,
            section="configuration/uuid",
            hint="start the daemon with the source's -uuid",
        )


def identity_of(arrival: Arrival, channel_uuid: bytes | None) -> GuestIdentity:
    """Who the guest is; multifd tells a UUID also where the configuration has none."""
    known_uuid = channel_uuid if channel_uuid != bytes(16) else None
    configuration = arrival.configuration
    if configuration is None:
        return GuestIdentity(uuid=known_uuid)
    return GuestIdentity(
        machine=configuration.machine,
        target_page_bits=configuration.target_page_bits,
        capabilities=configuration.capabilities,
        uuid=configuration.uuid or known_uuid,
    )


def specs_of(blocks: RamBlockList, page_size: int) -> tuple[RamBlockSpec, ...]:
    """What memory the guest needs, in the order of the block list."""
    return tuple(
        RamBlockSpec(
            idstr=entry.idstr,
            used_length=entry.used_length,
            page_size=page_size,
            address=entry.address,
            backing_page_size=entry.page_size,
        )
        for entry in blocks.blocks
    )


def complete(guest: HeldGuest, arrival: Arrival, *, by_postcopy: bool) -> None:
    """Add what came besides pages: the guest is whole then.

    A guest that came by postcopy leaves by precopy like any other. What came behind its
    devices leaves before them, and a description, which its stream never has, is sent again
    where the machine type sends one. A dirty bitmap that came in part is none.

    Raises:
        StreamCorrupt: The dirty bitmaps are malformed.
    """
    has_description = arrival.vmdescription is not None
    devices = without_incomplete(arrival.devices)
    if by_postcopy:
        devices = sorted(devices, key=lambda device: device.is_device)
        has_description = describes_devices(identity_of(arrival, None).machine)
    guest.complete(
        devices,
        arrival.vmdescription,
        SeenOnArrival(
            configuration=arrival.configuration is not None,
            section_footers=arrival.has_footers,
            vmdescription=has_description,
            switchover_start=arrival.has_switchover_start,
        ),
    )
