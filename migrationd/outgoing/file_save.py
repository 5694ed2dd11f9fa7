"""The phases of an outgoing migration into a mapped-ram file.

Reference: QEMU's ``migrate`` to ``file:`` with the capabilities ``mapped-ram`` and, if the
pages are to be written by several threads, ``multifd``; parameter ``direct-io``.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migrationd.clock import Clock
from migrationd.errors import ChannelClosed, MigrationError
from migrationd.guest.base import Guest
from migrationd.guest.instant import Piece
from migrationd.migration.dialect import Dialect
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.mapped_ram_save import MappedRamSaver
from migrationd.store.page_writer import CHUNK_BYTES
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter


@dataclass(frozen=True, slots=True)
class FileSettings:
    """How a mapped-ram file is written.

    Attributes:
        writers: Threads that write pages: ``multifd-channels`` with ``multifd``.
        direct_io: Parameter ``direct-io``.
    """

    writers: int = 1
    direct_io: bool = False


class FileSave:
    """Writes one file; its methods are called in their order by the sending thread.

    Args:
        channel: The open file, at the position where the stream begins.
        guest: The guest; only read.
        dialect: Its wire dialect.
        settings: How it is written.
        uuid: UUID for the configuration, 16 bytes, or None.
        stats: Counters.
        limiter: Bandwidth limit.
        clock: Time.
        wait: Called with seconds to wait for the limit, 0 to look whether the migration goes
            on; raises when it ends.
    """

    def __init__(
        self,
        channel: Channel,
        guest: Guest,
        dialect: Dialect,
        settings: FileSettings,
        *,
        uuid: bytes | None,
        stats: OutgoingStats,
        limiter: RateLimiter,
        clock: Clock,
        wait: Callable[[float], None],
    ) -> None:
        self._channel = channel
        self._guest = guest
        self._dialect = dialect
        self._settings = settings
        self._uuid = uuid
        self._stats = stats
        self._limiter = limiter
        self._clock = clock
        self._wait = wait
        self._lock = threading.Lock()
        self._saver: MappedRamSaver | None = None

    def set_up(self) -> None:
        """Write the head and the block list.

        Raises:
            ChannelClosed: The file cannot be written.
            MigrationError: The transport is no file, or the guest cannot be in one.
        """
        if not self._channel.is_seekable:
            raise MigrationError("Migration requires seekable transport (e.g. file)")
        with self._file() as fd:
            self._saver = saver = MappedRamSaver(
                fd,
                self._guest,
                self._dialect,
                uuid=self._uuid,
                position=os.lseek(fd, 0, os.SEEK_CUR),
                writers=self._settings.writers,
                direct_io=self._settings.direct_io,
                chunk_bytes=self._chunk_bytes,
                on_written=self._written,
            )
            self._stats.sent(saver.begin())

    def save_ram(self) -> None:
        """Write every page that is not zero.

        Raises:
            ChannelClosed: The file cannot be written.
            MigrationCancelled: The migration was ended.
            StoreError: ``direct-io`` is on, and the file system has none.
        """
        assert self._saver is not None
        with self._file():
            zero = self._saver.save_pages()
        self._stats.sent(0, duplicate=zero)

    def save_pieces(self, pieces: Iterator[Piece]) -> None:
        """Write every page that was not zero, as it was.

        Raises:
            ChannelClosed: As :meth:`save_ram`, and so are the others.
            MigrationCancelled: The migration was ended.
            StoreError: ``direct-io`` is on, and the file system has none.
        """
        assert self._saver is not None
        with self._file():
            zero = self._saver.save_pieces(pieces)
        self._stats.sent(0, duplicate=zero)

    def switch_over(self) -> None:
        """Write bitmaps, devices and the end.

        Raises:
            ChannelClosed: The file cannot be written.
        """
        assert self._saver is not None
        with self._file():
            self._stats.sent(self._saver.finish())

    @contextlib.contextmanager
    def _file(self) -> Iterator[int]:
        with self._channel.descriptor() as fd:
            try:
                yield fd
            except OSError as error:
                raise ChannelClosed(f"Unable to write to file: {error.strerror}") from error

    def _chunk_bytes(self) -> int:
        """Bytes of the next write, after the wait for the limit."""
        with self._lock:
            self._wait(self._limiter.delay_s(self._clock.monotonic_s()))
            window_bytes = self._limiter.window_bytes
        return CHUNK_BYTES if window_bytes is None else min(CHUNK_BYTES, window_bytes)

    def _written(self, byte_count: int, pages: int) -> None:
        with self._lock:
            self._limiter.charge(byte_count)
            self._stats.sent(byte_count, normal=pages)
            self._stats.measure(self._clock.monotonic_s())
