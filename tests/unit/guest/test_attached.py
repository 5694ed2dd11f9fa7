"""A real workload process behind the guest socket."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from migrationd.errors import GuestError
from migrationd.guest import workload_link
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.base import SeenOnArrival
from migrationd.guest.workload_link import WorkloadLink
from migrationd.linux.pagemap import can_scan
from tests.support.deadline import wait_until
from tests.support.descriptors import open_count

needs_scan = pytest.mark.skipif(not can_scan(), reason="PAGEMAP_SCAN needs Linux 6.7")

PROGRAM = """
import sys, time
from types import SimpleNamespace
from migrationd.workload import VMState, Workload, u64, u32
state = SimpleNamespace(count=7)
workload = Workload("unit", on_loaded=lambda: print("loaded", state.count, flush=True))
heap = workload.add_block("heap", 1 << 20)
workload.add_block("spare", 4096)
workload.add_device(VMState("counter", fields=(u64("count"),)), state)
workload.attach(sys.argv[1])
print("attached", flush=True)
while True:
    with workload.active():
        heap[5 * 4096] = (heap[5 * 4096] + 1) % 256
        state.count += 1
    time.sleep(0.001)
"""


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    path = str(tmp_path / "guest.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen()
        sock.settimeout(30)
        yield sock, path


def start(path: str, program: str = PROGRAM) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), path],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def attached(
    listener: tuple[socket.socket, str],
) -> "Iterator[tuple[AttachedGuest, subprocess.Popen[str]]]":
    sock, path = listener
    with start(path) as process:
        try:
            link = WorkloadLink(sock.accept()[0])
            assert link.check_peer() == process.pid
            guest = AttachedGuest(link, link.introduction())
            guest.begin(is_destination=False)
            try:
                yield guest, process
            finally:
                guest.close()
        finally:
            process.kill()


def test_it_introduces_itself(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, _ = attached
    assert guest.identity.machine == "migrationd-unit"
    assert [(block.idstr, block.used_length) for block in guest.ram] == [
        ("heap", 1 << 20),
        ("spare", 4096),
    ]
    assert guest.is_running
    [declared] = json.loads(guest.devices[0].body)
    assert declared["name"] == "counter"


@needs_scan
def test_its_writes_are_seen_until_it_is_stopped(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, _ = attached
    guest.tracker.start()
    wait_until(lambda: guest.tracker.collect()[0].tolist() == [5], "the written page")
    guest.stop()
    guest.tracker.collect()
    before = int(guest.ram[0].memory.view[5 * 4096])
    assert all(len(pages) == 0 for pages in guest.tracker.collect())
    assert guest.ram[0].memory.view[5 * 4096] == before
    guest.start()
    wait_until(lambda: guest.tracker.collect()[0].tolist() == [5], "the page again")


def test_devices_are_saved_and_loaded(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, process = attached
    wait_until(lambda: guest.ram[0].memory.view[5 * 4096] > 0, "its first write")
    guest.stop()
    guest.save_devices(was_running=True)
    assert guest.next_run_state == "running"
    names = [device.idstr for device in guest.devices]
    assert names == ["migrationd/declarations", "globalstate", "counter"]
    count = int.from_bytes(guest.devices[2].body, "big")
    assert count > 7
    assert guest.vmdescription is not None
    document = json.loads(guest.vmdescription)
    assert [device["name"] for device in document["devices"]] == names
    guest.complete(guest.devices, guest.vmdescription, SeenOnArrival())
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    assert process.stdout.readline() == f"loaded {count}\n"


WIDE = """
import sys, threading
from types import SimpleNamespace
from migrationd.workload import VMState, Workload, u8
names = [f"{'f' * 40}{number:05}" for number in range(%d)]
workload = Workload("wide")
workload.add_block("heap", 4096)
device = VMState("wide", fields=tuple(u8(name) for name in names))
workload.add_device(device, SimpleNamespace(**dict.fromkeys(names, 1)))
workload.attach(sys.argv[1])
threading.Event().wait()
"""


@pytest.fixture
def introduce(
    listener: tuple[socket.socket, str],
) -> Iterator[Callable[[str], AttachedGuest]]:
    """Starts a program and takes it as the guest."""
    sock, path = listener
    with contextlib.ExitStack() as stack:

        def begin(program: str) -> AttachedGuest:
            process = stack.enter_context(start(path, program))
            stack.callback(process.kill)
            link = WorkloadLink(sock.accept()[0])
            guest = AttachedGuest(link, link.introduction())
            stack.callback(guest.close)
            guest.begin(is_destination=False)
            return guest

        yield begin


def test_messages_longer_than_a_socket_takes_by_default(
    introduce: Callable[[str], AttachedGuest],
) -> None:
    guest = introduce(WIDE % 2900)
    declared = guest.devices[0].body
    assert len(declared) > 212_992, "net.core.wmem_default"
    guest.check_declarations(declared)
    guest.stop()
    guest.save_devices(was_running=True)
    assert guest.devices[2].body == bytes([1]) * 2900
    guest.complete(guest.devices, guest.vmdescription, SeenOnArrival())
    guest.start()
    assert guest.is_running


def test_an_answer_that_is_too_long_is_an_error_and_the_guest_goes_on(
    introduce: Callable[[str], AttachedGuest],
) -> None:
    guest = introduce(WIDE % 3100)
    guest.stop()
    with pytest.raises(GuestError, match=r"a message of \d+ bytes is too long"):
        guest.save_devices(was_running=True)
    guest.start()
    with pytest.raises(GuestError, match=r"a request of \d+ bytes is too long"):
        guest.check_declarations(json.dumps([{"name": "x" * (256 << 10)}]).encode())
    guest.stop()


def test_devices_that_do_not_fit_are_named(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, _ = attached
    body = guest.devices[0].body
    guest.check_declarations(body)
    with pytest.raises(GuestError, match="device 'counter': field 'count': type uint32 is uint64"):
        guest.check_declarations(body.replace(b"uint64", b"uint32"))
    with pytest.raises(GuestError, match="no JSON list"):
        guest.check_declarations(b"{")


def test_nothing_runs_before_the_daemon_has_begun(
    listener: tuple[socket.socket, str],
) -> None:
    sock, path = listener
    with start(path) as process:
        try:
            link = WorkloadLink(sock.accept()[0])
            guest = AttachedGuest(link, link.introduction())
            time.sleep(0.1)
            guest.begin(is_destination=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "attached\n"
            guest.stop()
            guest.save_devices(was_running=False)
            assert int.from_bytes(guest.devices[2].body, "big") == 7
            guest.close()
        finally:
            process.kill()


def test_a_destination_is_empty_and_stands_still(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, _ = attached
    guest.begin(is_destination=True)
    assert not guest.is_running
    assert not guest.ram[0].memory.view.any()
    guest.ram[0].place_batch(np.array([9], np.int64), np.ones((1, 4096), np.uint8), True)
    guest.start()
    wait_until(lambda: guest.ram[0].memory.view[5 * 4096] > 0, "the workload's first write")
    assert guest.ram[0].memory.view[9 * 4096 : 10 * 4096].all()


@needs_scan
def test_one_that_is_let_go_can_be_watched_by_who_takes_it_next(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
    listener: tuple[socket.socket, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However soon it comes: nobody else may hold on to its memory then."""
    guest, _ = attached
    close = WorkloadLink.close
    descriptors = []

    def close_and_meet_again(link: WorkloadLink) -> None:
        close(link)
        again = WorkloadLink(listener[0].accept()[0])
        introduced = again.introduction()
        descriptors.append(introduced.userfaultfd)
        introduced.close()
        close(again)

    with monkeypatch.context() as patch:
        patch.setattr(WorkloadLink, "close", close_and_meet_again)
        guest.close()
    assert descriptors[0] >= 0


