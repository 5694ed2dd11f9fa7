"""The example server moves under ``redis-cli`` and ``redis-benchmark``: nothing is lost."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM as DIRTIER
from tests.support.cpr import channel, incoming_arguments
from tests.support.deadline import until
from tests.support.ports import free_port
from tests.support.redis_tools import (
    BENCHMARK_KEY,
    BenchmarkClient,
    CliClient,
    counter,
    missing_tools,
)
from tests.support.results import add_row
from tests.support.workloads import needs_scan

pytestmark = [
    pytest.mark.interop,
    needs_scan,
    pytest.mark.skipif(
        bool(missing_tools()), reason=f"no {missing_tools()}: apt-get install redis-tools"
    ),
]

PROGRAM = DIRTIER.with_name("kvstore.py")

Move = Callable[[DaemonProcess, DaemonProcess, Path], Awaitable[None]]


async def precopy(here: DaemonProcess, there: DaemonProcess, directory: Path) -> None:
    await here.set_capabilities({"return-path": True})
    await there.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    await here.execute("migrate", {"uri": await there.listening_uri()})
    await here.wait_migration("completed")


async def postcopy(here: DaemonProcess, there: DaemonProcess, directory: Path) -> None:
    for daemon in (here, there):
        await daemon.set_capabilities({"postcopy-ram": True, "postcopy-preempt": True})
    await there.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    await here.set_parameters({"max-bandwidth": 1 << 20})
    await here.execute("migrate", {"uri": await there.listening_uri()})
    await here.wait_migration("active")
    await here.execute("migrate-start-postcopy")
    await here.wait_migration("completed")


async def save_and_restore(here: DaemonProcess, there: DaemonProcess, directory: Path) -> None:
    """As a machine that is switched off and on: the server is nowhere for a moment."""
    uri = f"file:{directory}/saved"
    for daemon in (here, there):
        await daemon.set_capabilities({"mapped-ram": True})
    await here.execute("migrate", {"uri": uri})
    await here.wait_migration("completed")
    await here.quit()
    await there.execute("migrate-incoming", {"uri": uri})


async def cpr(here: DaemonProcess, there: DaemonProcess, directory: Path) -> None:
    await here.set_parameters({"mode": "cpr-transfer"})
    await there.execute("migrate-incoming", {"uri": f"unix:{directory}/main"})
    channels = [channel("main", directory / "main"), channel("cpr", directory / "cpr")]
    await here.execute("migrate", {"channels": channels})
    await here.wait_migration("completed")


MOVES: dict[str, Move] = {
    "precopy": precopy,
    "postcopy": postcopy,
    "cpr": cpr,
    "snapshot + restore": save_and_restore,
}


@pytest.mark.parametrize("name", list(MOVES))
async def test_no_acknowledged_write_is_lost(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    port = free_port()
    clis = [CliClient(number, port) for number in range(2)]
    benchmark = BenchmarkClient(port)
    cpr_channel = incoming_arguments(tmp_path / "cpr") if name == "cpr" else []
    async with contextlib.AsyncExitStack() as stack:
        here, there = [
            await stack.enter_async_context(
                await DaemonProcess.start(
                    incoming=incoming, arguments=["-guest", f"attach:{tmp_path}/{side}", *more]
                )
            )
            for side, incoming, more in (("here", None, []), ("there", "defer", cpr_channel))
        ]
        for side in ("here", "there"):
            await start_server(stack, tmp_path / side, port)
        await here.wait_run_state("running")
        await here.set_parameters({"max-bandwidth": 0})
        tasks = [asyncio.create_task(client.run()) for client in (*clis, benchmark)]

        async def end_clients() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        stack.push_async_callback(end_clients)

        def has_written(runs: int, counts: list[int]) -> bool:
            more = zip(clis, counts, strict=True)
            return benchmark.runs > runs and all(c.acknowledged > count + 100 for c, count in more)

        await until(lambda: has_written(0, [0, 0]), "writes before the move")
        await MOVES[name](here, there, tmp_path)
        await there.wait_run_state("running")
        before = benchmark.runs, [client.acknowledged for client in clis]
        await until(lambda: has_written(*before), "writes after the move")
        await end_clients()
        lost = sum(client.lost for client in clis)
        lost += sum([max(0, cli.last - await counter(port, cli.key)) for cli in clis])
        counted = await counter(port, BENCHMARK_KEY)
        lost_runs = max(0, benchmark.acknowledged - counted)
        assert lost == lost_runs == 0
        head = ("way", "client", "acknowledged", "lost", "longest gap")
        table = "redis tools while the server moves"
        if name == next(iter(MOVES)):
            add_row(request.config, table, head)
        total = sum(client.acknowledged for client in clis)
        gap_ms = f"{max(client.longest_gap_s for client in clis) * 1000:.0f} ms"
        add_row(request.config, table, (name, "redis-cli", str(total), str(lost), gap_ms))
        cut = f"{benchmark.cut} runs cut"
        row = (name, "redis-benchmark", str(benchmark.acknowledged), str(lost_runs), cut)
        add_row(request.config, table, row)


async def start_server(stack: contextlib.AsyncExitStack, socket: Path, port: int) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), str(socket), "--port", str(port), "--mib", "16"
    )

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
