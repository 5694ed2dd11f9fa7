import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from migrationd.ctl import boot_guest
from migrationd.ctl.boot_guest import (
    PAGE_BYTES,
    BootGuest,
    Counters,
    check_counters,
    check_run,
    count_passes,
)
from migrationd.errors import GuestError

GUEST = Path(boot_guest.__file__).parent / "guest"
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def memory(values: list[int]) -> bytes:
    pages = np.zeros((len(values), PAGE_BYTES // 4), "<u4")
    pages[:, 0] = values
    pages[:, 1] = 0xFFFFFFFF
    return pages.tobytes()


@pytest.mark.parametrize(
    ("name", "assembler"), [("x86.bin", "as"), ("aarch64.bin", "aarch64-linux-gnu-as")]
)
def test_committed_bytes_are_what_the_source_assembles_to(
    name: str, assembler: str, tmp_path: Path
) -> None:
    if shutil.which(assembler) is None:
        pytest.skip(f"{assembler} is not installed")
    subprocess.run([GUEST / "build.sh", tmp_path], check=True)
    assert (tmp_path / name).read_bytes() == (GUEST / name).read_bytes()


def test_image_carries_the_parameters() -> None:
    guest = BootGuest(counted_pages=7, pages_per_s=5000, filled_pages=3, fill_step_pages=2)
    image = guest.image()
    assert len(image) == 65536
    assert struct.unpack_from("<6I", image, 65536 - 1024 + 0x300) == (
        1 << 20, 7, 20, (1 << 20) + 7 * 4096, 3, 8192,
    )  # fmt: skip
    other = BootGuest("aarch64", counted_pages=7).image()
    assert struct.unpack_from("<3I", other, 0x300) == (0x40100000, 7, 0)


def test_scattered_pages_are_visited_once_each_in_the_programs_order() -> None:
    guest = BootGuest(counted_pages=1000, scattered_over_pages=4096)
    program = guest.image()[-1024:]
    start, pages, _, fill_start, fill_pages, fill_step = struct.unpack_from("<6I", program, 0x300)
    step, end, back = struct.unpack_from("<3I", program, 0x318)
    assert (fill_start, fill_pages, fill_step) == (start + 4096, 2048, 8192)
    address, seen = start, []
    for _ in range(pages):
        seen.append((address - start) // 4096)
        address += step
        if address >= end:
            address -= back
    assert seen == guest.counted_order.tolist()
    assert len(set(seen)) == 1000
    assert max(seen) < 4096
    assert np.abs(np.diff(seen)).min() > 64
    assert guest.needed_bytes == (1 << 20) + (4096 << 12)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"architecture": "s390x"}, "no boot guest for 's390x'"),
        ({"counted_pages": 0}, "at least one page"),
        ({"filled_pages": -1}, "at least one page"),
        ({"scattered_over_pages": 3000}, "a power of two"),
        ({"counted_pages": 600, "scattered_over_pages": 1024}, "at most half"),
        ({"architecture": "aarch64", "scattered_over_pages": 1024}, "a power of two"),
        ({"pages_per_s": -1}, "0 or more"),
        ({"filled_pages": 1 << 19}, "at most 2 GiB"),
    ],
)
def test_impossible_guests_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(GuestError, match=text):
        BootGuest(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "passes"),
    [("", 0), (">", 0), (">A", 1), (">" + ALPHABET + ALPHABET[:3], 29), (">" + ALPHABET, 26)],
)
def test_letters_without_a_gap(text: str, passes: int) -> None:
    assert count_passes(text) == passes


@pytest.mark.parametrize("text", [">B", ">ABD", ">ABB", ">ABC>", ">" + ALPHABET + "B", ">A>BC"])
def test_letters_with_a_gap(text: str) -> None:
    with pytest.raises(GuestError, match=r"gap after \d+ passes"):
        count_passes(text)


def test_consistent_counters() -> None:
    assert check_counters(memory([3, 3, 3])) == Counters(3, 0)
    assert check_counters(memory([4, 4, 3])) == Counters(3, 2)


@pytest.mark.parametrize("values", [[3, 4, 3], [5, 4, 3], [2, 3, 3], [4, 3, 4, 3], [0, 9, 9]])
def test_torn_counters(values: list[int]) -> None:
    with pytest.raises(GuestError, match="torn"):
        check_counters(memory(values))


def test_run_compares_letters_with_memory() -> None:
    assert check_run(">ABC", memory([4, 3])).passes == 3
    # The pass is done, its letter is about to come.
    assert check_run(">ABC", memory([4, 4])).passes == 4
    for text in (">AB", ">ABCD", ">A"):
        with pytest.raises(GuestError, match=re.escape("passes")):
            check_run(text, memory([4, 3]))
