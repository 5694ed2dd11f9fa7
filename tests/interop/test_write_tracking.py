"""How a live process's writes are noted, and how fast it writes."""

from pathlib import Path

import pytest

from migrationd.linux.userfaultfd import can_serve_faults
from tests.support.deadline import until
from tests.support.workloads import needs_scan, pair

pytestmark = [pytest.mark.interop, needs_scan]


@pytest.mark.skipif(not can_serve_faults(), reason="needs a userfaultfd for all faults")
async def test_tracked_by_its_faults_it_loses_nothing_either(tmp_path: Path) -> None:
    async with pair(tmp_path, tracking="userfaultfd") as two:
        await two.here.wait_running()
        await two.begin(max_bandwidth=60 << 20)
        await two.source.wait_migration("completed", timeout_s=40)
        ram = (await two.source.query_migrate())["ram"]
        assert isinstance(ram, dict)
        assert ram["dirty-sync-count"] >= 2
        assert ram["dirty-pages-rate"] > 0
        assert (await two.there.wait_passes(2)).mistakes == 0


@pytest.mark.parametrize("tracking", ["pagemap", "userfaultfd"])
async def test_its_dirty_rate_is_measured_while_it_migrates(tmp_path: Path, tracking: str) -> None:
    if tracking == "userfaultfd" and not can_serve_faults():
        pytest.skip("needs a userfaultfd for all faults")
    async with pair(tmp_path, tracking=tracking) as two:
        await two.here.wait_running()

        async def rate(mode: str) -> int:
            await two.source.execute(
                "calc-dirty-rate",
                {
                    "calc-time": 200,
                    "calc-time-unit": "millisecond",
                    "mode": mode,
                    # Of 16 MiB the usual 512 pages per GiB are 8: they may all be still.
                    **({"sample-pages": 16384} if mode == "page-sampling" else {}),
                },
            )

            async def is_measured() -> bool:
                state = await two.source.execute("query-dirty-rate")
                assert isinstance(state, dict)
                return state["status"] == "measured"

            await until(is_measured, "the dirty rate")
            state = await two.source.execute("query-dirty-rate")
            assert isinstance(state, dict)
            value = state["dirty-rate"]
            assert isinstance(value, int)
            return value

        # It writes 40 MB/s where the machine lets it, 16 MiB in all.
        assert 1 <= await rate("page-sampling") <= 80
        assert 1 <= await rate("dirty-bitmap") <= 80
        await two.begin(max_bandwidth=2 << 20)
        await two.source.wait_migration("active")
        assert 1 <= await rate("dirty-bitmap") <= 80
        await two.source.set_parameters({"max-bandwidth": 0})
        await two.source.wait_migration("completed")
        assert (await two.there.wait_passes(2)).mistakes == 0
