"""QEMU's own QMP tools on a daemon: its shells and its library."""

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from migrationd.ctl.daemon_process import DaemonProcess
from tests.support.qmp_shell import Shell
from tests.support.qmp_tui import tui
from tests.support.results import add_row

pytestmark = pytest.mark.interop

DAEMON = (sys.executable, "-m", "migrationd")


def show(request: pytest.FixtureRequest, title: str, text: str) -> None:
    for line in text.splitlines():
        add_row(request.config, title, (line[:160],))


async def test_the_human_monitor_in_qmp_shell(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monitor = tmp_path / "person.sock"
    arguments = ["-name", "vm1", "-qmp", f"unix:{monitor},server=on,wait=off"]
    async with await DaemonProcess.start(incoming="defer", arguments=arguments):
        shell = await Shell.start(["-H", str(monitor)], tmp_path)
        assert "Welcome to the HMP shell!" in shell.transcript
        assert "vm1" in await shell.type("info name")
        assert "VM status: paused (inmigrate)" in await shell.type("info status")
        assert "11.1." in await shell.type("info version")
        await shell.type("migrate_set_capability events on")
        assert "events: on" in await shell.type("info migrate_capabilities")
        await shell.type("migrate_set_parameter max-bandwidth 10M")
        assert "max-bandwidth: 10485760 bytes/second" in await shell.type("info migrate_parameters")
        answer = await shell.type("migrate_set_parameter downtime-limit soon")
        assert "Error: Parameter 'downtime-limit' expects a non-negative number" in answer
        await shell.type("migrate_incoming tcp:127.0.0.1:0")
        answer = await shell.type("info migrate")
        assert "Status: \t\tsetup" in answer
        assert "\ttcp:127.0.0.1:" in answer
        assert "bad CPU index" in await shell.type("cpu 1")
        assert "unknown" not in await shell.type("cpu 0")
        assert 'Try "help migrate" for more information' in await shell.type("migrate")
        assert "migrate [-d] [-r] uri -- " in await shell.type("help migrate")
        assert "unknown command: 'migrat'" in await shell.type("migrat")
        listed = (await shell.type("help")).splitlines()
        assert {"migrate", "stop|s", "info"} <= {line.split()[0] for line in listed if line.strip()}
        listed = (await shell.type("info")).splitlines()
        assert "migrate" in {line.split()[1] for line in listed if line.strip()}
        await shell.close()
    show(request, "a qmp-shell -H session", shell.transcript.replace(str(tmp_path), "/run"))


async def test_a_daemon_that_qmp_shell_wrap_starts(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It gives the daemon ``-qmp unix:PATH`` without ``server``: the daemon connects."""
    shell = await Shell.start(["--", *DAEMON, "-name", "vm2"], tmp_path, program="main_wrap")
    assert "vm2" in await shell.type("query-name")
    assert "prelaunch" in await shell.type("query-status")
    assert "return" in await shell.type("quit")
    await shell.close()
    show(request, "a qmp-shell-wrap session", shell.transcript)


async def test_the_client_library(tmp_path: Path) -> None:
    monitor = tmp_path / "library.sock"
    arguments = ["-name", "vm3", "-qmp", f"unix:{monitor},server=on,wait=off"]
    async with await DaemonProcess.start(incoming="defer", arguments=arguments):
        for _ in range(3):  # a client that comes again
            client = QMPClient("person")
            await client.connect(str(monitor))
            assert client.greeting is not None
            assert client.greeting.QMP.capabilities == ["oob"]
            assert await client.execute("query-name") == {"name": "vm3"}
            with pytest.raises(ExecuteError, match="has not been found"):
                await client.execute("no-such-command")
            await client.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": "events", "state": True}]},
            )
            assert len(await client.execute("query-qmp-schema")) > 100
            with pytest.raises(ExecuteError, match="only be run when postcopy is paused"):
                await client.execute("migrate-recover", {"uri": "tcp::0"}, oob=True)
            many = [client.execute("query-status") for _ in range(100)]
            assert len(await asyncio.gather(*many)) == 100
            await client.disconnect()
        client = QMPClient("person")
        await client.connect(str(monitor))
        with client.listener() as events:
            uri = f"unix:{tmp_path}/in.sock"
            await client.execute("migrate-incoming", {"uri": uri})
            event = await asyncio.wait_for(events.get(), 30)
            assert (event["event"], event["data"]) == ("MIGRATION", {"status": "setup"})
        await client.disconnect()


@pytest.mark.parametrize("options", ["", ",server=off"])
async def test_a_daemon_that_connects_out(tmp_path: Path, options: str) -> None:
    path = tmp_path / "listens.sock"
    client = QMPClient("listens")
    await client.start_server(str(path))
    arguments = ["-name", "out", "-qmp", f"unix:{path}{options}"]
    daemon = await DaemonProcess.start(arguments=arguments)
    async with daemon:
        async with asyncio.timeout(30):
            await client.accept()
        assert await client.execute("query-name") == {"name": "out"}
        assert await daemon.query("query-name") == {"name": "out"}
        await client.disconnect()
        assert await daemon.run_state() == "prelaunch"


async def test_standard_input_and_output(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *DAEMON, "-qmp-pretty", "stdio", "-name", "vm4", cwd=tmp_path,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    commands = b'{"execute": "qmp_capabilities"}{"execute": "query-name"}{"execute": "quit"}'
    async with asyncio.timeout(30):
        printed, _ = await process.communicate(commands)
    assert process.returncode == 0
    assert b'    "return": {\r\n        "name": "vm4"\r\n    }\r\n' in printed


async def test_a_monitor_as_libvirt_starts_it(tmp_path: Path) -> None:
    """``-chardev`` with the descriptor of a listening socket, and ``-mon``."""
    path = tmp_path / "monitor.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        process = await asyncio.create_subprocess_exec(
            *DAEMON, "-name", "guest=vm5", "-incoming", "defer",
            "-chardev", f"socket,id=charmonitor,fd={listener.fileno()},server=on,wait=off",
            "-mon", "chardev=charmonitor,id=monitor,mode=control",
            pass_fds=(listener.fileno(),),
        )  # fmt: skip
        # There is no need to wait for it: who connects waits in the listener's queue.
        client = QMPClient("libvirt")
        await client.connect(str(path))
        assert await client.execute("query-chardev") == [
            {
                "label": "charmonitor",
                "filename": f"unix:{path},server=on",
                "frontend-open": True,
            }
        ]
        assert await client.execute("query-yank") == [{"type": "chardev", "id": "charmonitor"}]
        await client.execute("quit")
        with contextlib.suppress(EOFError):  # what a client is told whose monitor has gone
            await client.disconnect()
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_the_terminal_interface(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("urwid", reason="qmp-tui needs urwid")
    monitor = tmp_path / "tui.sock"
    arguments = ["-name", "vm4", "-qmp", f"unix:{monitor},server=on,wait=off"]
    async with await DaemonProcess.start(incoming="defer", arguments=arguments):
        async with tui(monitor, tmp_path) as screen:
            await screen.wait_for('"capabilities": ["oob"]')
            screen.type('{"execute": "query-name"}')
            await screen.wait_for('"name": "vm4"')
            screen.type('{"execute": "query-status"}')
            await screen.wait_for('"status": "inmigrate"')
            screen.type('{"execute": "no-such"}')
            await screen.wait_for("The command no-such has not been found")
            screen.type('{"execute": "migrate-incoming", "arguments": {"uri": "bogus:"}}')
            await screen.wait_for("unknown migration protocol: bogus:")
            screen.press("\x1b")
        text = screen.shown
    show(request, "a qmp-tui session", text)
