"""Pages that a running workload waits for: its faults are read, asked for, and settled.

One thread reads the faults. A page that came is shown; one that did not is asked for, once
on each connection. Without a connection the workload waits, and nothing is forgotten.

The same thread places the pages of a preempt channel: two of them would wait for each other and
for the interpreter.
"""

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial

from migrationd.errors import GuestError, MigrationdError
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.incoming.urgent_pages import UrgentPages
from migrationd.linux.faults import FAULTS_MAX, FaultReader
from migrationd.linux.pagemap import WrittenScanner
from migrationd.linux.priority import urgent_thread
from migrationd.linux.userfaultfd import MODE_MINOR, MODE_MISSING, MODE_WP, register, unregister
from migrationd.migration.blocktime import Blocktime

log = logging.getLogger(__name__)

AROUND_PAGES = 64
"""Received pages that are shown at once where one of them is wanted."""

_ASKED_MAX = 128
"""Pages that are waited for before more are asked for: a source that answers them and does not
listen meanwhile must not find this thread asking instead of taking the answers."""

_HELD_MS = 10

_ANSWER_NS = 200_000
"""An urgent page comes sooner than this, or it is under way among the others."""

_GIVES_WAY_S = 100e-6
"""What places the others leaves the interpreter to it for so long."""

Wanted = tuple[int, int]
"""Index of the block, page."""

Ask = Callable[[Sequence[Wanted]], None]


