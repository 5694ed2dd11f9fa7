"""The C header against a daemon of our own: what it refuses, and messages that are wrong.

Address and undefined behaviour sanitizers watch where the compiler has them.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrationd.ctl.dirtier_process import PROGRAM

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler: apt-get install gcc"
)

SOURCE = r"""
#include "migrationd_workload.h"

struct state { uint64_t a; uint32_t b; uint8_t c; char wide[16]; };
static struct state state = {1, 2, 3, ""};
static const struct mw_field fields[] = {MW_FIELD(struct state, a), MW_FIELD(struct state, b)};
static const struct mw_field more[] = {MW_FIELD(struct state, c)};
static const struct mw_field wrong[] = {MW_FIELD(struct state, wide)};

static void refused(const char *what, bool is_refused)
{
    printf("%s %s\n", what, is_refused && errno == EINVAL ? "refused" : "TAKEN");
}

static void attach_again(void *w)
{
    printf("attached, again: %d\n", mw_attach(w, "/nonexistent") == -1 && errno == EISCONN);
}

int main(int argc, char **argv)
{
    struct mw_workload *w = mw_create("two");
    char long_name[300];
    memset(long_name, 'x', sizeof(long_name) - 1);
    long_name[sizeof(long_name) - 1] = 0;
    refused("name", !mw_create("a \"name\""));
    refused("block", !mw_add_block(w, "", 1));
    refused("block", !mw_add_block(w, long_name, 1));
    refused("size", mw_add_device(w, "wide", 1, wrong, 1, &state) < 0);
    refused("device", mw_add_device(w, "one two", 1, fields, 2, &state) < 0);
    if (!mw_add_block(w, "heap", 4096) || mw_add_device(w, "first", 1, fields, 2, &state) < 0 ||
        mw_add_device(w, "second", 2, more, 1, &state) < 0)
        return 1;
    refused("twice", mw_add_device(w, "first", 1, fields, 2, &state) < 0);
    w->on_powerdown = attach_again;
    w->on_powerdown_argument = w;
    for (int i = 1; i < argc; i++) {
        if (mw_attach(w, argv[i]) < 0)
            return 1;
        pthread_mutex_lock(&w->lock);
        while (!w->is_gone)
            pthread_cond_wait(&w->changed, &w->lock);
        pthread_mutex_unlock(&w->lock);
        printf("gone, %s, %d %%\n", w->is_open ? "runs" : "stands still", w->throttle_percentage);
    }
    return 0;
}
"""

DEVICES = [
    {
        "name": "first",
        "instance_id": 0,
        "version_id": 1,
        "minimum_version_id": 1,
        "fields": [{"name": "a", "type": "uint64"}, {"name": "b", "type": "uint32"}],
    },
    {
        "name": "second",
        "instance_id": 0,
        "version_id": 2,
        "minimum_version_id": 2,
        "fields": [{"name": "c", "type": "uint8"}],
    },
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("c")
    source, binary = directory / "two.c", directory / "two"
    source.write_text(SOURCE)
    flags = ["-Wall", "-Wextra", "-Werror", "-g", "-I", str(PROGRAM.parent / "c"), "-lpthread"]
    command = ["cc", "-o", str(binary), str(source), *flags]
    watched = subprocess.run(
        [*command, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], check=False
    )
    if watched.returncode:
        subprocess.run(command, check=True)
    return binary


class Daemon:
    """The daemon's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._number = 0
        self.blocks: list[int] = []
        sock.settimeout(30)
        # The kernel's default is less than the longest message.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)
        message, fds = self.receive()
        for fd in fds:
            os.close(fd)
        self.hello = message["hello"]
        while "ready" not in (message := self.receive_block()):
            pass

    def receive(self) -> tuple[dict[str, object], list[int]]:
        data, fds, _, _ = socket.recv_fds(self._socket, 256 << 10, 4)
        return json.loads(data), fds

    def receive_block(self) -> dict[str, object]:
        message, fds = self.receive()
        self.blocks += fds
        return message

    def send(self, data: bytes, fds: Sequence[int] = ()) -> dict[str, object]:
        """Anything, and what is answered."""
        socket.send_fds(self._socket, [data], fds)
        message, received = self.receive()
        for fd in received:
            os.close(fd)
        return message

    def ask(self, request: str, fds: Sequence[int] = (), **arguments: object) -> object:
        """A request; its return, or the text of its error."""
        self._number += 1
        message = {"execute": request, "id": self._number, "arguments": arguments}
        reply = self.send(json.dumps(message).encode(), fds)
        assert reply["id"] == self._number
        return reply["error"] if "error" in reply else reply["return"]

    def close(self) -> None:
        assert self.ask("powerdown") == {}
        for fd in self.blocks:
            os.close(fd)
        self._socket.close()