def test_a_workload_that_dies_is_an_error(
    attached: "tuple[AttachedGuest, subprocess.Popen[str]]",
) -> None:
    guest, process = attached
    process.kill()
    process.wait()
    with pytest.raises(GuestError, match="the workload is gone"):
        guest.stop()


def test_a_workload_that_hangs_is_an_error_and_goes_on_later(
    listener: tuple[socket.socket, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, path = listener
    go_on = tmp_path / "go on"
    hang = f"while not os.path.exists({str(go_on)!r}): time.sleep(0.01)"
    program = "import os\n" + textwrap.dedent(PROGRAM).replace(
        "        state.count += 1", f"        state.count += 1\n        {hang}"
    )
    with start(path, program) as process:
        try:
            link = WorkloadLink(sock.accept()[0])
            guest = AttachedGuest(link, link.introduction())
            guest.begin(is_destination=False)
            wait_until(lambda: guest.ram[0].memory.view[5 * 4096] > 0, "that it is at work")
            with monkeypatch.context() as patched:
                patched.setattr(workload_link, "REQUEST_WAIT_S", 0.2)
                with pytest.raises(GuestError, match="does not answer"):
                    guest.stop()
            go_on.touch()
            value = int(guest.ram[0].memory.view[5 * 4096])
            wait_until(
                lambda: int(guest.ram[0].memory.view[5 * 4096]) > value + 1, "that it goes on"
            )
            guest.close()
        finally:
            process.kill()


def counting(introduce: Callable[[str], AttachedGuest], on_started: str) -> AttachedGuest:
    """A workload that was stopped, and does this when it is started again."""
    program = textwrap.dedent(PROGRAM).replace(
        'Workload("unit", ', f'Workload("unit", on_started=lambda: {on_started}, '
    )
    guest = introduce(program)
    wait_until(lambda: guest.ram[0].memory.view[5 * 4096] > 0, "its first write")
    guest.stop()
    return guest


def test_one_that_fails_as_it_starts_stands_still(
    introduce: Callable[[str], AttachedGuest],
) -> None:
    guest = counting(introduce, "1 / 0")
    with pytest.raises(GuestError, match="ZeroDivisionError"):
        guest.start()
    assert not guest.is_running
    value = int(guest.ram[0].memory.view[5 * 4096])
    time.sleep(0.05)
    assert guest.ram[0].memory.view[5 * 4096] == value


def test_one_that_may_run_is_stopped_before_it_leaves(
    introduce: Callable[[str], AttachedGuest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = tmp_path / "go on"
    is_time = f"__import__('os').path.exists({str(go_on)!r})"
    hang = f"[time.sleep(0.01) for _ in iter(lambda: {is_time}, True)]"
    guest = counting(introduce, hang)
    with monkeypatch.context() as patched:
        patched.setattr(workload_link, "REQUEST_WAIT_S", 0.2)
        with pytest.raises(GuestError, match="does not answer"):
            guest.start()
    assert guest.is_running
    value = int(guest.ram[0].memory.view[5 * 4096])
    go_on.touch()
    wait_until(lambda: int(guest.ram[0].memory.view[5 * 4096]) != value, "that it goes on")
    assert guest.stop()
    value = int(guest.ram[0].memory.view[5 * 4096])
    time.sleep(0.05)
    assert guest.ram[0].memory.view[5 * 4096] == value


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([b"{"], "no JSON"),
        ([b'{"ready": {}}'], "does not begin with hello"),
        ([b'{"hello": {"version": 1}}'], "Field required"),
        ([b'{"hello": 1}'], "hello"),
        ([], "the workload is gone"),
        (
            [b'{"hello":{"version":2,"name":"x","page_size":4096,"running":true,"devices":[]}}'],
            "speaks version 2",
        ),
        (
            [
                b'{"hello":{"version":1,"name":"x","page_size":4096,"running":true,"devices":[]}}',
                b'{"ready": {}}',
            ],
            "out of order",
        ),
        (
            [
                b'{"hello":{"version":1,"name":"x","page_size":4096,"running":true,"devices":[]}}',
                b'{"block": {"name": "b", "size": 8192, "address": 4096}}',
            ],
            "does not fit its memfd of 4096 bytes",
        ),
    ],
)
def test_a_workload_that_lies_is_refused_and_leaks_nothing(
    messages: list[bytes], text: str
) -> None:
    before = open_count()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memfd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, 4096)
    for message in messages:
        socket.send_fds(theirs, [message], [memfd] if b'"block"' in message else [])
    if not messages or b'"block"' not in messages[-1]:
        theirs.shutdown(socket.SHUT_WR)
    link = WorkloadLink(ours)
    with pytest.raises(GuestError, match=text):
        link.introduction()
    link.close()
    theirs.close()
    os.close(memfd)
    assert open_count() == before


def test_a_memfd_that_could_shrink_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memfd = os.memfd_create("test")
    os.ftruncate(memfd, 4096)
    hello = b'{"hello":{"version":1,"name":"x","page_size":4096,"running":true,"devices":[]}}'
    theirs.send(hello)
    socket.send_fds(theirs, [b'{"block": {"name": "b", "size": 4096, "address": 4096}}'], [memfd])
    theirs.send(b'{"ready": {}}')
    link = WorkloadLink(ours)
    introduced = link.introduction()
    with pytest.raises(GuestError, match="cannot be sealed"):
        AttachedGuest(link, introduced)
    introduced.close()
    link.close()
    theirs.close()
    os.close(memfd)
