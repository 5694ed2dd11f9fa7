"""Where the channels wait for the main stream, and it for them.

What came on a channel before its SYNC is older than what comes on any connection after
the matching mark of the main stream. A channel therefore stops at its SYNC until the
mark was passed, and the main stream stops at the mark until every channel is there.

Reference: stream format 3.6.
"""

import threading

from migrationd.errors import ChannelClosed, MigrationdError, StreamTruncated


class SyncPoints:
    """The marks of one migration.

    Args:
        channels: How many there are.
    """

    def __init__(self, channels: int) -> None:
        self._changed = threading.Condition()
        self._reached = [0] * channels
        self._ended = [False] * channels
        self._passed = 0
        self._error: MigrationdError | None = None
        self._is_over = False

    @property
    def error(self) -> MigrationdError | None:
        """What made the first channel fail."""
        return self._error

    def reach(self, channel: int) -> bool:
        """Wait at a SYNC until the main stream has passed its mark; for a channel's thread.

        Returns:
            False if the migration ended meanwhile.
        """
        with self._changed:
            self._reached[channel] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed >= self._reached[channel] or self._is_over)
            return self._passed >= self._reached[channel]

    def end(self, channel: int) -> None:
        """Say that a channel's input ended; for its thread."""
        with self._changed:
            self._ended[channel] = True
            self._changed.notify_all()

    def fail(self, error: MigrationdError) -> None:
        """Make the main stream fail with this; the first error counts."""
        with self._changed:
            if self._error is None and not self._is_over:
                self._error = error
            self._changed.notify_all()

    def release(self) -> None:
        """Let every waiting thread go: the migration is over."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def pass_mark(self) -> None:
        """Wait until every channel is at its SYNC, and let them go on; for the main stream.

        Raises:
            MigrationdError: A channel failed.
            StreamTruncated: A channel ended before its SYNC.
            ChannelClosed: The migration was ended here.
        """
        with self._changed:
            mark = self._passed + 1
            self._changed.wait_for(lambda: self._is_decided(mark))
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise ChannelClosed("the channel was shut down")
            for channel, reached in enumerate(self._reached):
                if reached < mark:
                    raise StreamTruncated(
                        f"the channel ended before its SYNC {mark}",
                        section=f"multifd channel {channel}",
                    )
            self._passed = mark
            self._changed.notify_all()

    def _is_decided(self, mark: int) -> bool:
        if self._error is not None or self._is_over:
            return True
        lagging = [n for n, reached in enumerate(self._reached) if reached < mark]
        return not lagging or any(self._ended[n] for n in lagging)
