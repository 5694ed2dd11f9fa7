"""Which handler sends a guest's RAM, and what each of them is made of."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.guest.base import Guest
from migrationd.migration.convergence import Convergence
from migrationd.migration.dialect import Dialect
from migrationd.migration.dirty_limit import DirtyLimit
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.compress_save import CompressSaver
from migrationd.outgoing.connection import OutgoingConnection
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.device_save import free_section_id
from migrationd.outgoing.file_save import FileSave, FileSettings
from migrationd.outgoing.multifd_connect import OutgoingMultifd
from migrationd.outgoing.multifd_save import MultifdSaver
from migrationd.outgoing.multifd_send import MultifdSettings
from migrationd.outgoing.postcopy_source import PostcopySource
from migrationd.outgoing.ram_save import PART_BYTES, RamSaver
from migrationd.outgoing.xbzrle_save import XbzrleSaver
from migrationd.transport.rate_limit import RateLimiter

Saver = RamSaver | MultifdSaver | XbzrleSaver | CompressSaver
Sent = dict[str, npt.NDArray[np.bool_]]
"""By block name one bool per page, set for pages that went out."""


class Savers:
    """Makes the handlers of one migration, over whichever connection there is.

    Args:
        guest: The guest; only read.
        dialect: Wire dialect of the guest.
        settings: Capabilities and parameters.
        stats: Counters of the migration.
        limiter: Bandwidth limit.
        clock: Time.
        postcopy: Who has which page, if the migration may become a postcopy.
        should_stop: Asked before each batch: postcopy is to send the rest.
        xbzrle_cache_bytes: Asked before each batch.
    """

    def __init__(
        self,
        guest: Guest,
        dialect: Dialect,
        settings: OutgoingSettings,
        *,
        stats: OutgoingStats,
        limiter: RateLimiter,
        clock: Clock,
        postcopy: PostcopySource | None,
        should_stop: Callable[[], bool],
        xbzrle_cache_bytes: Callable[[], int],
    ) -> None:
        self._guest = guest
        self._dialect = dialect
        self._settings = settings
        self._stats = stats
        self._limiter = limiter
        self._clock = clock
        self._postcopy = postcopy
        self._should_stop = should_stop
        self._xbzrle_cache_bytes = xbzrle_cache_bytes

    @property
    def sent(self) -> Sent | None:
        """Which pages went out; None without postcopy, which is the only one to ask."""
        if self._postcopy is None:
            return None
        return {block.idstr: block.sent for block in self._postcopy.schedule.blocks}

    def ram(
        self, connection: OutgoingConnection, should_stop: Callable[[], bool] | None = None
    ) -> RamSaver:
        """The handler of the main connection; ``should_stop`` in place of the usual one."""
        return RamSaver(
            connection.channel,
            list(self._guest.ram),
            section_id=free_section_id(list(self._guest.devices)),
            has_footers=self._dialect.send_section_footers,
            page_size=self._guest.page_size,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=connection.wait,
            should_stop=should_stop or self._should_stop,
            sent=self.sent,
            names_page_sizes=self._postcopy is not None,
            part_bytes=PART_BYTES if self._settings.multifd is None else None,
            detects_zeros=self._settings.detects_zero_pages,
            names_addresses=self._settings.ignores_shared,
        )

    def encoding(self, ram: RamSaver) -> RamSaver | XbzrleSaver | CompressSaver:
        """The handler of a migration without multifd, on top of the plain one if need be."""
        settings, is_live = self._settings, self._guest.live is not None
        if settings.xbzrle_cache_bytes is not None and is_live:
            return XbzrleSaver(
                ram,
                self._guest.ram,
                page_size=self._guest.page_size,
                cache_bytes=self._xbzrle_cache_bytes,
                stats=self._stats,
            )
        if settings.compress_level is not None and not is_live:
            return CompressSaver(
                ram,
                list(self._guest.ram),
                page_size=self._guest.page_size,
                level=settings.compress_level,
            )
        return ram

    def multifd(self, connection: OutgoingConnection, settings: MultifdSettings) -> OutgoingMultifd:
        """The channels of multifd; still to be connected."""
        return OutgoingMultifd(
            connection.open_channel,
            settings,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=connection.wait,
            should_stop=self._should_stop,
            sent=self.sent,
        )

    def file(self, connection: OutgoingConnection, settings: FileSettings) -> FileSave:
        """What writes a mapped-ram file."""
        return FileSave(
            connection.channel,
            self._guest,
            self._dialect,
            settings,
            uuid=self._settings.uuid,
            stats=self._stats,
            limiter=self._limiter,
            clock=self._clock,
            wait=connection.wait,
        )

    def convergence(self) -> Convergence:
        """What slows a guest down that writes faster than its memory goes."""
        settings = self._settings
        limit = None
        if settings.dirty_limit_bytes_per_s is not None:
            limit = DirtyLimit(settings.dirty_limit_bytes_per_s)
        return Convergence(
            settings.throttle,
            limit,
            settings.throttle_trigger_threshold,
            has_edits=settings.xbzrle_cache_bytes is not None,
            has_postcopy=self._postcopy is not None,
        )