@contextmanager
def attached(program: Path, directory: Path, count: int = 1) -> Iterator[Iterator[Daemon]]:
    """Run the program; gives one connection after the other."""
    listeners, paths = [], []
    for number in range(count):
        paths.append(str(directory / f"{number}.sock"))
        listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listeners[-1].bind(paths[-1])
        listeners[-1].listen()
        listeners[-1].settimeout(30)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    with subprocess.Popen(
        [program, *paths], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            yield (Daemon(listener.accept()[0]) for listener in listeners)
            output = process.communicate(timeout=30)[0].decode()
        finally:
            process.kill()
            for listener in listeners:
                listener.close()
    assert process.returncode == 0, output
    assert "TAKEN" not in output
    assert output.count("attached, again: 1") == count
    assert output.count("gone, runs, 0 %") == count


def test_devices_that_are_not_the_same_are_refused_before_the_source_stops(
    program: Path, tmp_path: Path
) -> None:
    first, second = DEVICES
    fields = first["fields"]
    assert isinstance(fields, list)
    with attached(program, tmp_path) as connections:
        daemon = next(connections)
        assert daemon.hello["devices"] == DEVICES  # type: ignore[index]
        assert daemon.ask("begin", role="source") == {}
        assert daemon.ask("check", devices=DEVICES) == {}
        for other in (
            [first],
            [second, first],
            [*DEVICES, second | {"name": "third"}],
            [second | {"name": "third"}, *DEVICES],
            [first | {"fields": [*fields, {"name": "z", "type": "uint8"}]}, second],
            [first | {"fields": [{"name": "z", "type": "uint8"}, *fields]}, second],
            [first | {"fields": fields[:1]}, second],
            [first | {"fields": [*fields[:1], {"name": "b", "type": "uint64"}]}, second],
            [first, second | {"version_id": 3}],
            [first, second | {"subsections": [first | {"name": "second/x", "fields": []}]}],
            [],
        ):
            assert "are not those of this program" in str(daemon.ask("check", devices=other))
        daemon.close()


def test_messages_that_are_wrong_hurt_nobody(program: Path, tmp_path: Path) -> None:
    with attached(program, tmp_path) as connections:
        daemon = next(connections)
        assert daemon.ask("begin", role="source") == {}
        reader, writer = os.pipe()
        for data in (b"{", b"\0", b"x" * (256 << 10), b'{"execute": "begi', b'{"id": 99999999999'):
            assert "error" in daemon.send(data)
        assert "the state of the devices is cut short" in str(daemon.ask("load", devices=[]))
        assert "cut short" in str(daemon.ask("load", (reader,), devices=[]))
        assert "cannot be put" in str(daemon.ask("remap", block="heap", is_lent=False))
        assert daemon.ask("stop") == {}
        assert "cannot be put" in str(daemon.ask("remap", block="heap", is_lent=False))
        assert "cannot be put" in str(daemon.ask("remap", (reader,), block="heap", is_lent=False))
        assert "cannot be put" in str(daemon.ask("remap", (reader,), block="hea", is_lent=False))
        assert "too long" in str(daemon.ask("keep", note="x" * 9000))
        assert "too long" in str(daemon.ask("keep"))
        assert "cannot be reset" in str(daemon.ask("reset"))
        assert "not known" in str(daemon.ask("dance", (reader, writer)))
        for percentage in (-1, 100, 1 << 40, "x"):
            assert daemon.ask("throttle", percentage=percentage) == {}
        assert daemon.ask("start") == {}
        # Descriptors that nobody asked for are closed: one would keep the pipe open.
        for _ in range(3):
            assert daemon.ask("start", (writer, writer, reader)) == {}
        os.close(writer)
        assert os.read(reader, 1) == b""
        os.close(reader)
        daemon.close()


def test_the_next_daemon_is_told_and_waited_for(program: Path, tmp_path: Path) -> None:
    with attached(program, tmp_path, count=2) as connections:
        daemon = next(connections)
        assert daemon.ask("begin", role="source") == {}
        assert daemon.ask("keep", note="whose it is") == {}
        assert daemon.ask("throttle", percentage=99) == {}
        daemon.close()
        daemon = next(connections)
        assert daemon.hello["note"] == "whose it is"  # type: ignore[index]
        assert daemon.hello["has_guest"]  # type: ignore[index]
        assert daemon.hello["descriptors"]  # type: ignore[index]
        assert daemon.ask("begin", role="source") == {}
        daemon.close()


def test_memory_that_was_lent_is_not_offered_to_the_next_daemon(
    program: Path, tmp_path: Path
) -> None:
    lent = os.memfd_create("lent")
    os.ftruncate(lent, 4096)
    with attached(program, tmp_path, count=2) as connections:
        daemon = next(connections)
        assert daemon.ask("begin", role="destination") == {}
        assert daemon.ask("remap", (lent,), block="heap", is_lent=True) == {}
        assert daemon.ask("start") == {}
        daemon.close()
        daemon = next(connections)
        [block] = daemon.blocks
        assert os.fstat(block).st_ino != os.fstat(lent).st_ino
        assert daemon.ask("begin", role="source") == {}
        daemon.close()
    os.close(lent)