class MissingPages:
    """Watches the memory of one workload that lacks pages.

    Args:
        userfaultfd: Of the workload; not owned.
        blocks: All of its blocks; received pages are tracked.
        pagemap: Its ``/proc/self/pagemap``; not owned, -1 for none.
        on_error: Called on the watching thread when faults cannot be answered any more.

    Attributes:
        blocktime: How long its threads waited.
    """

    def __init__(
        self,
        userfaultfd: int,
        blocks: Sequence[WorkloadBlock],
        pagemap: int,
        on_error: Callable[[MigrationdError], None],
    ) -> None:
        self._fd = userfaultfd
        self._scanner = WrittenScanner(pagemap) if pagemap >= 0 else None
        self._blocks = tuple(blocks)
        self._on_error = on_error
        self._places = sorted((block.address_there, n) for n, block in enumerate(blocks))
        self._addresses = [address for address, _ in self._places]
        self._lock = threading.Lock()
        self._waits: dict[Wanted, list[tuple[int, int]]] = {}
        self._ask: Ask | None = None
        self._reader = FaultReader(userfaultfd)
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._is_stopping = False
        self._is_watching = False
        self._urgent: UrgentPages | None = None
        self._urgent_fd = -1
        self._faulted_ns = 0
        self.blocktime = Blocktime()

    @staticmethod
    def check(userfaultfd: int, blocks: Sequence[WorkloadBlock]) -> None:
        """Try whether missing pages of these blocks can be watched; they are not afterwards.

        Raises:
            GuestError: They cannot.
        """
        if userfaultfd < 0:
            raise GuestError("the workload has no userfaultfd: it cannot run without its memory")
        for block in blocks:
            _watch(userfaultfd, block, MODE_MISSING | MODE_MINOR)
            _watch(userfaultfd, block, MODE_WP)

    def start(self) -> None:
        """From now on every page that did not come is waited for.

        Raises:
            GuestError: The memory cannot be watched.
        """
        for block in self._blocks:
            _watch(self._fd, block, MODE_MISSING | MODE_MINOR)
            settle = partial(self._settle, self._blocks.index(block))
            block.show_pages(self._fd, settle, self._scanner)
        self._is_watching = True
        self._thread.start()

    def serve(self, pages: UrgentPages) -> None:
        """Place urgent pages on the watching thread; until they end, or it does.

        Args:
            pages: Of one channel; another one has to have ended before.

        Raises:
            MigrationdError: As :meth:`UrgentPages.run`.
        """
        with pages.held():
            with self._lock:
                if not self._is_watching or pages.is_ended:
                    return
                self._urgent = pages
                self._reader.look_up()
            pages.wait_left()

    def connect(self, ask: Ask) -> None:
        """Ask for pages this way, first for all that are waited for.

        Args:
            ask: Called with pages; raises ChannelError when they cannot be asked for.

        Raises:
            ChannelError: As ``ask``.
        """
        with self._lock:
            wanted = list(self._waits)
            self._ask = ask
        if wanted:
            ask(wanted)

    def disconnect(self) -> None:
        """Ask nobody until :meth:`connect`."""
        with self._lock:
            self._ask = None

    def stop(self) -> None:
        """Watch no more: what did not come is zero, and the workload goes on.

        Writes are tracked again afterwards.
        """
        if self._is_stopping:
            return
        self._is_stopping = True
        self.disconnect()
        self._reader.end()
        if self._thread.ident is not None:
            self._thread.join()
        self._reader.close()
        try:
            for block in self._blocks:
                block.show_no_pages()
                _watch(self._fd, block, MODE_WP)
        except GuestError as error:
            log.debug("%s", error)
        now_ns = time.perf_counter_ns()
        for waits in self._waits.values():
            for thread, began_ns in waits:
                self.blocktime.end(thread, began_ns, now_ns)
        self._waits.clear()

    @property
    def waiting(self) -> int:
        """Pages that are waited for now."""
        return len(self._waits)

    def _run(self) -> None:
        try:
            with urgent_thread():
                self._watch_faults()
        except MigrationdError as error:
            if not self._is_stopping:
                self._on_error(error)
        finally:
            with self._lock:
                self._is_watching = False
                urgent, self._urgent = self._urgent, None
            if urgent is not None:
                urgent.leave()

    def _watch_faults(self) -> None:
        reader = self._reader
        while reader.wait(leaves_faults_ms=_HELD_MS if self._is_held else None):
            has_input = reader.has_input
            if self._urgent is not None and self._urgent_fd < 0:
                self._urgent_fd = self._urgent.input_fd
                reader.wait_for(self._urgent_fd)
                has_input = True  # maybe received already
            has_faults = reader.has_faults
            while has_input or has_faults:
                # First those that were waited for longest.
                has_input = has_input and self._place_urgent()
                has_faults = has_faults and not self._is_held and self._take_faults()

    @property
    def _is_held(self) -> bool:
        """Whether what was asked for has to come before more is."""
        return len(self._waits) >= _ASKED_MAX and self._ask is not None

    def _take_faults(self) -> bool:
        """Ask for what is missing; whether there may be more of it."""
        faults = self._reader.read()
        if faults:
            self._take(faults)
        return len(faults) == FAULTS_MAX

    def _place_urgent(self) -> bool:
        """Place the pages of the preempt channel that are there; whether there were any."""
        urgent = self._urgent
        assert urgent is not None
        error: Exception | None = None
        try:
            if not urgent.place_now():
                return False
        except Exception as failure:  # the thread that waits for it knows what it is
            error = failure
        if error is not None or urgent.is_ended:
            self._reader.wait_no_more_for(self._urgent_fd)
            with self._lock:
                self._urgent, self._urgent_fd = None, -1
            urgent.leave(error)
            return False
        return True

    def _take(self, faults: Sequence[tuple[int, int]]) -> None:
        self._faulted_ns = now_ns = time.perf_counter_ns()
        wanted: list[Wanted] = []
        for address, thread in faults:
            at = bisect_right(self._addresses, address) - 1
            start, index = self._places[at]
            block = self._blocks[index]
            page = (address - start) // block.page_size
            if block.has_come(page):
                block.show_again(page, AROUND_PAGES)
                continue
            page -= page % block.host_pages
            key = (index, page)
            with self._lock:
                waits = self._waits.get(key)
                if waits is None:
                    waits = self._waits[key] = []
                    wanted.append(key)
                waits.append((thread, now_ns))
                self.blocktime.begin(thread, now_ns)
            if block.has_come(page):
                # It came meanwhile, and may have been settled before it was waited for.
                self._settle(index, page)
        ask = self._ask
        if wanted and ask is not None:
            ask(wanted)

    def _settle(self, index: int, page: int | None) -> None:
        """Pages were placed, or one page; on the thread that did it."""
        if not self._waits:
            return
        now_ns = time.perf_counter_ns()
        self._end_waits(index, page, now_ns)
        has_own_channel = self._urgent_fd >= 0 and page is None
        if has_own_channel and self._waits and now_ns - self._faulted_ns < _ANSWER_NS:
            time.sleep(_GIVES_WAY_S)

    def _end_waits(self, index: int, page: int | None, now_ns: int) -> None:
        with self._lock:
            keys = list(self._waits) if page is None else [(index, page)]
            for key in keys:
                if self._blocks[key[0]].has_come(key[1]):
                    for thread, began_ns in self._waits.pop(key, ()):
                        self.blocktime.end(thread, began_ns, now_ns)


def _watch(userfaultfd: int, block: WorkloadBlock, mode: int) -> None:
    """Watch a block in this mode and no other; whoever waits goes on."""
    unregister(userfaultfd, block.address_there, block.used_length)
    register(userfaultfd, block.address_there, block.used_length, mode)
