"""One RAM block: its pages, and which of them hold something."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from migrationd.errors import GuestError
from migrationd.guest.memory import Bytes, Memory, Pages, pages_of

IGNORE_SHARED = "x-ignore-shared"
"""Capability of a stream without the pages of files that both ends share."""

_FEW_RUNS = 16
"""More of them are looked at page by page."""


@dataclass(frozen=True, slots=True)
class RamBlockSpec:
    """What the stream says about a block before any page comes.

    Attributes:
        idstr: Name.
        used_length: Bytes.
        page_size: Target page size in bytes.
        address: Guest-physical address, where the stream carries one.
        backing_page_size: Bytes of the huge pages behind the block, where a postcopy spoke of
            them; a destination of a postcopy must have the same.
    """

    idstr: str
    used_length: int
    page_size: int
    address: int | None = None
    backing_page_size: int | None = None


class RamBlock:
    """A block and its memory.

    One thread places pages, or several different ones; others may read once the guest is
    complete.

    Attributes:
        is_elsewhere: Its memory is in a file that both ends share: no page of it is here.
        received: One bool per target page: it came, zero pages too. None until
            :meth:`track_received`: nobody asks before a guest comes by postcopy.
    """

    def __init__(self, spec: RamBlockSpec, memory: Memory) -> None:
        self.idstr = spec.idstr
        self.used_length = spec.used_length
        self.page_size = spec.page_size
        self.address = spec.address
        self.backing_page_size = spec.backing_page_size
        self.memory = memory
        self._bitmap: npt.NDArray[np.uint8] | None = None
        self._present: npt.NDArray[np.bool_] = np.zeros(self.page_count, np.bool_)
        self.is_elsewhere = False
        self.received: npt.NDArray[np.bool_] | None = None

    @property
    def page_count(self) -> int:
        """Target pages of the block."""
        return self.used_length // self.page_size

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """One bool per target page: it came with contents. Others are zero pages."""
        if self._bitmap is not None:
            bits = np.unpackbits(self._bitmap, count=self.page_count, bitorder="little")
            self._present = bits.view(np.bool_)
            self._bitmap = None
        return self._present

    @present.setter
    def present(self, present: npt.NDArray[np.bool_]) -> None:
        self._bitmap = None
        self._present = present

    def use_bitmap(self, bitmap: npt.NDArray[np.uint8]) -> None:
        """Say which pages are present; unpacked when somebody asks.

        Args:
            bitmap: One bit per page, lowest first; bits behind the last page are 0.
        """
        self._bitmap = bitmap

    @property
    def present_count(self) -> int:
        """Pages that are not zero pages."""
        if (bitmap := self._bitmap) is not None:
            return int.from_bytes(bitmap.tobytes(), "little").bit_count()
        return int(np.count_nonzero(self._present))

    def place_batch(self, pages: Pages, data: Bytes, is_run: bool) -> None:
        """Place pages.

        Args:
            pages: Page numbers, shape ``(n,)``.
            data: Contents, shape ``(n, page size)``, maybe strided.
            is_run: Whether the numbers are consecutive.

        Raises:
            GuestError: A page is outside the block, or its memory cannot be written.
        """
        if not len(pages):
            return
        self._check(int(pages.min()), int(pages.max()))
        if is_run:
            first = int(pages[0])
            self.memory.place_run(first, data)
            self.mark_placed(slice(first, first + len(pages)))
        else:
            self.memory.place_pages(pages, data)
            self.mark_placed(pages)

    def place_mixed(
        self, pages: Sequence[int], content_at: Sequence[int], buffer: bytearray
    ) -> None:
        """Place a short row of full and zero pages.

        Args:
            pages: Page numbers.
            content_at: Index in ``buffer`` of each page's content; -1 for a zero page.
            buffer: Where the contents are.

        Raises:
            GuestError: As :meth:`place_batch`.
        """
        self._check(min(pages), max(pages))
        if len(set(pages)) != len(pages):
            # The same page twice: one after the other, the last one wins.
            for page, at in zip(pages, content_at, strict=True):
                if at < 0:
                    self.zero_batch(np.array([page], np.int64))
                else:
                    self.memory.place_scattered((page,), (at,), buffer)
                    self.mark_placed([page])
            return
        full = [page for page, at in zip(pages, content_at, strict=True) if at >= 0]
        if full:
            self.memory.place_scattered(full, [at for at in content_at if at >= 0], buffer)
        if len(full) < len(pages):
            zero = [page for page, at in zip(pages, content_at, strict=True) if at < 0]
            self.zero_batch(np.array(zero, np.int64))
        if full:
            self.mark_placed(full)

    def mark_placed(self, pages: slice | Pages | list[int]) -> None:
        """Say of pages that their contents were put into the memory."""
        self.present[pages] = True
        if self.received is not None:
            self.received[pages] = True

    def zero_batch(self, pages: Pages) -> None:
        """Make pages zero; free for pages that never held anything.

        Raises:
            GuestError: As :meth:`place_batch`.
        """
        if not len(pages):
            return
        self._check(int(pages.min()), int(pages.max()))
        held = pages[self.present[pages]]
        if len(held):
            self.memory.zero_pages(held)
            self.present[held] = False
        if self.received is not None:
            self.received[pages] = True

    def track_received(self) -> None:
        """Keep from now on which pages came; before the first one."""
        if self.received is None:
            self.received = np.zeros(self.page_count, np.bool_)

    def discard(self, runs: Pages) -> None:
        """Forget runs of pages: they are zero, and did not come.

        Args:
            runs: First page and count, shape ``(n, 2)``.

        Raises:
            GuestError: As :meth:`place_batch`.
        """
        for pages in self._indexes(runs):
            is_held = np.flatnonzero(self.present[pages])
            held = is_held + pages.start if isinstance(pages, slice) else pages[is_held]
            if len(held):
                self.memory.zero_pages(held)
                self.present[held] = False
            if self.received is not None:
                self.received[pages] = False

    def _indexes(self, runs: Pages) -> list[slice | Pages]:
        """What is inside runs of pages, as few indexes."""
        runs = runs[runs[:, 1] > 0]
        if len(runs):
            self._check(int(runs[:, 0].min()), int(runs.sum(axis=1).max()) - 1)
        if len(runs) > _FEW_RUNS and int(runs[:, 1].sum()) <= self.page_count:
            return [pages_of(runs)]
        return [slice(first, first + count) for first, count in runs.tolist()]

    @property
    def missing_count(self) -> int:
        """Pages that did not come; 0 while nobody asks."""
        return 0 if self.received is None else int(np.count_nonzero(~self.received))

    def page(self, number: int) -> memoryview:
        """Content of one page; of a zero page, whatever its place in a file still holds.

        Raises:
            GuestError: It is outside the block.
        """
        self._check(number, number)
        if not self.present[number]:
            return memoryview(bytes(self.page_size))
        start = number * self.page_size
        return self.memory.view[start : start + self.page_size].data

    def write_page(self, number: int, content: bytes | bytearray) -> None:
        """Place one page.

        Raises:
            GuestError: It is outside the block, or its memory cannot be written.
        """
        data = np.frombuffer(content, np.uint8).reshape(1, -1)
        self.place_batch(np.array([number], np.int64), data, True)

    def zero_runs(self) -> Pages:
        """Runs of zero pages, shape ``(n, 2)``: first page, count."""
        present = self.present
        if not len(present):
            return np.empty((0, 2), np.int64)
        edges = np.flatnonzero(present[1:] != present[:-1]) + 1
        bounds = np.concatenate(([0], edges, [len(present)]))
        runs = np.stack((bounds[:-1], np.diff(bounds)), axis=1)
        return runs[int(present[0]) :: 2]

    def give_back_zeros(self) -> None:
        """Release the memory of zero pages, as far as whole runs of them allow."""
        self.memory.give_back(self.zero_runs())

    def _check(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.page_count:
            raise GuestError(
                f"page {highest if highest >= self.page_count else lowest} is outside RAM block "
                f"'{self.idstr}' of {self.page_count} pages"
            )
