"""Huge pages for a test: set aside for as long as it runs."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.errors import GuestError
from migrationd.workload.block import huge_page_bytes

_COUNT = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def huge_pages(needed_bytes: int) -> Iterator[int]:
    """Set so much aside, beside what is; the test is skipped where that cannot be.

    Returns:
        Bytes of one page.
    """
    try:
        size = huge_page_bytes()
    except GuestError as error:
        pytest.skip(str(error))
    count = -(-needed_bytes // size)
    with _COUNT.open() as file:
        # One test of this host at a time: it puts back what it found.
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(_COUNT.read_text())
        try:
            _COUNT.write_text(str(before + count))
        except OSError as error:
            pytest.skip(f"{count} huge pages: {error.strerror}: {_COUNT}")
        try:
            if int(_COUNT.read_text()) < before + count:
                pytest.skip(f"{count} huge pages: this host has no room for them")
            yield size
        finally:
            _COUNT.write_text(str(before))
