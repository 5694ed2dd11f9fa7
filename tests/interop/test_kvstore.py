"""A server moves while clients write to it: no acknowledged write is lost."""

import asyncio
import contextlib
import itertools
import sys
import time
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.dirtier_process import PROGRAM as DIRTIER
from tests.support.deadline import until
from tests.support.ports import free_port
from tests.support.results import add_row
from tests.support.workloads import needs_scan

pytestmark = [pytest.mark.interop, needs_scan]

PROGRAM = DIRTIER.with_name("kvstore.py")
MOVES = 2


def command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


class Client:
    """Writes one key after the other, and connects again whenever it has to."""

    def __init__(self, number: int, port: int) -> None:
        self._number = number
        self._port = port
        self.acknowledged: dict[bytes, bytes] = {}
        self.longest_gap_s = 0.0
        self.count = 0

    async def run(self) -> None:
        number = 0
        last_s = time.monotonic()
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(0.002)
                continue
            with (
                contextlib.suppress(OSError, asyncio.IncompleteReadError),
                contextlib.closing(writer),
            ):
                while True:
                    key, value = b"%d:%d" % (self._number, number % 500), b"%d" % number
                    writer.write(command(b"SET", key, value))
                    if await reader.readuntil(b"\r\n") == b"+OK\r\n":
                        self.acknowledged[key] = value
                        self.count += 1
                        now_s = time.monotonic()
                        self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
                        last_s = now_s
                    number += 1
                    await asyncio.sleep(0)


async def server(directory: Path, name: str, port: int) -> asyncio.subprocess.Process:
    arguments = [str(directory / f"{name}.guest"), "--port", str(port), "--mib", "16"]
    return await asyncio.create_subprocess_exec(sys.executable, str(PROGRAM), *arguments)


async def read_all(port: int, keys: list[bytes]) -> dict[bytes, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = {}
    with contextlib.closing(writer):
        for key in keys:
            writer.write(command(b"GET", key))
            length = int((await reader.readuntil(b"\r\n"))[1:])
            if length >= 0:
                found[key] = (await reader.readexactly(length + 2))[:-2]
    return found


async def test_no_acknowledged_write_is_lost(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    port = free_port()
    clients = [Client(number, port) for number in range(4)]
    names = [f"s{number}" for number in range(MOVES + 1)]
    async with contextlib.AsyncExitStack() as stack:
        daemons = [
            await stack.enter_async_context(
                await DaemonProcess.start(
                    incoming="tcp:127.0.0.1:0" if index else None,
                    arguments=["-guest", f"attach:{tmp_path}/{name}.guest"],
                )
            )
            for index, name in enumerate(names)
        ]
        processes = [await server(tmp_path, name, port) for name in names]
        for process in processes:
            stack.callback(process.kill)
        await daemons[0].wait_run_state("running")
        tasks = [asyncio.create_task(client.run()) for client in clients]
        for task in tasks:
            stack.callback(task.cancel)

        def all_wrote(least: int) -> bool:
            return all(len(client.acknowledged) >= least for client in clients)

        await until(lambda: all_wrote(200), "writes before the first move")
        for here, there in itertools.pairwise(daemons):
            await here.set_parameters({"max-bandwidth": 0})
            await here.set_capabilities({"return-path": True})
            await here.execute("migrate", {"uri": await there.listening_uri()})
            await here.wait_migration("completed")
            await there.wait_run_state("running")
            before = [dict(client.acknowledged) for client in clients]
            await until(
                lambda before=before: all(
                    client.acknowledged != old for client, old in zip(clients, before, strict=True)
                ),
                "writes after the move",
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        wanted = {key: value for client in clients for key, value in client.acknowledged.items()}
        found = await read_all(port, list(wanted))
        # A write whose acknowledgement was on its way when its client was ended may be newer.
        lost = [key for key, value in wanted.items() if int(found.get(key, b"-1")) < int(value)]
        assert not lost
        gap_s = max(client.longest_gap_s for client in clients)
        total = sum(client.count for client in clients)
        table = "clients of a server that moves twice"
        add_row(request.config, table, ("acknowledged", "lost", "longest gap of a client"))
        add_row(request.config, table, (str(total), str(len(lost)), f"{gap_s * 1000:.0f} ms"))
    for process in processes:
        await process.wait()
