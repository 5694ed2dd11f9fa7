"""Capabilities and parameters of the monitor as what an engine is started with. Pure."""

from uuid import UUID

from migrationd.errors import QMPError
from migrationd.guest.ram_block import IGNORE_SHARED
from migrationd.incoming.berth import IncomingSettings
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.migration.convergence import ThrottleSettings
from migrationd.migration.options import MigrationOptions
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.file_save import FileSettings
from migrationd.outgoing.multifd_send import MultifdSettings
from migrationd.outgoing.postcopy_learned import Order
from migrationd.outgoing.postcopy_source import PostcopySettings

_WITHOUT_COMPRESS = ("multifd", "postcopy-ram", "mapped-ram", "background-snapshot")
"""Pages that are deflated one by one go on the main connection, in precopy."""


def outgoing_settings(
    options: MigrationOptions,
    uuid: UUID | None,
    *,
    starts_postcopy_at_once: bool,
    is_clone: bool = False,
    compress_level: int | None = None,
    learned: Order | None,
) -> OutgoingSettings:
    """What ``migrate`` goes by from now on.

    Args:
        options: As they are now.
        uuid: Of the guest.
        starts_postcopy_at_once: ``-start-postcopy``.
        is_clone: ``-keep``.
        compress_level: ``-compress``.
        learned: Order in which the guest asked for its pages before.

    Raises:
        QMPError: ``-compress`` does not go with a capability that is on.
    """
    capabilities = options.capabilities
    parameters = options.parameters
    for name in _WITHOUT_COMPRESS if compress_level is not None else ():
        if capabilities[name]:
            raise QMPError(f"Capability '{name}' cannot be combined with -compress")
    return OutgoingSettings(
        return_path=capabilities["return-path"],
        pause_before_switchover=capabilities["pause-before-switchover"],
        uuid=uuid.bytes if capabilities["validate-uuid"] and uuid is not None else None,
        max_bandwidth_bytes_per_s=number(parameters["max-bandwidth"]),
        downtime_limit_ms=number(parameters["downtime-limit"]),
        avail_switchover_bytes_per_s=number(parameters["avail-switchover-bandwidth"]),
        postcopy=PostcopySettings(
            preempt=capabilities["postcopy-preempt"],
            at_once=starts_postcopy_at_once,
            is_clone=is_clone,
            max_bandwidth_bytes_per_s=number(parameters["max-postcopy-bandwidth"]),
            learned=learned,
        )
        if capabilities["postcopy-ram"]
        else None,
        postcopy_blocktime=capabilities["postcopy-blocktime"],
        file=_file(options),
        multifd=_multifd(options, uuid),
        detects_zero_pages=parameters["zero-page-detection"] != "none",
        throttle=_throttle(options),
        throttle_trigger_threshold=number(parameters["throttle-trigger-threshold"]),
        dirty_limit_bytes_per_s=number(parameters["vcpu-dirty-limit"]) << 20
        if capabilities["dirty-limit"]
        else None,
        switchover_ack=capabilities["switchover-ack"],
        mode=_text(parameters["mode"]),
        ignores_shared=capabilities[IGNORE_SHARED],
        checkpoint_delay_ms=number(parameters["x-checkpoint-delay"])
        if capabilities["x-colo"]
        else None,
        xbzrle_cache_bytes=number(parameters["xbzrle-cache-size"])
        if capabilities["xbzrle"]
        else None,
        compress_level=compress_level,
        dirty_bitmaps=capabilities["dirty-bitmaps"],
        bitmap_mapping=_mapping(options),
        background_snapshot=capabilities["background-snapshot"],
    )


def incoming_settings(
    options: MigrationOptions, uuid: UUID | None, *, ram_limit_bytes: int | None
) -> IncomingSettings:
    """What an incoming migration goes by when its stream begins.

    Args:
        options: As they are now.
        uuid: ``-uuid``.
        ram_limit_bytes: ``-ram-limit``.

    Raises:
        QMPError: A capability that is on has no engine part.
    """
    options.check_built()
    capabilities = options.capabilities
    has_channels = capabilities["multifd"] and not capabilities["mapped-ram"]
    return IncomingSettings(
        ram_limit_bytes=ram_limit_bytes,
        colo=capabilities["x-colo"],
        switchover_ack=capabilities["switchover-ack"],
        guest_uuid=uuid.bytes if uuid is not None else None,
        mapped_ram=capabilities["mapped-ram"],
        ignores_shared=capabilities[IGNORE_SHARED],
        postcopy_ram=capabilities["postcopy-ram"],
        postcopy_preempt=capabilities["postcopy-preempt"],
        postcopy_blocktime=capabilities["postcopy-blocktime"],
        multifd_channels=number(options.parameters["multifd-channels"]) if has_channels else 0,
        multifd_compression=_text(options.parameters["multifd-compression"]),
        bitmap_mapping=_mapping(options),
    )


def number(value: object) -> int:
    """A parameter that the monitor's model made sure is a number."""
    assert isinstance(value, int)
    return value


def _mapping(options: MigrationOptions) -> BitmapMapping | None:
    mapping = options.parameters["block-bitmap-mapping"]
    assert mapping is None or isinstance(mapping, tuple)
    return mapping


def _text(value: object) -> str:
    assert isinstance(value, str)
    return value


def _throttle(options: MigrationOptions) -> ThrottleSettings | None:
    parameters = options.parameters
    if not options.capabilities["auto-converge"]:
        return None
    return ThrottleSettings(
        initial=number(parameters["cpu-throttle-initial"]),
        increment=number(parameters["cpu-throttle-increment"]),
        maximum=number(parameters["max-cpu-throttle"]),
        trigger_threshold=number(parameters["throttle-trigger-threshold"]),
    )


def _file(options: MigrationOptions) -> FileSettings | None:
    capabilities, parameters = options.capabilities, options.parameters
    if not capabilities["mapped-ram"]:
        return None
    if not capabilities["multifd"]:
        return FileSettings()  # as at QEMU, direct-io asks for nothing then
    return FileSettings(
        writers=number(parameters["multifd-channels"]), direct_io=bool(parameters["direct-io"])
    )


def _multifd(options: MigrationOptions, uuid: UUID | None) -> MultifdSettings | None:
    capabilities, parameters = options.capabilities, options.parameters
    if not capabilities["multifd"] or capabilities["mapped-ram"]:
        return None
    compression = _text(parameters["multifd-compression"])
    level = parameters.get(f"multifd-{compression}-level")
    return MultifdSettings(
        channels=number(parameters["multifd-channels"]),
        compression=compression,
        level=number(level) if level is not None else 0,
        zero_copy=capabilities["zero-copy-send"],
        zero_page_detection=_text(parameters["zero-page-detection"]),
        uuid=uuid.bytes if uuid is not None else bytes(16),
    )
