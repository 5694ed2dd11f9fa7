"""A workload that runs here before its memory is: loading, starting, asking for pages.

    LISTEN   its memory is watched, its devices are loaded while pages come already
    PONG     of the package's pings; from here on the guest is here and nowhere else
    start    it runs; what it touches and did not come is asked for
    whole    everything came, or is zero: nothing is watched any more

Loading has a thread of its own, for it may wait for pages that the loading thread places.

One owner: the source has stopped the guest before the package; here it starts behind the
answer to PING 0x42 only, and never once the loading was given up.

Reference: stream format 5.3 and 6.4-6.6; QEMU's listen and fault threads.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from migrationd.codec.return_path import RequestPages, encode_request, encode_return_path
from migrationd.errors import ChannelError, GuestError, MigrationdError, MigrationError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.device import DeviceState
from migrationd.incoming.missing_pages import MissingPages, Wanted
from migrationd.incoming.urgent_pages import UrgentPages
from migrationd.migration.blocktime import Blocktime

if TYPE_CHECKING:
    from concurrent.futures import Future

log = logging.getLogger(__name__)


class LazyRun:
    """The part of a postcopy that only a guest which executes needs.

    Args:
        guest: The workload.
        send: Sends bytes on the return path; raises ChannelError.
        commit: Answers the package's pings; raises ChannelError. The guest is here afterwards.
        on_running: Lets the guest run; called on the event loop.
        break_off: Called when the guest cannot be loaded, or its faults cannot be read.
        loop: Event loop.

    Attributes:
        error: Why the guest cannot run here; None while it can.
    """

    def __init__(
        self,
        guest: AttachedGuest,
        send: Callable[[bytes], None],
        commit: Callable[[Sequence[int]], None],
        on_running: Callable[[AttachedGuest], Awaitable[None]],
        break_off: Callable[[MigrationdError], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._guest = guest
        self._send = send
        self._commit = commit
        self._on_running = on_running
        self._break_off = break_off
        self._loop = loop
        self._missing: MissingPages | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_given_up = False
        self._is_here = False
        self._start: Future[None] | None = None
        self._last_block: int | None = None
        self.error: MigrationdError | None = None

    @staticmethod
    def prepare(guest: AttachedGuest) -> None:
        """Make sure, before its source stops, that this workload can run without its memory.

        Raises:
            GuestError: It cannot.
        """
        MissingPages.check(guest.userfaultfd, guest.ram)
        guest.expect_lazy()

    @property
    def blocktime(self) -> Blocktime | None:
        """How long the guest waited for pages; None before it could."""
        return self._missing.blocktime if self._missing is not None else None

    def launch(self, devices: Sequence[DeviceState], pings: Sequence[int]) -> None:
        """Begin to load the guest and to ask for pages; returns at once.

        Args:
            devices: All that came.
            pings: Values to be answered when the guest is loaded.

        Raises:
            GuestError: Its memory cannot be watched.
            ChannelError: Pages cannot be asked for.
        """
        self._missing = MissingPages(
            self._guest.userfaultfd, self._guest.ram, self._guest.pagemap, self._fail
        )
        self._missing.start()
        self._missing.connect(self._ask)
        self._thread = threading.Thread(
            target=self._load, args=(tuple(devices), tuple(pings)), name="launch", daemon=True
        )
        self._thread.start()

    def connect(self) -> None:
        """Pages may be asked for on a new connection; first for those that are waited for.

        Raises:
            ChannelError: It is lost already.
        """
        self._last_block = None
        if self._missing is not None:
            self._missing.connect(self._ask)

    def serve(self, pages: UrgentPages) -> None:
        """Place urgent pages where faults are read; until they end, or no fault is read any more.

        Raises:
            MigrationdError: As :meth:`UrgentPages.run`.
        """
        if self._missing is not None:
            self._missing.serve(pages)

    def disconnect(self) -> None:
        """The connection is lost: who waits goes on waiting."""
        if self._missing is not None:
            self._missing.disconnect()

    def finish(self) -> None:
        """The source has sent everything: what did not come is zero.

        Waits until the guest is loaded; not for the event loop's thread.

        Raises:
            MigrationdError: The guest could not be loaded.
        """
        if self._missing is None:
            return
        self._missing.stop()
        self._join()
        if self.error is not None:
            raise self.error
        if self._start is not None:
            self._start.result()
        self._guest.now_whole()

    def give_up(self) -> bool:
        """The connection is lost before the guest was loaded.

        Returns:
            False if it was loaded all the same: then it is here, and waits for its memory.
        """
        with self._lock:
            if self._is_here:
                return False
            self._is_given_up = True
        if self._missing is not None:
            self._missing.stop()
        self._join()
        return True

    def abandon(self) -> None:
        """The guest is thrown away: nobody can bring its memory any more."""
        if self._missing is None:
            return
        if self._is_here:
            # What is missing would read as zero; better no guest than a wrong one.
            self._guest.kill()
        self._missing.stop()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _load(self, devices: Sequence[DeviceState], pings: Sequence[int]) -> None:
        try:
            self._guest.load_lazily(devices)
            with self._lock:
                if self._is_given_up:
                    return
                self._commit(pings)
                self._is_here = True
        except MigrationdError as error:
            self._fail(error)
            return
        except Exception as error:  # a defect of ours must end as a failed migration
            log.error("internal error in postcopy", exc_info=error)
            self._fail(MigrationError(f"internal error: {error!r}"))
            return
        self._start = asyncio.run_coroutine_threadsafe(self._run(), self._loop)

    async def _run(self) -> None:
        try:
            await self._on_running(self._guest)
        except GuestError as error:
            log.error("the workload arrived, but does not start: %s", error)

    def _fail(self, error: MigrationdError) -> None:
        if self._is_given_up:
            return
        self.error = error
        self._break_off(error)

    def _ask(self, wanted: Sequence[Wanted]) -> None:
        """Ask for pages in one packet; a block is named where it differs from the last one."""
        parts = []
        blocks = self._guest.ram
        for index, page in wanted:
            block = blocks[index]
            start, length = page * block.page_size, block.host_pages * block.page_size
            if index == self._last_block:
                parts.append(encode_request(start, length))
                continue
            self._last_block = index
            parts.append(encode_return_path(RequestPages(start, length, block.idstr)))
        try:
            self._send(b"".join(parts))
        except ChannelError:
            # The loading thread finds the same; what is waited for is asked for again.
            self.disconnect()
