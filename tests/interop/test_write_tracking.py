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
        await two.begin(max_bandwidth=10 << 20)

        async def is_written() -> bool:
            ram = (await two.source.query_migrate()).get("ram")
            return isinstance(ram, dict) and ram["dirty-pages-rate"] > 0

        await until(is_written, "a pass in which the workload wrote", timeout_s=40)
        await two.source.set_parameters({"max-bandwidth": 60 << 20})
        await two.source.wait_migration("completed", timeout_s=40)
        ram = (await two.source.query_migrate())["ram"]
        assert isinstance(ram, dict)
        assert ram["dirty-sync-count"] >= 2
        assert (await two.there.wait_passes(2)).mistakes == 0


@pytest.mark.parametrize("tracking", ["pagemap", "userfaultfd"])
async def test_its_dirty_rate_is_measured_while_it_migrates(tmp_path: Path, tracking: str) -> None:
    if tracking == "userfaultfd" and not can_serve_faults():
        pytest.skip("needs a userfaultfd for all faults")
    async with pair(tmp_path, tracking=tracking) as two:
        await two.here.wait_running()

        async def rate(mode: str) -> int:
            arguments: dict[str, object] = {
                "calc-time": 200,
                "calc-time-unit": "millisecond",
                "mode": mode,
            }
            if mode == "page-sampling":
                # Of 16 MiB the usual 512 pages per GiB are 8: they may all be still.
                arguments["sample-pages"] = 16384

            async def is_measured() -> bool:
                state = await two.source.execute("query-dirty-rate")
                assert isinstance(state, dict)
                return state["status"] == "measured"

            while True:
                await two.source.execute("calc-dirty-rate", arguments)
                await until(is_measured, "the dirty rate")
                state = await two.source.execute("query-dirty-rate")
                assert isinstance(state, dict)
                value = state["dirty-rate"]
                assert isinstance(value, int)
                # A busy machine may not let it write at all for so short a time.
                if value:
                    return value

        # It writes 40 MB/s where the machine lets it, 16 MiB in all.
        assert await rate("page-sampling") <= 80
        assert await rate("dirty-bitmap") <= 80
        await two.begin(max_bandwidth=2 << 20)
        await two.source.wait_migration("active")
        assert await rate("dirty-bitmap") <= 80
        await two.source.set_parameters({"max-bandwidth": 0})
        await two.source.wait_migration("completed")
        assert (await two.there.wait_passes(2)).mistakes == 0
