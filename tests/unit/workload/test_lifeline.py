"""A process that ends with the other end of a pipe, and only while it is armed."""

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from migrationd.workload.lifeline import Lifeline
line = Lifeline(int(sys.argv[1]))
for word in sys.argv[2].split():
    getattr(line, word)()
print("ready", flush=True)
os.read(0, 1)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [("arm", -signal.SIGKILL), ("arm disarm", 0), ("arm close", 0), ("disarm", 0)],
)
def test_it_ends_while_armed(words: str, status: int) -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(reader), words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[reader],
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        os.close(reader)
        assert process.stdout.readline() == b"ready\n"
        os.close(writer)
        if not status:
            process.stdin.write(b"x")
            process.stdin.flush()
        assert process.wait(10) == status


def test_it_ends_at_once_if_the_other_end_is_gone() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    command = [sys.executable, "-c", PROGRAM, str(reader), "arm"]
    assert subprocess.run(command, pass_fds=[reader], check=False).returncode == -signal.SIGKILL
    os.close(reader)
