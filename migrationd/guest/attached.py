"""A live process as a guest: it runs under our eyes, shares its memory and obeys.

Reference: the guest socket, ``guest/protocol.py``. On the wire it looks like any guest.
"""

import contextlib
import json
import os
import threading
from collections.abc import Sequence

from migrationd.errors import GuestError, WorkloadRefused, WorkloadSilent
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.dirty import DirtyTracker, NoTracker, PagemapTracker
from migrationd.guest.dirty_log import DirtyLog
from migrationd.guest.fault_tracker import FaultTracker
from migrationd.guest.handed import HandedMemory
from migrationd.guest.huge_block import workload_block
from migrationd.guest.instant import MemoryAtInstant
from migrationd.guest.memory import Pages, SharedMemory
from migrationd.guest.owner_note import OwnerNote, decode_note, encode_note
from migrationd.guest.protocol import Begin, Check, Keep, Throttle
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.guest.run_state import (
    GLOBAL_STATE,
    PAUSED,
    PRELAUNCH,
    RUNNING,
    Owned,
    decode_run_state,
)
from migrationd.guest.workload_block import WorkloadBlock
from migrationd.guest.workload_devices import (
    declarations_section,
    declared_keys,
    devices_to_load,
    saved_sections,
    workload_description,
)
from migrationd.guest.workload_link import Introduced, WorkloadLink
from migrationd.guest.workload_memory import WorkloadMemory
from migrationd.guest.write_faults import WriteFaults

LAZY_LOAD_WAIT_S = 60.0
"""Longest wait for devices to be loaded by a workload that waits for pages meanwhile."""


