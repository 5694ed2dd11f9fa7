import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrationd.codec.records import Configuration
from migrationd.errors import StoreError
from migrationd.store import page_writer
from migrationd.store.mapped_ram import PlacedBlock, plan_layout
from migrationd.store.page_writer import GAP_BYTES, PageSource, PageWriter, runs_to_write

PAGE = 4096
PAGES = 3000


def place(position: int = 0) -> PlacedBlock:
    configuration = Configuration("pc-i440fx-10.0")
    return plan_layout(configuration, (), [("b", PAGES * PAGE)], PAGE, position=position).blocks[0]


def make_source(density: float, seed: int = 3) -> PageSource:
    random = np.random.default_rng(seed)
    memory = mmap.mmap(-1, PAGES * PAGE)
    view = np.frombuffer(memory, np.uint8)
    present = random.random(PAGES) < density
    present[100:700] = True
    view.reshape(PAGES, PAGE)[:] = random.integers(1, 255, (PAGES, 1), np.uint8)
    return PageSource(view, present, PAGE)


def open_target(tmp_path: Path, block: PlacedBlock) -> int:
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, block.end_position)
    return fd


def check(fd: int, source: PageSource, block: PlacedBlock) -> None:
    data = np.frombuffer(os.pread(fd, PAGES * PAGE, block.pages_position), np.uint8)
    pages = data.reshape(PAGES, PAGE)
    assert np.array_equal(pages[source.present], source.view.reshape(PAGES, PAGE)[source.present])


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=12))
def test_runs_agree_with_a_loop_over_pages(pieces: list[tuple[bool, int]]) -> None:
    present = np.concatenate(
        [np.zeros(0, np.bool_), *(np.full(count, value) for value, count in pieces)]
    )
    runs: list[list[int]] = []
    for page in np.flatnonzero(present).tolist():
        if runs and (page - sum(runs[-1])) * PAGE < GAP_BYTES:
            runs[-1][1] = page - runs[-1][0] + 1
        else:
            runs.append([page, 1])
    assert runs_to_write(present, PAGE).tolist() == runs


@pytest.mark.parametrize("writers", [1, 4])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("position", [0, 0x1234])
def test_pages_land_at_their_places(
    density: float, writers: int, position: int, tmp_path: Path
) -> None:
    source, block = make_source(density), place(position)
    fd = open_target(tmp_path, block)
    lock = threading.Lock()
    told = [0, 0]

    def on_written(byte_count: int, pages: int) -> None:
        with lock:
            told[0] += byte_count
            told[1] += pages

    writer = PageWriter(fd, [source], [block], writers=writers, on_written=on_written)
    writer.write()
    writer.close()
    check(fd, source, block)
    assert told[1] == np.count_nonzero(source.present)
    assert told[0] >= told[1] * PAGE
    os.close(fd)


def test_long_gaps_stay_holes(tmp_path: Path) -> None:
    source, block = make_source(0.0), place()
    fd = open_target(tmp_path, block)
    PageWriter(fd, [source], [block]).write()
    os.fsync(fd)
    assert os.fstat(fd).st_blocks * 512 < 700 * PAGE
    os.close(fd)


def test_memory_or_places_off_the_alignment_go_through_the_page_cache(tmp_path: Path) -> None:
    source, block = make_source(1.0), place()
    shifted = PageSource(np.concatenate((source.view[:8], source.view))[8:], source.present, PAGE)
    odd = PlacedBlock("b", block.used_length, PAGE, block.bitmap_position, block.pages_position + 8)
    fd = open_target(tmp_path, odd)
    for blocks in ((shifted, block), (source, odd)):
        PageWriter(fd, [blocks[0]], [blocks[1]], direct_io=True).write()
        check(fd, source, blocks[1])
    os.close(fd)


@settings(max_examples=10)
@given(st.integers(1, 5 * PAGE))
def test_short_writes_and_small_chunks_lose_nothing(limit: int) -> None:
    source, block = make_source(0.3), place()
    real = os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: limit + PAGE], at))
        fd = os.memfd_create("target")
        os.ftruncate(fd, block.end_position)
        PageWriter(fd, [source], [block], chunk_bytes=lambda: limit).write()
    check(fd, source, block)
    os.close(fd)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("writers", [1, 3])
def test_the_first_failure_ends_every_writer(
    number: int, writers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, block = make_source(1.0), place()
    fd = open_target(tmp_path, block)
    before = threading.active_count()

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    writer = PageWriter(fd, [source], [block], writers=writers, chunk_bytes=lambda: 64 << 10)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        writer.write()
    writer.close()
    assert threading.active_count() == before
    os.close(fd)


def test_a_disk_of_larger_blocks_is_written_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, block = make_source(1.0), place()
    fd = open_target(tmp_path, block)
    writer = PageWriter(fd, [source], [block])
    real = os.pwrite

    def refuse_direct(target: int, data: memoryview, at: int) -> int:
        if target != fd:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(target, data, at)

    monkeypatch.setattr(os, "pwrite", refuse_direct)
    writer.write()
    writer.close()
    check(fd, source, block)
    os.close(fd)


def test_direct_io_that_was_asked_for_and_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, block = make_source(1.0), place()
    fd = open_target(tmp_path, block)

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="direct-io: Invalid argument"):
        PageWriter(fd, [source], [block], direct_io=True)
    PageWriter(fd, [source], [block]).write()
    check(fd, source, block)
    os.close(fd)


@pytest.mark.parametrize("how", ["reflink", "offload", "neither"])
def test_pages_of_a_file_are_shared_where_the_file_system_can(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file system of this machine cannot is done by copying in its place."""
    made, block = make_source(0.3), place()
    file = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, bytes(PAGE) + made.view.tobytes(), 0)
    source = PageSource(made.view, made.present, PAGE, file, PAGE)
    fd = open_target(tmp_path, block)
    asked: list[str] = []

    def clone(origin: int, start: int, target: int, position: int, length: int) -> bool:
        asked.append("reflink")
        if how == "reflink":
            os.pwrite(target, os.pread(origin, length, start), position)
        return how == "reflink"

    def offload(_source: int, _target: int) -> bool:
        asked.append("offload")
        return how == "offload"

    monkeypatch.setattr(page_writer, "clone_range", clone)
    monkeypatch.setattr(page_writer, "can_offload", offload)
    told: list[tuple[int, int]] = []
    PageWriter(fd, [source], [block], on_written=lambda *args: told.append(args)).write()
    check(fd, source, block)
    assert asked == (["reflink"] if how == "reflink" else ["reflink", "offload"])
    assert sum(pages for _, pages in told) == np.count_nonzero(made.present)
    os.close(fd)
    os.close(file)


def test_what_chunk_bytes_raises_ends_the_write(tmp_path: Path) -> None:
    source, block = make_source(1.0), place()
    fd = open_target(tmp_path, block)

    def stop() -> int:
        raise RuntimeError("cancelled")

    with pytest.raises(RuntimeError, match="cancelled"):
        PageWriter(fd, [source], [block], writers=2, chunk_bytes=stop).write()
    os.close(fd)
