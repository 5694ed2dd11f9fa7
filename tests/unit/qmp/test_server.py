"""Monitors over real sockets, under uvloop and the standard loop."""

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from migrationd.clock import SystemClock
from migrationd.linux.scm_rights import send_with_fds
from migrationd.qmp import client as client_module
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.fds import RequestFds
from migrationd.qmp.monitor_spec import MonitorSpec, parse_monitor_spec
from migrationd.qmp.server import Dispatch, MonitorServer
from migrationd.qmp.session import Request, RequestError, Session, failure, success

LOOPS = (uvloop.new_event_loop, asyncio.new_event_loop)
GETFD = b'{"execute": "getfd", "arguments": {"fdname": "x"}}'


async def echo(value: object, session: Session, fds: RequestFds) -> dict[str, object]:
    """Answers with the name of the command; getfd takes a descriptor."""
    try:
        request: Request = session.check_request(value)
    except RequestError as error:
        return failure(error.id, error.error)
    if request.command == "qmp_capabilities":
        session.negotiate([])
    if request.command == "getfd":
        fds.name(str(request.arguments["fdname"]))
    return success(request.id, {"did": request.command})


class Client:
    """A client that writes no newline."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(5)
        self.sock.connect(str(path))
        self.stream = self.sock.makefile("rb")

    def recv(self) -> dict[str, object]:
        line = self.stream.readline()
        assert line.endswith(b"\r\n")
        value: dict[str, object] = json.loads(line)
        return value

    def negotiate(self) -> None:
        assert "QMP" in self.recv()
        self.sock.sendall(b'{"execute": "qmp_capabilities"}')
        self.recv()

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


def run(
    loop: Callable[[], asyncio.AbstractEventLoop],
    directory: Path,
    talk: Callable[[EventBus, Path], Awaitable[None]],
) -> None:
    """Serve a monitor in a directory while a coroutine talks to it."""

    async def main() -> None:
        bus = EventBus(SystemClock())
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        dispatch.set_result(echo)
        path = directory / "qmp.sock"
        monitor = MonitorServer(dispatch, bus, MonitorSpec("unix", str(path), is_server=True))
        await monitor.start()
        try:
            await talk(bus, path)
        finally:
            await monitor.aclose()
        assert not path.exists()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_one_client_at_a_time_and_events_only_after_negotiation(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        first = await asyncio.to_thread(Client, path)
        second = await asyncio.to_thread(Client, path)
        bus.emit("STOP", None)
        await asyncio.to_thread(first.negotiate)
        bus.emit("RESUME", None)
        assert (await asyncio.to_thread(first.recv))["event"] == "RESUME"
        first.sock.sendall(b'{"execute": "a", "id": 1}{"execute": "b", "id": [null]}')
        assert await asyncio.to_thread(first.recv) == {"return": {"did": "a"}, "id": 1}
        assert await asyncio.to_thread(first.recv) == {"return": {"did": "b"}, "id": [None]}
        first.close()
        await asyncio.to_thread(second.negotiate)
        second.close()

    run(loop, tmp_path, talk)


@pytest.mark.parametrize("loop", LOOPS)
def test_descriptors_are_taken_or_closed(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        reading, writing = os.pipe()
        before = count()
        for _ in range(200):
            send_with_fds(client.sock, b'{"execute": "stop"}', [reading])
            await asyncio.to_thread(client.recv)
        assert count() == before
        for _ in range(50):
            send_with_fds(
                client.sock, b'{"execute": "getfd", "arguments": {"fdname": "x"}}', [reading]
            )
            assert "return" in await asyncio.to_thread(client.recv)
        assert count() == before + 1
        for fd in (reading, writing):
            os.close(fd)
        client.close()

    run(loop, tmp_path, talk)


def test_a_client_that_does_not_read_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "OUTPUT_LIMIT_BYTES", 1 << 20)

    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        for _ in range(200):
            for _ in range(200):
                bus.emit("MIGRATION_PASS", {"pass": 1})
            await asyncio.sleep(0)
        other = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(other.negotiate)
        client.close()
        other.close()

    run(uvloop.new_event_loop, tmp_path, talk)


def test_ten_thousand_commands_without_reading_a_reply(tmp_path: Path) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        sender = asyncio.to_thread(client.sock.sendall, b'{"execute": "x"}' * 10000)
        task = asyncio.ensure_future(sender)
        for _ in range(10000):
            assert (await asyncio.to_thread(client.recv))["return"] == {"did": "x"}
        await task
        client.close()

    run(uvloop.new_event_loop, tmp_path, talk)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("unix:/a,server=on,wait=off", MonitorSpec("unix", "/a", is_server=True)),
        ("unix:/a,server,nowait", MonitorSpec("unix", "/a", is_server=True)),
        ("unix:/a,server=on", MonitorSpec("unix", "/a", is_server=True, waits=True)),
        ("unix:/a", MonitorSpec("unix", "/a")),
        ("tcp:[::1]:4,server=on,wait=off", MonitorSpec("tcp", host="::1", port=4, is_server=True)),
        ("stdio", MonitorSpec("stdio")),
    ],
)
def test_specs_in_qemus_spelling(text: str, spec: MonitorSpec) -> None:
    assert parse_monitor_spec(text) == spec
