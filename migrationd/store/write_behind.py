"""Keeps a growing file close to the disk, so that its last sync is short.

The last sync of an arriving guest is part of its downtime: the source waits for the word
that the guest is kept.
"""

import contextlib
import os
import threading

INTERVAL_S = 0.1


class WriteBehind:
    """A thread that syncs a file again and again while others write it.

    Args:
        fd: File; must stay open until :meth:`stop` has returned.
        interval_s: Pause after each sync.
    """

    def __init__(self, fd: int, interval_s: float = INTERVAL_S) -> None:
        self._fd = fd
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="write behind", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; may be called again."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            # What cannot be written is reported once more by the last sync, or by a write.
            with contextlib.suppress(OSError):
                os.fdatasync(self._fd)
