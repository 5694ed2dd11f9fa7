"""Monitors over real sockets, under uvloop and the standard loop."""

import asyncio
import json
import os
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from migrationd.clock import SystemClock
from migrationd.errors import ConfigError, ConnectFailed, QMPError
from migrationd.linux.scm_rights import send_with_fds
from migrationd.qmp import client as client_module
from migrationd.qmp.client import MonitorClient
from migrationd.qmp.connection import StdioConnection
from migrationd.qmp.event_bus import EventBus
from migrationd.qmp.fds import FdTable, RequestFds
from migrationd.qmp.monitor_spec import MonitorSpec, parse_monitor_spec
from migrationd.qmp.server import Dispatch, MonitorServer
from migrationd.qmp.session import Request, RequestError, Session, failure, success
from tests.support.descriptors import open_count

LOOPS = (uvloop.new_event_loop, asyncio.new_event_loop)
GETFD = b'{"execute": "getfd", "arguments": {"fdname": "x"}}'


class Slow:
    """What ``slow`` waits for."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.finished = asyncio.Event()


slow = Slow()


async def echo(value: object, session: Session, fds: RequestFds) -> dict[str, object]:
    """Answers with the name of the command; getfd takes a descriptor, slow takes its time."""
    try:
        request: Request = session.check_request(value)
    except RequestError as error:
        return failure(error.id, error.error)
    if request.command == "qmp_capabilities":
        session.negotiate(request.arguments.get("enable", []))  # type: ignore[arg-type]
    if request.command == "getfd":
        try:
            fds.name(str(request.arguments["fdname"]))
        except QMPError as error:
            return failure(request.id, error)
    if request.command == "slow":
        slow.started.set()
        await slow.release.wait()
        slow.finished.set()
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

    def negotiate(self, enable: str = "") -> None:
        assert "QMP" in self.recv()
        self.send({"execute": "qmp_capabilities", "arguments": {"enable": [enable][: len(enable)]}})
        self.recv()

    def send(self, value: object) -> None:
        self.sock.sendall(json.dumps(value).encode())

    def ask(self, value: object) -> dict[str, object]:
        self.send(value)
        return self.recv()

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
        global slow
        slow = Slow()
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
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        reading, writing = os.pipe()
        before = open_count()
        for _ in range(1000):
            send_with_fds(client.sock, b'{"execute": "stop"}', [reading, writing])
            await asyncio.to_thread(client.recv)
        assert open_count() == before
        for _ in range(50):
            send_with_fds(
                client.sock, b'{"execute": "getfd", "arguments": {"fdname": "x"}}', [reading]
            )
            assert "return" in await asyncio.to_thread(client.recv)
        assert open_count() == before + 1
        for fd in (reading, writing):
            os.close(fd)
        client.close()

    run(loop, tmp_path, talk)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("data", [b"", b'{"exec', b'{"execute": "qmp_capabilities"}'])
def test_a_client_that_goes_without_reading_makes_room(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path, data: bytes
) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            while not select.select([first], [], [], 0)[0]:
                await asyncio.sleep(0.001)
            # The daemon sees what it sends and that it has gone, at once.
            first.sendall(data)
        second = await asyncio.wait_for(asyncio.to_thread(Client, path), 5)
        await asyncio.wait_for(asyncio.to_thread(second.negotiate), 5)
        second.close()

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


@pytest.mark.parametrize("loop", LOOPS)
def test_a_descriptor_reaches_its_command_among_others_in_pieces(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        reading, writing = os.pipe()
        # Behind another command, and with its end in a later piece.
        client.sock.sendall(b'{"execute": "stop"}')
        send_with_fds(client.sock, b'{"execute": "stop"}' + GETFD[:20], [reading])
        for _ in range(2):
            assert (await asyncio.to_thread(client.recv))["return"] == {"did": "stop"}
        client.sock.sendall(GETFD[20:] + GETFD)
        assert (await asyncio.to_thread(client.recv))["return"] == {"did": "getfd"}
        assert "error" in await asyncio.to_thread(client.recv)
        for fd in (reading, writing):
            os.close(fd)
        client.close()

    run(loop, tmp_path, talk)


@pytest.mark.parametrize("loop", LOOPS)
def test_out_of_band_overtakes_a_command_that_takes_its_time(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate, "oob")
        client.send({"execute": "slow", "id": 1})
        client.send({"execute": "a", "id": 2})
        client.send({"exec-oob": "b", "id": 3})
        order = [(await asyncio.to_thread(client.recv))["id"]]
        slow.release.set()
        order += [(await asyncio.to_thread(client.recv))["id"] for _ in range(2)]
        assert order == [3, 1, 2]
        client.close()

    run(loop, tmp_path, talk)


def test_at_most_eight_commands_wait(tmp_path: Path) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate, "oob")
        commands = [{"execute": "slow", "id": 0}] + [
            {"execute": "a", "id": n} for n in range(1, 11)
        ]
        client.sock.sendall(b"".join(json.dumps(command).encode() for command in commands))
        client.send({"exec-oob": "b", "id": "late"})
        await slow.started.wait()
        slow.release.set()
        replies = [(await asyncio.to_thread(client.recv))["id"] for _ in range(12)]
        assert [item for item in replies if item != "late"] == list(range(11))
        assert replies.index("late") > 1
        client.close()

    run(uvloop.new_event_loop, tmp_path, talk)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_command_runs_to_its_end_when_its_client_goes(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate, "oob")
        client.send({"execute": "slow"})
        await slow.started.wait()
        client.close()
        other = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(other.negotiate)
        assert not slow.finished.is_set()
        slow.release.set()
        await asyncio.wait_for(slow.finished.wait(), 5)
        assert await asyncio.to_thread(other.ask, {"execute": "a"}) == {"return": {"did": "a"}}
        other.close()

    run(loop, tmp_path, talk)


def test_a_command_that_never_ends_does_not_keep_the_monitor_open(tmp_path: Path) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        client.send({"execute": "slow"})
        await slow.started.wait()
        client.close()

    run(uvloop.new_event_loop, tmp_path, talk)


def test_what_was_sent_before_the_end_of_the_input_is_answered(tmp_path: Path) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        client.sock.sendall(b'{"execute": "a"}{"execute": "b"}{"unfinished": ')
        client.sock.shutdown(socket.SHUT_WR)
        lines = await asyncio.to_thread(client.stream.readlines)
        assert [json.loads(line)["return"]["did"] for line in lines] == ["a", "b"]
        client.close()

    run(uvloop.new_event_loop, tmp_path, talk)


def test_bad_input_is_answered_in_its_place(tmp_path: Path) -> None:
    async def talk(bus: EventBus, path: Path) -> None:
        client = await asyncio.to_thread(Client, path)
        await asyncio.to_thread(client.negotiate)
        client.sock.sendall(b'{"execute": "a"}}\n{"execute": "b"}')
        replies = [await asyncio.to_thread(client.recv) for _ in range(3)]
        assert replies[0] == {"return": {"did": "a"}}
        desc = replies[1]["error"]["desc"]  # type: ignore[index]
        assert "JSON parse error, expecting value" in desc
        assert replies[2] == {"return": {"did": "b"}}
        client.close()

    run(uvloop.new_event_loop, tmp_path, talk)


@pytest.mark.parametrize("loop", LOOPS)
def test_tcp_connecting_out_and_standard_input(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def main() -> None:
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        dispatch.set_result(echo)
        bus = EventBus(SystemClock())
        path = str(tmp_path / "listens.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            monitor = MonitorServer(dispatch, bus, parse_monitor_spec(f"unix:{path}"))
            await monitor.start()
            sock, _ = listener.accept()
            with sock, sock.makefile("rb") as stream:
                assert b"QMP" in await asyncio.to_thread(stream.readline)
            await monitor.aclose()
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        spec = parse_monitor_spec(f"tcp:127.0.0.1:{port},server=on,wait=off")
        monitor = MonitorServer(dispatch, bus, spec)
        await monitor.start()
        with socket.create_connection(("127.0.0.1", port)) as sock, sock.makefile("rb") as stream:
            assert b"QMP" in await asyncio.to_thread(stream.readline)
        await monitor.aclose()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_standard_input_and_a_full_pipe_that_does_not_hold_the_process(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def main() -> None:
        reading, writing = os.pipe()
        unread, output = os.pipe()
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        dispatch.set_result(echo)
        connection = StdioConnection(reading, output)
        client = MonitorClient(connection, dispatch, EventBus(SystemClock()), FdTable(), set())
        serving = asyncio.create_task(client.serve())
        command = json.dumps({"execute": "qmp_capabilities", "id": "x" * 40_000}).encode()
        sending = asyncio.create_task(asyncio.to_thread(os.write, writing, command * 8))
        got = b""
        while got.count(b"\r\n") < 9:
            await asyncio.sleep(0.001)
            got += await asyncio.to_thread(os.read, unread, 4096)
        await sending
        assert [next(iter(json.loads(line))) for line in got.splitlines()][:2] == ["QMP", "return"]
        os.close(writing)
        await asyncio.wait_for(serving, 5)
        os.fstat(reading)
        for fd in (reading, output, unread):
            os.close(fd)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_regular_files_as_standard_input_and_output(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    (tmp_path / "in").write_bytes(b'{"execute": "qmp_capabilities"}' + b'{"execute": "a"}' * 500)

    async def main() -> None:
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        dispatch.set_result(echo)
        with (tmp_path / "in").open("rb") as reading, (tmp_path / "out").open("wb") as writing:
            connection = StdioConnection(reading.fileno(), writing.fileno())
            client = MonitorClient(connection, dispatch, EventBus(SystemClock()), FdTable(), set())
            await asyncio.wait_for(client.serve(), 10)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert json.loads(lines[-1]) == {"return": {"did": "a"}}
    assert len(lines) == 502


@pytest.mark.parametrize("loop", LOOPS)
def test_pretty_output(loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    async def main() -> None:
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        dispatch.set_result(echo)
        path = tmp_path / "pretty.sock"
        spec = MonitorSpec("unix", str(path), is_server=True, is_pretty=True)
        monitor = MonitorServer(dispatch, EventBus(SystemClock()), spec)
        await monitor.start()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(b'{"execute": "x", "id": [1, {}]}')
            got = b""
            while b"error" not in got or not got.endswith(b"\r\n}\r\n"):
                got += await asyncio.to_thread(sock.recv, 4096)
        await monitor.aclose()
        lines = got.split(b"\r\n")
        assert lines[:3] == [b"{", b'    "QMP": {', b'        "version": {']
        begin = lines.index(b'    "id": [')
        assert lines[begin - 1 : begin + 5] == [
            b"{", b'    "id": [', b"        1,", b"        {", b"        }", b"    ],",
        ]  # fmt: skip

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path) -> None:
    async def main() -> None:
        dispatch: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        for text, refusal in (
            (f"unix:{tmp_path}/none/s,server=on,wait=off", "cannot listen on '.*/none/s': No such"),
            (f"unix:{tmp_path}/none", "cannot connect to '.*/none': No such file"),
            ("tcp:127.0.0.1:1", "cannot connect to '127.0.0.1:1': Connection refused"),
        ):
            monitor = MonitorServer(dispatch, EventBus(SystemClock()), parse_monitor_spec(text))
            with pytest.raises(ConnectFailed, match=refusal):
                await monitor.start()
            await monitor.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("unix:/a,server=on,wait=off", MonitorSpec("unix", "/a", is_server=True)),
        ("unix:/a,server,nowait", MonitorSpec("unix", "/a", is_server=True)),
        ("unix:/a,server=on", MonitorSpec("unix", "/a", is_server=True, waits=True)),
        ("unix:/a", MonitorSpec("unix", "/a")),
        ("tcp:[::1]:4,server=on,wait=off", MonitorSpec("tcp", host="::1", port=4, is_server=True)),
        ("stdio", MonitorSpec("stdio")),
        ("stdio,pretty=on", MonitorSpec("stdio", is_pretty=True)),
        ("unix:/a,pretty=on", MonitorSpec("unix", "/a", is_pretty=True)),
    ],
)
def test_specs_in_qemus_spelling(text: str, spec: MonitorSpec) -> None:
    assert parse_monitor_spec(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "pty", "stdio:x", "unix:", "tcp:1", "tcp:h:99999", "unix:/a,server=maybe", "unix:/a,x=on"],
)
def test_specs_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="-qmp"):
        parse_monitor_spec(text)