class AttachedGuest(Owned):
    """One workload process.

    Engines read it on the outgoing thread; requests block for up to seconds, so that the
    event loop makes them on a thread.

    Args:
        link: Connection; owned.
        introduced: What the workload said of itself; owned.
        tracking: How its writes are noted: ``pagemap``, ``userfaultfd``, or ``auto``.

    Raises:
        GuestError: A block cannot be mapped.

    Attributes:
        tracker: Which pages it writes.
        has_guest: Whether its memory was a guest's before it came to this daemon.
        never_ran: Whether it stands still since it came, rather than again.
    """

    def __init__(self, link: WorkloadLink, introduced: Introduced, tracking: str = "auto") -> None:
        self._link = link
        self._introduced = introduced
        hello = introduced.hello
        self._keys = declared_keys(hello.devices)
        self.name = hello.name
        self.has_guest = hello.has_guest
        self.is_running = hello.running
        self.never_ran = False
        self.identity = GuestIdentity(machine=f"migrationd-{hello.name}")
        self.devices: tuple[DeviceState, ...] = (declarations_section(hello.devices),)
        self.vmdescription: bytes | None = None
        self.seen = SeenOnArrival()
        self._page_size = hello.page_size
        blocks: list[WorkloadBlock] = []
        try:
            for block, fd in introduced.blocks:
                memory = SharedMemory(fd, block.size, hello.page_size)
                grain = memory.grain_bytes if memory.grain_bytes > hello.page_size else None
                spec = RamBlockSpec(
                    block.name, block.size, hello.page_size, backing_page_size=grain
                )
                blocks.append(workload_block(spec, memory, block.address))
        except GuestError:
            for made in blocks:
                made.memory.close()
            raise
        self.ram: tuple[WorkloadBlock, ...] = tuple(blocks)
        self._memory = WorkloadMemory(link, introduced, self.ram)
        self._is_loaded = False
        self._lifeline = -1
        addresses = [block.address for block, _ in introduced.blocks]
        placed = list(zip(self.ram, addresses, strict=True))
        self._faults: WriteFaults | None = None
        if introduced.faults >= 0:
            self._faults = WriteFaults(introduced.faults, introduced.userfaultfd, placed)
        self._writes = DirtyLog(self._make_tracker(tracking, placed), self.ram)
        self.tracker: DirtyTracker = self._writes.reader()
        self._run_state_lock = threading.RLock()

    @property
    def is_closed(self) -> bool:
        """Whether the workload was let go."""
        return not self.ram

    @property
    def blockers(self) -> tuple[str, ...]:
        """Names of devices that cannot migrate."""
        return tuple(
            str(device.get("name"))
            for device in self._introduced.hello.devices
            if device.get("unmigratable") is not None
        )

    @property
    def page_size(self) -> int:
        """Target page size in bytes."""
        return self._page_size

    @property
    def live(self) -> "AttachedGuest":
        """Itself."""
        return self

    @property
    def file(self) -> None:
        """Nothing: its pages are in memfds."""

    def check_unchanged(self) -> None:
        """Nothing: it changes all the time, and is tracked."""

    def touched_runs(self, block: RamBlock) -> Pages:
        """Runs of pages that may hold something, shape ``(n, 2)``: first page, count."""
        assert isinstance(block.memory, SharedMemory)
        return block.memory.data_runs()

    @property
    def ram_bytes(self) -> int:
        """RAM of all blocks."""
        return sum(block.used_length for block in self.ram)

    @property
    def present_bytes(self) -> int:
        """RAM that was ever touched."""
        return sum(
            int(self.touched_runs(block)[:, 1].sum()) * block.page_size for block in self.ram
        )

    def begin(self, *, is_destination: bool) -> None:
        """Tell the workload what it is for; a destination stands still and is empty then.

        Raises:
            GuestError: The workload does not obey.
        """
        self._link.request("begin", Begin(role="destination" if is_destination else "source"))
        if is_destination:
            self.is_running = self._is_loaded = False
            for block in self.ram:
                block.memory.clear()

    def stop(self) -> bool:
        """See :class:`Live`.

        Raises:
            GuestError: It does not stop in time; it is told to go on.
        """
        with self._run_state_lock:
            if not self.is_running:
                return False
            try:
                self._link.request("stop")
            except GuestError:
                self._go_on_after_all()
                raise
            self.is_running = False
            return True

    def start(self) -> bool:
        """See :class:`Live`.

        Raises:
            GuestError: It does not obey. One that refuses is told to stand still; one that is
                silent has the request, and counts as running: who sends it has to stop it.
        """
        with self._run_state_lock:
            if self.is_running:
                return False
            try:
                self._link.request("start")
            except WorkloadRefused:
                self._stand_still_after_all()
                raise
            except WorkloadSilent:
                self.is_running = True
                raise
            self.is_running = True
            self.never_ran = False
            return True

    def run_state_held(self) -> contextlib.AbstractContextManager[object]:
        """While it is entered, only this thread stops and starts the guest; others wait."""
        return self._run_state_lock

    def watch_writes(self) -> DirtyTracker:
        """Which pages it writes, for somebody else than :attr:`tracker`.

        Raises:
            GuestError: Its memory cannot be tracked.
        """
        if not self._writes.is_able:
            raise GuestError("the workload's memory cannot be tracked")
        return self._writes.reader()

    def memory_at_instant(self) -> MemoryAtInstant:
        """What its memory will have been at an instant to come.

        Raises:
            GuestError: Its writes cannot be made to wait.
        """
        if self._faults is None:
            raise GuestError(
                "the workload's writes cannot be made to wait: Linux 5.19 or later and a "
                "userfaultfd that the kernel's own accesses wait for are needed"
            )
        return MemoryAtInstant(self.ram, self._faults)

    def reset(self) -> None:
        """Let it begin anew; one that stands still has not run since.

        Raises:
            GuestError: It cannot be reset.
        """
        self._link.request("reset")
        self.never_ran = not self.is_running

    def powerdown(self) -> None:
        """Tell it that somebody wants it to end.

        Raises:
            GuestError: It does not answer.
        """
        self._link.request("powerdown")

    def throttle(self, percentage: int) -> None:
        """Let it give up this share of its time.

        Raises:
            GuestError: It does not obey.
        """
        self._link.request("throttle", Throttle(percentage=percentage))

    def check_declarations(self, body: bytes) -> None:
        """Whether devices so declared can be loaded here.

        Raises:
            GuestError: They cannot, naming device and field; or the text is none.
        """
        try:
            devices = json.loads(body)
            assert isinstance(devices, list)
        except (ValueError, AssertionError):
            raise GuestError("the source's declarations are no JSON list") from None
        self._link.request("check", Check(devices=devices))

    def save_devices(self, *, was_running: bool) -> None:
        """Take the state of the stopped workload's devices into :attr:`devices`.

        Raises:
            GuestError: A device cannot be saved.
        """
        saved, bodies = self._link.save()
        stopped = PRELAUNCH if self.never_ran else PAUSED
        sections = saved_sections(saved, bodies, self._keys, RUNNING if was_running else stopped)
        declarations = declarations_section(self._introduced.hello.devices)
        self.devices = (declarations, *sections)
        self.vmdescription = workload_description(
            saved, declarations, self.identity.machine, self._page_size
        )

    def complete(
        self,
        devices: Sequence[DeviceState],
        vmdescription: bytes | None,
        seen: SeenOnArrival,
    ) -> None:
        """Load the devices that arrived into the workload.

        Raises:
            GuestError: The workload cannot load them, naming device and field.
        """
        for block in self.ram:
            block.settle_discarded()
        if not self._is_loaded:
            self._load(devices, None)
        self.devices = tuple(devices)
        self.vmdescription = vmdescription
        self.seen = seen

    @property
    def userfaultfd(self) -> int:
        """Of the workload's memory, owned by the guest; -1 if it has none."""
        return self._introduced.userfaultfd

    @property
    def pagemap(self) -> int:
        """Of the workload, owned by the guest; -1 if it has none."""
        return self._introduced.pagemap

    def expect_lazy(self) -> None:
        """Tell a destination that it may have to run before its memory is there.

        Raises:
            GuestError: It does not obey.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self._link.request("lazy", None, (reader,))
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
        self._let_lifeline_go()
        self._lifeline = writer

    def load_lazily(self, devices: Sequence[DeviceState]) -> None:
        """Load the devices while memory is missing; as :meth:`complete`, which follows later."""
        self._load(devices, LAZY_LOAD_WAIT_S)
        self._is_loaded = True
        self.devices = tuple(devices)

    def check_page_sizes(self, there: Sequence[RamBlockSpec]) -> None:
        """Whether its memory has the pages that a postcopy's source has: they come whole.

        Raises:
            GuestError: It has not, naming the block.
        """
        for block, spec in zip(self.ram, there, strict=True):
            if block.backing_page_size != spec.backing_page_size:
                at_source = spec.backing_page_size or spec.page_size
                here = block.backing_page_size or block.page_size
                raise GuestError(
                    f"RAM block '{block.idstr}' is in pages of {at_source} bytes at the source, "
                    f"of {here} here: postcopy needs the same at both ends"
                )

    def now_whole(self) -> None:
        """Tell the workload that all of its memory has come.

        Raises:
            GuestError: It does not obey.
        """
        self._link.request("whole")
        self._let_lifeline_go()

    def restore_owner(self) -> OwnerNote:
        """Take over what an earlier daemon put on record with the workload.

        Raises:
            GuestError: It is no such record.
        """
        note = decode_note(self._introduced.hello.note)
        self._owner = note.owner
        return note

    def record_owner(self, note: OwnerNote) -> None:
        """Put on record with the workload, for the next daemon, who owns it.

        Raises:
            GuestError: It does not obey.
        """
        self._link.request("keep", Keep(note=encode_note(note)))

    def know_present(self) -> None:
        """See :class:`Live`."""
        for block in self.ram:
            block.present[:] = False
            for first, count in self.touched_runs(block).tolist():
                block.present[first : first + count] = True

    def _load(self, devices: Sequence[DeviceState], timeout_s: float | None) -> None:
        saved, bodies = devices_to_load(devices)
        self._link.load(saved, bodies, timeout_s=timeout_s)

    @property
    def shares_memory(self) -> bool:
        """What :meth:`offer_memory` gives is the memory that it has."""
        return True

    def offer_memory(self) -> HandedMemory:
        """Its memory for another process, with what a destination has to know beforehand.

        Raises:
            GuestError: There are too many descriptors.
        """
        return self._memory.offer(self.identity.machine)

    def adopt(self, handed: HandedMemory) -> None:
        """Put memory of another process in the place of its own, for a destination.

        Raises:
            GuestError: It does not fit, or the workload does not obey.
        """
        self._memory.adopt(handed)

    def give_up_memory(self) -> None:
        """Let go of its memory, which is another process's now; it has empty memory then.

        Raises:
            GuestError: The workload does not obey.
        """
        self.has_memory = False
        self.renew_memory()

    def renew_memory(self) -> None:
        """Put empty memory in the place of what it has.

        Raises:
            GuestError: The workload does not obey.
        """
        self._memory.renew()

    @property
    def next_run_state(self) -> str:
        """The run state that came with the stream, or the present one."""
        for device in self.devices:
            if device.idstr == GLOBAL_STATE:
                return decode_run_state(device.body) or RUNNING
        return RUNNING if self.is_running else PAUSED

    def give_back_zeros(self) -> None:
        """Nothing: what was never touched has no memory."""

    def end(self) -> None:
        """Let a workload end that runs elsewhere now."""
        with contextlib.suppress(GuestError):  # it may be gone already
            self._link.request("quit")

    def kill(self) -> None:
        """End a workload that cannot live on, whatever it does."""
        self._link.kill()

    def close(self) -> None:
        """Let the workload go; what it does then is its own affair."""
        if self._faults is not None:
            self._faults.release()
        # Whoever it turns to next can watch its memory only if nobody else does.
        self._introduced.watch_no_more()
        self._link.close()
        self._let_lifeline_go()
        blocks, self.ram = self.ram, ()
        for block in blocks:
            block.memory.close()
        self._introduced.close()

    def _make_tracker(
        self, tracking: str, placed: Sequence[tuple[WorkloadBlock, int]]
    ) -> DirtyTracker:
        if self._introduced.pagemap >= 0 and tracking != "userfaultfd":
            return PagemapTracker(self._introduced.pagemap, placed)
        if self._faults is not None and tracking != "pagemap":
            return FaultTracker(self._faults, self.ram)
        return NoTracker()

    def _let_lifeline_go(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def _go_on_after_all(self) -> None:
        try:
            self._link.request("start", timeout_s=0.5)
        except GuestError:
            # It is in its queue: a workload that only was slow takes both in order.
            return

    def _stand_still_after_all(self) -> None:
        try:
            self._link.request("stop", timeout_s=0.5)
        except GuestError:
            self.is_running = True
