"""One look at what a guest writes, for everybody who asks: a migration, a measurement.

What one of them collects is forgotten by the kernel, and kept here for the others.
"""

import contextlib
import threading
from collections.abc import Sequence

from migrationd.errors import GuestError
from migrationd.guest.dirty import DirtyTracker, NoTracker
from migrationd.guest.memory import Pages, united
from migrationd.guest.ram_block import RamBlock


class DirtyLog:
    """Shares a tracker.

    Args:
        tracker: Used by nobody else.
        blocks: The guest's blocks.
    """

    def __init__(self, tracker: DirtyTracker, blocks: Sequence[RamBlock]) -> None:
        self._tracker = tracker
        self._page_sizes = [block.page_size for block in blocks]
        self._lock = threading.Lock()
        self._started: list[_Reader] = []

    @property
    def is_able(self) -> bool:
        """Whether the guest's memory can be tracked at all."""
        return not isinstance(self._tracker, NoTracker)

    def reader(self) -> DirtyTracker:
        """Somebody who wants to know what is written; to be started, and stopped in the end."""
        return _Reader(self)

    def start(self, reader: "_Reader") -> None:
        """Count for a reader from now on."""
        with self._lock:
            if not [other for other in self._started if other is not reader]:
                self._tracker.start()
            else:
                self._share(reader)
            reader.kept = None
            if reader not in self._started:
                self._started.append(reader)

    def collect(self, reader: "_Reader") -> list[Pages]:
        """What was written since the reader's last look."""
        with self._lock:
            if reader not in self._started:
                raise GuestError("the guest's memory is not tracked")
            self._share(None)
            found, reader.kept = reader.kept, None
            assert found is not None
            return found

    def peek(self, reader: "_Reader") -> int:
        """Bytes written since the reader's last look."""
        with self._lock:
            if reader.kept is None and len(self._started) == 1:
                return self._tracker.peek()
            self._share(None)
            pages = zip(reader.kept or [], self._page_sizes, strict=False)
            return sum(len(part) * size for part, size in pages)

    def stop(self, reader: "_Reader") -> None:
        """The reader asks no more."""
        with self._lock:
            if reader in self._started:
                self._started.remove(reader)
                if not self._started:
                    self._tracker.stop()

    def _share(self, beside: "_Reader | None") -> None:
        """Look, and keep what is found for every reader but one."""
        found = self._tracker.collect()
        for reader in self._started:
            if reader is not beside:
                kept = reader.kept
                reader.kept = (
                    found
                    if kept is None
                    else [united(a, b) for a, b in zip(kept, found, strict=True)]
                )


class _Reader:
    """One of those who ask; implements :class:`DirtyTracker`."""

    def __init__(self, log: DirtyLog) -> None:
        self._log = log
        self.kept: list[Pages] | None = None

    def start(self) -> None:
        """See the protocol."""
        self._log.start(self)

    def collect(self) -> list[Pages]:
        """See the protocol."""
        return self._log.collect(self)

    def peek(self) -> int:
        """See the protocol."""
        return self._log.peek(self)

    def stop(self) -> None:
        """See the protocol."""
        with contextlib.suppress(GuestError):  # who is gone writes nothing
            self._log.stop(self)
