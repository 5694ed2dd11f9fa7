"""A workload in a process of its own, attached without a daemon."""

import contextlib
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from migrationd.guest.attached import AttachedGuest
from migrationd.guest.workload_link import WorkloadLink

Process = subprocess.Popen[str]


@contextlib.contextmanager
def attached_program(
    directory: Path, program: str, tracking: str = "auto"
) -> Iterator[tuple[AttachedGuest, Process]]:
    """Run a program that attaches to the socket it is given, and begin with it.

    Args:
        directory: For the socket.
        program: Its text.
        tracking: How its writes are tracked.
    """
    path = str(directory / "guest.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(path)
        sock.listen()
        sock.settimeout(30)
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                link = WorkloadLink(sock.accept()[0])
                guest = AttachedGuest(link, link.introduction(), tracking)
                try:
                    guest.begin(is_destination=False)
                    yield guest, process
                finally:
                    guest.close()
            finally:
                process.kill()
