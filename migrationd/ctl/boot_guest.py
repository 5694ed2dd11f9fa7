"""A tiny guest of our own that proves that it ran on and that its memory is whole.

It is a boot program without an operating system (``guest/x86.S`` for the ``pc`` and
``q35`` machines, ``guest/aarch64.S`` for ``virt``). After an optional fill of a range with
pseudo-random words it prints ``>`` on the first serial port; from then on it adds one to
the 32-bit word at the start of each page of a range, in order, over and over, and prints
one letter (``A`` to ``Z``, and again) after each pass. Two facts follow, at any instant:

* the letters printed so far are ``ABC…`` without a gap, one per pass;
* the words of the range are ``n + 1`` up to some page and ``n`` from there on, where ``n``
  is the number of letters (or the pass is done and its letter is about to be printed).
"""

import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from migrationd.errors import GuestError

PAGE_BYTES = 4096
READY = ">"
"""Printed once, when the fill is done and the counting begins."""

_TICKS_PER_S = 250
_PARAMETERS = struct.Struct("<6I")
_STEPS = struct.Struct("<3I")
_STEPS_OFFSET = 0x318
_SCATTER = 0x9E3779B1
"""Odd, and near the golden ratio of a power of two: steps of it are spread evenly."""
_PARAMETERS_OFFSET = 0x300
_ROM_BYTES = 64 << 10
_RAM_START = {"x86_64": 0, "aarch64": 0x40000000}
_RANGE_OFFSET = 1 << 20
_RAM_END_LIMIT = 2 << 30


