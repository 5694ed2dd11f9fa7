import os
import signal
import time
from pathlib import Path

import pytest

from migrationd.errors import ChannelClosed, ConnectFailed
from migrationd.transport import command as command_module
from migrationd.transport.channel import Channel
from migrationd.transport.command import start_command
from migrationd.transport.connect import open_command
from tests.unit.transport.support import in_thread, is_alive, read_all, wait_for


def shell(text: str, *, outgoing: bool = True) -> Channel:
    return open_command(("/bin/sh", "-c", text), outgoing=outgoing)


def receive_all(channel: Channel) -> bytes:
    buffer, received = memoryview(bytearray(65536)), bytearray()
    while count := channel.recv_into(buffer, 5.0):
        received += buffer[:count]
    return bytes(received)


def pids_in(path: Path, count: int) -> list[int]:
    wait_for(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(word) for word in path.read_text().split()]


def test_a_command_takes_the_stream(tmp_path: Path) -> None:
    channel = shell(f"cat > {tmp_path}/out")
    data = os.urandom(3 << 20)
    channel.send(data)
    channel.finish()
    assert (tmp_path / "out").read_bytes() == data
    channel.close()


def test_a_command_gives_the_stream(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(data)
    channel = shell(f"cat {tmp_path}/in", outgoing=False)
    assert not channel.is_duplex
    assert receive_all(channel) == data
    channel.finish()
    channel.close()


def test_arguments_are_not_seen_by_a_shell() -> None:
    channel = open_command(("/bin/echo", "a  $HOME"), outgoing=False)
    assert receive_all(channel) == b"a  $HOME\n"
    channel.close()


def test_a_command_that_does_not_read() -> None:
    channel = shell("exec <&-; exit 3")
    text = r"^Unable to write to command: Broken pipe$"

    def write_on() -> None:
        while True:
            channel.send(bytes(65536))

    with pytest.raises(ChannelClosed, match=text):
        write_on()
    with pytest.raises(ChannelClosed, match=r"^the command failed with status 3$"):
        channel.finish()
    channel.close()


def test_a_command_that_fails_at_the_end() -> None:
    channel = shell("cat >/dev/null; exit 7")
    channel.send(b"x")
    with pytest.raises(ChannelClosed, match=r"^the command failed with status 7$"):
        channel.finish()
    channel.close()


def test_a_command_that_is_killed() -> None:
    channel = shell("cat >/dev/null; kill -9 $$")
    channel.send(b"x")
    with pytest.raises(ChannelClosed, match=r"^the command was ended by signal 9$"):
        channel.finish()
    channel.close()


def test_the_status_of_a_command_that_writes_does_not_count() -> None:
    channel = shell("yes; exit 1", outgoing=False)
    assert channel.recv_into(memoryview(bytearray(4)), 5.0) == 4
    channel.finish()
    channel.close()


def test_a_missing_program() -> None:
    with pytest.raises(ConnectFailed) as caught:
        open_command(("/nonexistent/x",), outgoing=True)
    text = "Failed to execute child process “/nonexistent/x” (No such file or directory)"
    assert str(caught.value) == text
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_standard_streams(tmp_path: Path) -> None:
    channel = shell("readlink /proc/$$/fd/0", outgoing=False)
    assert receive_all(channel) == b"/dev/null\n"
    channel.close()
    channel = shell(f"found=$(readlink /proc/$$/fd/1); echo $found >{tmp_path}/x; cat >/dev/null")
    channel.finish()
    assert (tmp_path / "x").read_text() == "/dev/null\n"
    channel.close()


def test_shutdown_ends_the_whole_pipeline(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    channel = shell(f"(echo $$ >>{pids}; exec sleep 600) | (sleep 600 & echo $! >>{pids}; wait)")
    found = pids_in(pids, 2)
    channel.shutdown()
    wait_for(lambda: not any(map(is_alive, found)))
    channel.close()


def test_close_kills_a_command_that_ignores_signals(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    channel = shell(f"trap '' TERM HUP INT; echo $$ >>{pids}; while :; do sleep 600; done")
    (pid,) = pids_in(pids, 1)
    before = time.monotonic()
    channel.close()
    assert time.monotonic() - before < 5.0
    assert not is_alive(pid)


def test_shutdown_wakes_a_writer_whose_command_stopped_reading() -> None:
    channel = shell("sleep 600")
    sent = in_thread(lambda: channel.send(bytes(4 << 20)))
    wait_for(lambda: channel.bytes_sent > 0)
    channel.shutdown()
    assert str(sent.exception(5)) == "the channel was shut down"
    channel.close()


def test_shutdown_wakes_a_reader() -> None:
    channel = shell("sleep 600", outgoing=False)
    received = in_thread(lambda: channel.recv_into(memoryview(bytearray(9)), None))
    time.sleep(0.02)
    channel.shutdown()
    assert str(received.exception(5)) == "the channel was shut down"
    channel.close()


def test_shutdown_ends_the_wait_for_the_command() -> None:
    channel = shell("cat >/dev/null; trap '' TERM; sleep 600")
    finished = in_thread(channel.finish)
    time.sleep(0.02)
    assert not finished.done()
    channel.shutdown()
    assert str(finished.exception(5)) == "the channel was shut down"
    channel.close()


def test_close_under_the_wait_for_the_command() -> None:
    channel = shell("cat >/dev/null; trap '' TERM; sleep 600")
    finished = in_thread(channel.finish)
    time.sleep(0.02)
    channel.close()
    assert str(finished.exception(5)) == "the channel was shut down"


def test_a_process_left_in_the_background_may_stay(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    channel = shell(f"sleep 600 >/dev/null </dev/null & echo $! >>{pids}; cat >/dev/null")
    (pid,) = pids_in(pids, 1)
    channel.finish()
    channel.close()
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_reaping_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module, "TERMINATE_GRACE_MS", 5000)
    fd, command = start_command(("/bin/cat",), outgoing=True)
    assert is_alive(command.pid)
    command.reap()
    command.reap()
    command.terminate()
    os.close(fd)


def test_nothing_else_is_inherited() -> None:
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    fd, command = start_command(("/bin/ls", "/proc/self/fd"), outgoing=False)
    # ls itself holds the directory.
    assert read_all(fd).split() == [b"0", b"1", b"2", b"3"]
    command.reap()
    for used in (fd, read_fd, write_fd):
        os.close(used)
