"""RAM of a guest that goes on writing: pass after pass over what it wrote.

Tracking begins before the first page is read, so that every write is either in what is
sent or found by the next look. Whole passes are arrays of page numbers.

Reference: QEMU's precopy iterations; ``dirty-sync-count`` and MIGRATION_PASS count them.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from migrationd.clock import Clock
from migrationd.guest.base import Live
from migrationd.guest.memory import Pages, united
from migrationd.guest.ram_block import RamBlock
from migrationd.migration.convergence import STALL_S, Convergence, Decision, Pass
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.multifd_save import MultifdSaver
from migrationd.outgoing.ram_save import RamSaver
from migrationd.outgoing.xbzrle_save import XbzrleSaver

SCAN_PAGES = 4096
"""Pages whose contents are looked at in one go: 16 MiB."""

SHORTEST_PASS_S = 0.01
"""A pass waits so long before the next look, if it took less."""

LOOK_S = 0.5
"""How often a pass that takes long is looked at while it lasts."""

UNANSWERED = "the destination does not keep up: it has not taken in yet what was sent"
UNACKNOWLEDGED = (
    "the destination has not acknowledged the switchover: "
    "is its capability switchover-ack on as well?"
)


class LiveSaver:
    """Sends the RAM of one executing guest; used by the outgoing thread.

    Args:
        saver: Puts pages on the wire.
        live: The guest.
        blocks: Its RAM blocks, in the order of the block list.
        convergence: Decides when it ends.
        stats: Counters of the migration.
        clock: Time.
        downtime_limit_s: Asked before each decision.
        available_bytes_per_s: Asked before each decision; ``avail-switchover-bandwidth``.
        may_switch_over: Asked before the guest may be stopped: whether the destination agrees.
        wait_for_peer: Returns when the destination has taken in what was sent; a pass lasts
            until then.
        on_pass: Called when what was written since the last look is known.
        wait: Called with seconds to wait; raises when the migration ends.
        sent: By block name one bool per page, set by the saver for pages that went out; kept
            true here for a postcopy. None if there will be none.
        should_stop: Asked again and again: postcopy is to send the rest.
    """

    def __init__(
        self,
        saver: RamSaver | MultifdSaver | XbzrleSaver,
        live: Live,
        blocks: Sequence[RamBlock],
        convergence: Convergence,
        *,
        stats: OutgoingStats,
        clock: Clock,
        downtime_limit_s: Callable[[], float],
        available_bytes_per_s: Callable[[], int],
        may_switch_over: Callable[[], bool],
        wait_for_peer: Callable[[], None],
        on_pass: Callable[[], None],
        wait: Callable[[float], None],
        sent: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._saver = saver
        self._live = live
        self._blocks = blocks
        self._convergence = convergence
        self._stats = stats
        self._clock = clock
        self._rest: list[Pages] = []
        self._downtime_limit_s = downtime_limit_s
        self._available_bytes_per_s = available_bytes_per_s
        self._may_switch_over = may_switch_over
        self._wait_for_peer = wait_for_peer
        self._asked_s: float | None = None
        self._throttled = 0
        self._on_pass = on_pass
        self._wait = wait
        self._sent = sent
        self._should_stop = should_stop
        self._is_unacknowledged = False
        self._knows_present = False
        self._is_first_pass = False
        self._pass_begin_s = 0.0
        self._looked_s = 0.0
        self._begin_bytes = 0

    @property
    def stall(self) -> str | None:
        """Why it does not end by itself, in plain words."""
        asked_s = self._asked_s
        if asked_s is not None and self._clock.monotonic_s() - asked_s > STALL_S:
            return UNANSWERED
        return UNACKNOWLEDGED if self._is_unacknowledged else self._convergence.stall

    def converge(self) -> None:
        """Send everything, then what was written meanwhile, until the guest is to be stopped.

        Raises:
            ChannelClosed: The peer went away, or the channel was shut down.
            GuestError: The guest is gone or cannot be tracked.
        """
        stats = self._stats
        covered: int | None = stats.dirty_bytes
        send = self._send_rest
        if not self._rest:
            self._live.tracker.start()
            stats.dirty_bytes = stats.total_bytes
            covered, send = None, self._send_all
        while True:
            done = self._pass(send, covered)
            if self._should_stop():
                return
            decision = self._convergence.after(
                done, self._downtime_limit_s(), self._available_bytes_per_s()
            )
            self._expect(done.rest_bytes)
            self._slow_down()
            self._is_unacknowledged = False
            if decision is Decision.SWITCH_OVER:
                if self._may_switch_over():
                    return
                self._is_unacknowledged = True
            covered, send = done.rest_bytes, self._send_rest

    def stop(self) -> bool:
        """Stop the guest, if what it has written until then fits the downtime limit.

        Returns:
            False if it does not: the guest goes on, and so must :meth:`converge`. In a
            postcopy nothing has to fit.

        Raises:
            ChannelClosed: As :meth:`converge`.
            GuestError: It does not stop, or does not go on.
        """
        if self._should_stop():
            # What the destination still has to take in, and a look at all memory, are no downtime.
            self._wait_for_peer()
            self._live.know_present()
            self._knows_present = True
        # Who stops it for good meanwhile finds it running, or stopped for good.
        with self._live.run_state_held():
            self._live.stop()
            if self._should_stop():
                return True
            try:
                self._collect_rest()
                fits = self._convergence.fits(self._stats.remaining_bytes, self._downtime_limit_s())
            except BaseException:
                self._live.start()
                raise
            if not fits:
                self._convergence.went_on(self._stats.remaining_bytes, self._downtime_limit_s())
                self._live.start()
            return fits

    def send_stopped(self) -> None:
        """Send everything of a guest that stands still already.

        Raises:
            ChannelClosed: As :meth:`converge`.
        """
        self._stats.dirty_bytes = self._stats.total_bytes
        self._send_all()
        self._stats.dirty_bytes = 0

    def finish(self) -> None:
        """Send what is left of the stopped guest.

        Raises:
            ChannelClosed: As :meth:`converge`.
            GuestError: The guest is gone.
        """
        self._collect_rest()
        self._send_rest()
        self._stats.dirty_bytes = 0

    def send_written(self) -> None:
        """Send what the stopped guest has written since all of it was sent.

        Raises:
            ChannelClosed: As :meth:`converge`.
            GuestError: The guest is gone.
        """
        self._rest = self._collect()
        self._count(self._rest, 0.0)
        self._send_rest()
        self._stats.dirty_bytes = 0

    def leave_rest(self) -> None:
        """Find out what is left of the stopped guest, for a postcopy to send.

        Pages that were never touched are zero, and not present.

        Raises:
            GuestError: The guest is gone.
        """
        written = self._collect()
        if self._knows_present:
            for block, pages in zip(self._blocks, written, strict=True):
                block.present[pages] = True
        else:
            self._live.know_present()
        self._stats.dirty_bytes = None

    def release(self) -> None:
        """Let the guest have all its time and its memory again; for the end, whatever it is.

        Raises:
            GuestError: It is gone.
        """
        self._live.tracker.stop()
        if self._throttled:
            self._live.throttle(0)

    def _pass(self, send: Callable[[], None], covered_bytes: int | None) -> Pass:
        """Send, and find what was written meanwhile."""
        stats = self._stats
        begin_s = self._clock.monotonic_s()
        before = stats.transferred_bytes
        self._pass_begin_s = self._looked_s = begin_s
        self._begin_bytes = before
        self._is_first_pass = covered_bytes is None
        send()
        if not self._should_stop():
            self._asked_s = self._clock.monotonic_s()
            self._wait_for_peer()
            self._asked_s = None
        sending_s = self._clock.monotonic_s() - begin_s
        waited_s = 0.0
        if sending_s < SHORTEST_PASS_S and not self._should_stop():
            waited_s = SHORTEST_PASS_S - sending_s
            self._wait(waited_s)
        self._rest = self._collect()
        stats.dirty_sync_count += 1
        self._on_pass()
        elapsed_s = self._clock.monotonic_s() - begin_s
        rest_bytes = self._count(self._rest, elapsed_s)
        if self._convergence.is_dirty_limited:
            stats.limit_throttle_us = int(elapsed_s * self._throttled * 1e4)
        sent_bytes = stats.transferred_bytes - before
        return Pass(rest_bytes, sent_bytes, sending_s, covered_bytes, waited_s)

    def _collect_rest(self) -> None:
        """Add what was written since the last look to what is left."""
        last = self._collect()
        self._rest = [united(old, new) for old, new in zip(self._rest, last, strict=True)]
        self._count(self._rest, 0.0)

    def _expect(self, rest_bytes: int) -> None:
        expected_s = self._convergence.expected_downtime_s(rest_bytes)
        self._stats.expected_downtime_s = expected_s if expected_s != float("inf") else None

    def _look(self) -> None:
        """Look at a first pass that takes long."""
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s < LOOK_S or not self._is_first_pass:
            return
        self._looked_s = now_s
        self._convergence.during(
            now_s - self._pass_begin_s,
            self._live.tracker.peek(),
            self._stats.transferred_bytes - self._begin_bytes,
            self._downtime_limit_s(),
        )
        self._slow_down()

    def _collect(self) -> list[Pages]:
        """Pages that were written since the last look: what went out of them is old."""
        dirty = self._live.tracker.collect()
        if self._sent is not None:
            for block, pages in zip(self._blocks, dirty, strict=True):
                self._sent[block.idstr][pages] = False
        return dirty

    def _touched(self, block: RamBlock) -> npt.NDArray[np.bool_]:
        touched = np.zeros(block.page_count, np.bool_)
        for first, count in self._live.touched_runs(block).tolist():
            touched[first : first + count] = True
        return touched

    def _count(self, dirty: list[Pages], elapsed_s: float) -> int:
        pages = sum(len(part) for part in dirty)
        stats = self._stats
        stats.dirty_bytes = sum(
            len(part) * block.page_size for part, block in zip(dirty, self._blocks, strict=True)
        )
        if elapsed_s:
            stats.dirty_pages_rate = int(pages / elapsed_s)
        return stats.dirty_bytes

    def _slow_down(self) -> None:
        wanted = self._convergence.throttle_percentage
        if wanted != self._throttled:
            self._live.throttle(wanted)
            self._throttled = wanted
            if not self._convergence.is_dirty_limited:
                self._stats.throttle_percentage = wanted

    def _send_all(self) -> None:
        """Every page: those that were never touched are zero without a look."""
        self._saver.begin_parts()
        for block in self._blocks:
            touched = self._touched(block)
            self._saver.send(block, np.flatnonzero(~touched), is_zero=True)
            self._send_pages(block, np.flatnonzero(touched))
        self._saver.end_parts()

    def _send_rest(self) -> None:
        self._saver.begin_parts()
        for block, pages in zip(self._blocks, self._rest, strict=True):
            self._send_pages(block, pages)
        self._saver.end_parts()

    def _send_pages(self, block: RamBlock, pages: Pages) -> None:
        """Pages with their contents of now; those that are zero as such."""
        words = block.memory.view.view(np.uint64).reshape(block.page_count, -1)
        for start in range(0, len(pages), SCAN_PAGES):
            if self._should_stop():
                return
            self._look()
            part = pages[start : start + SCAN_PAGES]
            is_run = int(part[-1]) - int(part[0]) + 1 == len(part)
            rows = words[int(part[0]) : int(part[-1]) + 1] if is_run else words[part]
            is_zero = ~np.bitwise_or.reduce(rows, axis=1).astype(np.bool_)
            self._saver.send(block, part[is_zero], is_zero=True)
            self._saver.send(block, part[~is_zero], is_zero=False)
