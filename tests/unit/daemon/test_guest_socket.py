"""The socket that workloads connect to: whatever becomes of one, the next may come."""

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from migrationd.daemon import guest_socket
from migrationd.daemon.guest_socket import GuestSocket
from migrationd.errors import GuestError
from migrationd.guest.attached import AttachedGuest
from migrationd.guest.workload_link import WorkloadLink
from tests.support.deadline import until


async def no_workload(guest: AttachedGuest) -> None:
    raise AssertionError(guest)


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    server = GuestSocket(str(tmp_path / "guest"), no_workload, lambda _: None)
    yield tmp_path / "guest"
    await server.aclose()
    assert not (tmp_path / "guest").exists()


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """Descriptors up to a low limit, but for one; who empties the list frees them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(str(path))
    return sock


async def expect_refusal(workload: socket.socket) -> None:
    with workload:
        assert await asyncio.to_thread(workload.recv, 1) == b""


@pytest.mark.parametrize("error", [GuestError("not now"), ValueError("a defect")])
async def test_a_workload_that_fails_does_not_keep_the_next_one_out(
    error: Exception, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[WorkloadLink] = []

    def introduce(link: WorkloadLink, tracking: str) -> AttachedGuest:
        links.append(link)
        raise error

    monkeypatch.setattr(guest_socket, "_introduce", introduce)
    for count in (1, 2):
        await expect_refusal(connect(path))
        assert len(links) == count


async def test_a_process_without_descriptors_takes_a_workload_later(
    path: Path, taken: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    links: list[WorkloadLink] = []

    def introduce(link: WorkloadLink, tracking: str) -> AttachedGuest:
        links.append(link)
        raise GuestError("not now")

    monkeypatch.setattr(guest_socket, "_introduce", introduce)
    first, second = connect(path), connect(path)
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        os.close(taken.pop())
    await until(lambda: "Too many open files" in caplog.text, "there is no descriptor for it")
    while taken:
        os.close(taken.pop())
    await expect_refusal(first)
    await expect_refusal(second)
    assert len(links) == 1
