"""What a workload is told at once, rather than when it migrates."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrationd.errors import GuestError
from migrationd.workload import Workload

PAGE = 4096


@pytest.mark.parametrize("name", ["", "my service", "a\nb", "x" * 256, "gr\u00fcn", None])
def test_names_that_the_guest_socket_does_not_take(name: str) -> None:
    with pytest.raises(GuestError, match="is no name of a workload"):
        Workload(name)
    with pytest.raises(GuestError, match="is no name of a RAM block"):
        Workload("unit").add_block(name, PAGE)


def test_the_longest_name_of_a_block() -> None:
    assert len(Workload("unit").add_block("x" * 255, 1)) == PAGE


TWICE = """
import sys
from migrationd.errors import GuestError
from migrationd.workload import Workload
workload = Workload("unit")
for timeout_s in (0.1, 0.1):
    try:
        workload.attach(sys.argv[1], timeout_s=timeout_s)
    except GuestError as error:
        print(error)
"""


def test_it_is_attached_once(tmp_path: Path) -> None:
    path = str(tmp_path / "guest.sock")
    workload = Workload("unit")
    with pytest.raises(GuestError, match="No such file"):
        workload.attach(path, timeout_s=0)
    workload.add_block("late", PAGE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen()
        # In a process of its own: it goes on asking for a daemon that takes it.
        command = [sys.executable, "-c", TWICE, path]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        f"the daemon behind '{path}' does not take this workload",
        f"the workload is attached to '{path}' already",
    ]


def test_who_leaves_was_inside() -> None:
    workload = Workload("unit")
    with pytest.raises(GuestError, match="nobody is inside"):
        workload.leave()
    with workload.active():
        pass
    assert workload.try_enter()
    workload.leave()
