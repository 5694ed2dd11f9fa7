"""Workloads in huge pages: they are tracked, sent and waited for whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrationd.linux.pagemap import can_scan
from tests.interop.test_attached_postcopy import POSTCOPY, PREEMPT, begin, statuses
from tests.interop.test_cpr import listen, migrate
from tests.interop.test_cpr import pair as cpr_pair
from tests.support.ctl import ctl
from tests.support.huge_pages import huge_pages
from tests.support.workloads import goes_on, pair

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not can_scan(), reason="PAGEMAP_SCAN needs Linux 6.7"),
]

MIB = 1 << 20
BOTH = (True, True)


@pytest.fixture(autouse=True)
def pool() -> Iterator[None]:
    with huge_pages(64 * MIB):
        yield


def mapped_huge(pid: int) -> bool:
    """Whether the process has its heap in huge pages."""
    maps = Path(f"/proc/{pid}/smaps").read_text()
    entry = maps[maps.index("memfd:migrationd-heap") :]
    line = next(line for line in entry.splitlines() if line.startswith("KernelPageSize:"))
    return int(line.split()[1]) > 4


@pytest.mark.parametrize(
    "huge",
    [
        BOTH,
        pytest.param((True, False), marks=pytest.mark.matrix),
        pytest.param((False, True), marks=pytest.mark.matrix),
    ],
    ids=str,
)
async def test_it_runs_on_and_has_lost_nothing(tmp_path: Path, huge: tuple[bool, bool]) -> None:
    async with pair(tmp_path, huge=huge) as two:
        await two.here.wait_passes(1)
        assert mapped_huge(two.here.process.pid) is huge[0]
        await two.begin()
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert mapped_huge(two.there.process.pid) is huge[1]


@pytest.mark.parametrize(
    "preempt", [pytest.param(False, marks=pytest.mark.matrix), True], ids=["plain", "preempt"]
)
async def test_by_postcopy_a_huge_page_comes_whole(tmp_path: Path, preempt: bool) -> None:
    incoming = PREEMPT if preempt else POSTCOPY
    async with pair(tmp_path, huge=BOTH, incoming=incoming) as two:
        await two.here.wait_passes(1)
        await begin(two, preempt=preempt, rest=4 * MIB)
        await two.source.wait_migration("postcopy-active")
        await two.there.wait_running()
        await two.source.set_parameters({"max-postcopy-bandwidth": 0})
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert mapped_huge(two.there.process.pid)
        assert "postcopy-active" in statuses(two.destination)
        requests = (await two.source.query_migrate())["ram"]["postcopy-requests"]
        assert 1 <= requests <= 8, "one for each huge page at most"


@pytest.mark.parametrize(
    "huge", [(True, False), pytest.param((False, True), marks=pytest.mark.matrix)], ids=str
)
async def test_postcopy_into_other_pages_is_refused_while_it_runs(
    tmp_path: Path, huge: tuple[bool, bool]
) -> None:
    async with pair(tmp_path, huge=huge, incoming=POSTCOPY) as two:
        await two.source.set_capabilities({"postcopy-ram": True})
        await two.begin()
        await two.destination.wait_migration("failed")
        await two.source.wait_migration("failed")
        error = str((await two.destination.query_migrate()).get("error-desc"))
        assert "postcopy needs the same at both ends" in error
        await two.here.wait_passes(1)


@pytest.mark.matrix
async def test_its_state_at_an_instant(tmp_path: Path) -> None:
    async with pair(tmp_path, huge=BOTH, rate_mb_s=200) as two:
        await two.here.wait_passes(1)
        await two.source.set_capabilities({"background-snapshot": True})
        path = tmp_path / "snapshot"
        await two.source.execute("migrate", {"uri": f"file:{path}"})
        await two.source.wait_migration("completed")
        await two.here.wait_passes(2)
        status, said = await ctl("verify", str(path))
        assert status == 0, said


async def test_its_memory_passes_to_another_process(tmp_path: Path) -> None:
    async with cpr_pair(tmp_path, huge=BOTH) as two:
        await two.here.wait_passes(1)
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("completed")
        last = two.here.progress()
        await goes_on(two.there, last)
        assert mapped_huge(two.there.process.pid)


@pytest.mark.matrix
async def test_it_does_not_pass_to_one_without_huge_pages(tmp_path: Path) -> None:
    async with cpr_pair(tmp_path, huge=(True, False)) as two:
        await listen(two, tmp_path)
        await migrate(two, tmp_path)
        await two.source.wait_migration("failed")
        await two.destination.wait_migration("failed")
        error = str((await two.destination.query_migrate()).get("error-desc"))
        assert "'heap' is in huge pages, here it is not" in error
        await two.here.wait_passes(1)
