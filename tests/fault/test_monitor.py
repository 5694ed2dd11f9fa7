"""Hostile clients of a daemon's monitors: answered, bounded, and no matter to the others."""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.linux.scm_rights import send_with_fds
from tests.support.deadline import AT_ONCE_S

pytestmark = pytest.mark.fault

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
STATUS = b'{"execute": "query-status"}'
MONITORS = 4
PATIENCE_S = 240
"""Longer than a test may take: what hangs is the test's timeout to find, not a socket's."""


class Client:
    """A client that can misbehave."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        while True:
            try:
                self.sock.connect(str(path))
                break
            except BlockingIOError:  # as many wait as the kernel lets
                time.sleep(0.001)
        self.stream = self.sock.makefile("rb")

    def negotiate(self) -> "Client":
        assert b"QMP" in self.stream.readline()
        assert self.ask(NEGOTIATE) == {"return": {}}
        return self

    def ask(self, data: bytes) -> dict[str, Any]:
        self.sock.sendall(data)
        return self.reply()

    def reply(self) -> dict[str, Any]:
        while True:
            line = self.stream.readline()
            assert line.endswith(b"\r\n"), line
            message: dict[str, Any] = json.loads(line)
            if "event" not in message:
                return message

    def close(self) -> None:
        self.stream.close()
        self.sock.close()


class Target:
    """A daemon with several monitors beside the one that steers it."""

    def __init__(self, daemon: DaemonProcess, paths: list[Path]) -> None:
        self.daemon = daemon
        self.paths = paths

    def open_fds(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/fd"))

    async def check_others(self) -> None:
        """The steering monitor answers at once."""
        start = time.perf_counter()
        await self.daemon.query("query-status")
        taken_s = time.perf_counter() - start
        assert taken_s < AT_ONCE_S


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    paths = [tmp_path / f"{number}.sock" for number in range(MONITORS)]
    arguments = [word for path in paths for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    async with await DaemonProcess.start(arguments=arguments) as daemon:
        yield Target(daemon, paths)


async def test_ten_thousand_commands_before_the_first_reply_is_read(target: Target) -> None:
    client = (await asyncio.to_thread(Client, target.paths[0])).negotiate()
    before = target.daemon.resident_bytes
    commands = (b'{"execute": "query-migrate-parameters"}' + b"\n") * 10_000
    sending = asyncio.create_task(asyncio.to_thread(client.sock.sendall, commands))
    for _ in range(20):
        await asyncio.sleep(0.02)
        await target.check_others()
    assert target.daemon.resident_bytes - before < 8 << 20
    for _ in range(10_000):
        assert len((await asyncio.to_thread(client.reply))["return"]) > 20
    await sending
    client.close()


async def test_a_hundred_clients_at_once(target: Target) -> None:
    def talk(path: Path) -> str:
        client = Client(path).negotiate()
        status = client.ask(STATUS)["return"]["status"]
        client.close()
        return str(status)

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(100) as threads:
        work = [
            loop.run_in_executor(threads, talk, target.paths[number % MONITORS])
            for number in range(100)
        ]
        statuses = await asyncio.wait_for(asyncio.gather(*work), PATIENCE_S)
    assert statuses == ["prelaunch"] * 100
    await target.check_others()


async def test_a_thousand_clients_that_vanish_in_the_middle(target: Target) -> None:
    await target.check_others()
    before = target.open_fds()

    def vanish() -> None:
        pieces = (b"", STATUS[:9], NEGOTIATE + STATUS, b'{"execute": "')
        for number in range(1000):
            client = Client(target.paths[number % MONITORS])
            client.sock.sendall(pieces[(number + number // MONITORS) % len(pieces)])
            client.close()

    await asyncio.to_thread(vanish)
    await target.check_others()
    await until(lambda: target.open_fds() <= before)


async def test_a_thousand_descriptors_that_nobody_asked_for(target: Target) -> None:
    client = (await asyncio.to_thread(Client, target.paths[0])).negotiate()
    await target.check_others()
    before = target.open_fds()
    reading, writing = os.pipe()
    rest = (
        b"\x01\n",
        STATUS,
        STATUS[:7],
        b'{"execute": "getfd", "arguments": {"fdname": "1x"}}',
        b'{"execute": "add-fd", "arguments": {"fdset-id": -1}}',
    )
    for number in range(1000):
        data = rest[number % len(rest)]
        send_with_fds(client.sock, data, [reading, writing, reading])
        if data == STATUS[:7]:
            client.sock.sendall(STATUS[7:])
        await asyncio.to_thread(client.reply)
    for fd in (reading, writing):
        os.close(fd)
    await until(lambda: target.open_fds() <= before)
    client.close()


async def test_sets_of_descriptors_outlive_their_client(target: Target, tmp_path: Path) -> None:
    client = (await asyncio.to_thread(Client, target.paths[0])).negotiate()
    fd = os.open(tmp_path / "state", os.O_RDWR | os.O_CREAT)
    send_with_fds(client.sock, b'{"execute": "add-fd", "arguments": {"opaque": "o"}}', [fd])
    added = (await asyncio.to_thread(client.reply))["return"]
    os.close(fd)
    client.close()
    sets = await target.daemon.execute("query-fdsets")
    assert sets == [{"fdset-id": 0, "fds": [{"fd": added["fd"], "opaque": "o"}]}]
    before = target.open_fds()
    await target.daemon.execute("remove-fd", {"fdset-id": 0})
    await until(lambda: target.open_fds() < before)


NESTED = b"[" * 100_000
ENDLESS_STRING = b'{"execute": "' + b"x" * (70 << 20)
ENDLESS_NUMBER = b"[" + b"1" * (4 << 20)
MANY_TOKENS = b"[" + b"1," * (2 << 20)
NOISE = bytes(range(256)) * 4096


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (NESTED, "JSON nesting depth limit exceeded"),
        (ENDLESS_STRING, "JSON token size limit exceeded"),
        (ENDLESS_NUMBER, None),
        pytest.param(
            MANY_TOKENS,
            "JSON token count limit exceeded",
            marks=[pytest.mark.matrix, pytest.mark.timeout(140)],
        ),
        (NOISE, "JSON parse error"),
    ],
    ids=["nested", "string", "number", "tokens", "noise"],
)
async def test_huge_input_is_refused_and_the_monitor_recovers(
    target: Target, data: bytes, text: str | None
) -> None:
    lines: list[bytes] = []

    def read() -> None:
        for line in client.stream:
            lines.append(line)
            if b'"id": "end"' in line:
                return

    recover = b'\x01\n\x01\n{"execute": "query-status", "id": "end"}'
    with contextlib.closing(await asyncio.to_thread(Client, target.paths[0])) as client:
        client.negotiate()
        reading = asyncio.create_task(asyncio.to_thread(read))
        sending = asyncio.create_task(asyncio.to_thread(client.sock.sendall, data + recover))
        while not reading.done():
            await asyncio.sleep(0.05)
            await target.check_others()
        await reading
        await sending
    assert b"return" in lines[-1]
    if text is not None:
        assert any(text in line.decode() for line in lines)
    assert target.daemon.resident_bytes < 400 << 20


async def test_mixed_input_split_at_every_byte(target: Target) -> None:
    client = (await asyncio.to_thread(Client, target.paths[0])).negotiate()
    data = b"""{'execute': "query-name", "id": [1.5, "\\u00e4"]} \x01\n12 """ + STATUS
    for cut in range(1, len(data)):
        client.sock.sendall(data[:cut])
        if cut % 8 == 0:
            await asyncio.sleep(0.001)
        client.sock.sendall(data[cut:])
        replies = [await asyncio.to_thread(client.reply) for _ in range(4)]
        assert replies[0] == {"return": {}, "id": [1.5, "ä"]}
        assert [next(iter(reply)) for reply in replies] == ["return", "error", "error", "return"]
    client.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_the_socket_of_a_daemon_that_took_the_place_stays(
    tmp_path: Path, closing: list[object]
) -> None:
    path = tmp_path / "same.qmp"
    option = ["-qmp", f"unix:{path},server=on,wait=off"]
    first = await DaemonProcess.start(arguments=option)
    closing.append(first)
    closing.append(await DaemonProcess.start(arguments=option))
    assert await first.quit() == 0
    reader, writer = await asyncio.open_unix_connection(path)
    assert b"QMP" in await reader.readline()
    writer.close()