@dataclass(frozen=True, slots=True)
class BootGuest:
    """What the guest is to do.

    Attributes:
        architecture: ``x86_64`` (machines ``pc``, ``q35``) or ``aarch64`` (``virt``).
        counted_pages: Pages of 4 KiB that each pass counts, from 1 MiB into RAM.
        pages_per_s: Pages dirtied per second at most, in steps of 250; the guest halts in
            between. 0: as fast as it goes.
        filled_pages: Pages of random words behind the counted range; they cannot be
            compressed and are written once.
        fill_step_pages: Fill each n-th page of that range: 2 leaves every other page zero.
        scattered_over_pages: A power of two: the counted pages are scattered over so many pages,
            of which the others are random, and visited in an order without neighbours. 0:
            they are consecutive. For x86_64.

    Raises:
        GuestError: A value is out of range.
    """

    architecture: str = "x86_64"
    counted_pages: int = 1024
    pages_per_s: int = 0
    filled_pages: int = 0
    fill_step_pages: int = 1
    scattered_over_pages: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in _RAM_START:
            raise GuestError(f"there is no boot guest for '{self.architecture}'")
        if self.counted_pages < 1 or self.filled_pages < 0 or self.fill_step_pages < 1:
            raise GuestError("a boot guest counts at least one page and fills none or more")
        if self.pages_per_s < 0:
            raise GuestError("a boot guest's rate is 0 or more pages per second")
        over = self.scattered_over_pages
        if over and (
            self.architecture != "x86_64"
            or over & (over - 1)
            or self.counted_pages > over // 2
            or self.filled_pages
        ):
            raise GuestError(
                "a boot guest scatters its pages, at most half of them, over a power of two of "
                "pages that it fills itself"
            )
        if self.needed_bytes > _RAM_END_LIMIT:
            raise GuestError("a boot guest uses at most 2 GiB")

    @property
    def counted_address(self) -> int:
        """Guest-physical address of the counted range."""
        return _RAM_START[self.architecture] + _RANGE_OFFSET

    @property
    def counted_bytes(self) -> int:
        """Length of the counted range."""
        return (self.scattered_over_pages or self.counted_pages) * PAGE_BYTES

    @property
    def filled_address(self) -> int:
        """Guest-physical address of the filled range."""
        return self.counted_address + self.counted_bytes

    @property
    def needed_bytes(self) -> int:
        """RAM that the guest's ranges need, from the start of RAM."""
        filled_bytes = self.filled_pages * self.fill_step_pages * PAGE_BYTES
        return _RANGE_OFFSET + self.counted_bytes + filled_bytes

    @property
    def counted_order(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Counted pages in the order of a pass, from the range's start, shape ``(n,)``."""
        if not self.scattered_over_pages:
            return np.arange(self.counted_pages)
        half = self.scattered_over_pages // 2
        return np.arange(self.counted_pages) * (_SCATTER % half) % half * 2

    def image(self) -> bytes:
        """Return the ROM for ``-bios``."""
        burst = 0
        if self.pages_per_s:
            burst = max(1, round(self.pages_per_s / _TICKS_PER_S))
        name = "x86.bin" if self.architecture == "x86_64" else "aarch64.bin"
        program = bytearray(resources.files("migrationd.ctl").joinpath("guest", name).read_bytes())
        _PARAMETERS.pack_into(
            program,
            _PARAMETERS_OFFSET,
            self.counted_address,
            self.counted_pages,
            burst,
            self.filled_address,
            self.filled_pages,
            self.fill_step_pages * PAGE_BYTES,
        )
        if self.scattered_over_pages:
            # Even pages are counted, odd ones filled.
            over = self.scattered_over_pages
            fill = (self.counted_address + PAGE_BYTES, over // 2, 2 * PAGE_BYTES)
            struct.pack_into("<3I", program, _PARAMETERS_OFFSET + 12, *fill)
            step_bytes = _SCATTER % (over // 2) * 2 * PAGE_BYTES
            end = self.counted_address + self.counted_bytes
            _STEPS.pack_into(program, _STEPS_OFFSET, step_bytes, end, self.counted_bytes)
        # The x86 processor starts in the ROM's last bytes, the other in its first.
        if self.architecture == "x86_64":
            return bytes(program).rjust(_ROM_BYTES, b"\0")
        return bytes(program).ljust(_ROM_BYTES, b"\0")

    def write_image(self, directory: Path) -> Path:
        """Write the ROM into a directory and return its path."""
        path = directory / f"boot-guest-{self.architecture}.rom"
        path.write_bytes(self.image())
        return path


def count_passes(text: str) -> int:
    """Count the passes in a guest's serial output and prove that none is missing.

    Args:
        text: All that the guest printed since its start, on however many hosts.

    Returns:
        Letters printed, that is, passes finished.

    Raises:
        GuestError: A letter is missing, repeated or foreign.
    """
    letters = text.removeprefix(READY)
    expected = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * (len(letters) // 26 + 1)
    if letters == expected[: len(letters)]:
        return len(letters)
    at = next(i for i, letter in enumerate(letters) if letter != expected[i])
    raise GuestError(
        f"the guest's letters have a gap after {at} passes: expected {expected[at]!r}, "
        f"found {letters[at : at + 8]!r}"
    )


@dataclass(frozen=True, slots=True)
class Counters:
    """A consistent picture of the counted range.

    Attributes:
        passes: Passes that every page has seen.
        ahead_pages: Pages, from the range's start, that the next pass has counted already.
    """

    passes: int
    ahead_pages: int


def check_counters(memory: bytes) -> Counters:
    """Prove that the counted range is consistent.

    Args:
        memory: The bytes of the counted range of a stopped guest.

    Returns:
        The pass and how far it has come.

    Raises:
        GuestError: The counters are not a single step from ``n + 1`` down to ``n``.
    """
    words = np.frombuffer(memory, dtype="<u4").reshape(-1, PAGE_BYTES // 4)[:, 0].astype(np.int64)
    passes = int(words[-1])
    ahead = int(np.count_nonzero(words != passes))
    if np.any(words[:ahead] != passes + 1) or np.any(words[ahead:] != passes):
        page = int(np.flatnonzero((words != passes) & (words != passes + 1))[:1].sum())
        raise GuestError(
            f"the guest's counters are torn: values from {int(words.min())} to "
            f"{int(words.max())}, {ahead} of {len(words)} pages differ from the last "
            f"(look at page {page})"
        )
    if ahead == len(words):
        raise GuestError("the guest's counters are torn: no page holds the last pass")
    return Counters(passes, ahead)


def check_run(text: str, memory: bytes) -> Counters:
    """Prove that a stopped guest ran on without a gap, wherever it has been.

    Args:
        text: All that it printed, on all hosts in order.
        memory: The bytes of its counted range now.

    Returns:
        How far it has come.

    Raises:
        GuestError: A letter is missing, the counters are torn, or the two disagree: the
            guest has lost work or done it twice.
    """
    letters = count_passes(text)
    counters = check_counters(memory)
    behind = counters.passes - letters
    if behind == 0 or (behind == 1 and counters.ahead_pages == 0):
        return counters
    raise GuestError(
        f"the guest printed {letters} letters but its memory has seen {counters.passes} passes"
    )
