"""A workload that fails on purpose at one request of the daemon.

    python faulty_workload.py REQUEST FAULT PROGRAM ...

REQUEST is the name of a request, or ``hello`` or ``block`` of the introduction. The rest
is the workload's program with its arguments.
"""

import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from migrationd.errors import GuestError
from migrationd.workload import client

Message = dict[str, Any]


def die() -> None:
    """End at once, as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    """Answer with an error."""
    raise GuestError("not this time")


def hang() -> None:
    """Do not answer."""
    time.sleep(1000)


BEFORE: dict[str, Callable[[], None]] = {"killed": die, "hangs": hang, "refuses": refuse}
"""What happens instead of an answer."""


def pipe() -> int:
    """A descriptor that is no memfd."""
    return os.pipe()[0]


def unsealed() -> int:
    """A memfd that can shrink."""
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 64 << 20)
    return fd


def shorter(message: Message) -> Message:
    """The same devices, the last of them one byte shorter than it is."""
    devices = message["return"]["devices"]
    devices[-1]["length"] -= 1
    return message


def renamed(message: Message) -> Message:
    """Another device than the declared one."""
    message["return"]["devices"][-1]["name"] = "globalstate"
    return message


ANSWERS: dict[str, Callable[[Message, list[int]], tuple[Message | bytes, list[int]]]] = {
    "unknown member": lambda message, fds: (message | {"surprise": 1}, fds),
    "no JSON": lambda message, fds: (b"{", fds),
    "too long": lambda message, fds: (b'"' + b"x" * (300 << 10) + b'"', fds),
    "descriptors": lambda message, fds: (message, [pipe(), pipe()]),
    "no memfd": lambda message, fds: (message, []),
    "a pipe": lambda message, fds: (message, [pipe()]),
    "can shrink": lambda message, fds: (message, [unsealed()]),
    "wrong length": lambda message, fds: (shorter(message), fds),
    "another device": lambda message, fds: (renamed(message), fds),
    "another version": lambda message, fds: ({"hello": message["hello"] | {"version": 9}}, fds),
    "none passed": lambda message, fds: (message, []),
    "none given": lambda message, fds: ({"hello": message["hello"] | {"descriptors": []}}, []),
    "two pipes": lambda message, fds: (message, [pipe() for _ in fds]),
}
"""What is answered instead."""


def install(at: str, fault: str) -> None:
    """Make the library fail at this request."""
    answer, send = client.Workload._answer, client._send
    asked = {"name": ""}

    def faulty_answer(
        self: client.Workload, request: Message, fds: list[int]
    ) -> tuple[Message, list[int]]:
        asked["name"] = str(request.get("execute"))
        if asked["name"] == at and fault in BEFORE:
            BEFORE[fault]()
        return answer(self, request, fds)

    def faulty_send(sock: Any, message: Message, fds: list[int]) -> None:  # noqa: ANN401
        is_it = at in message or (asked["name"] == at and "return" in message)
        if not is_it:
            return send(sock, message, fds)
        if fault in BEFORE:
            BEFORE[fault]()
        if fault == "stale answers":
            while True:
                send(sock, {"return": {}, "id": 0}, [])
                time.sleep(0.05)
        out: Message | bytes = message
        if fault in ANSWERS:
            out, fds = ANSWERS[fault](message, fds)
        if isinstance(out, bytes):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sock.send(out)
        else:
            send(sock, out, fds)
        if fault == "killed after":
            die()
        return None

    client.Workload._answer = faulty_answer  # type: ignore[method-assign]
    client._send = faulty_send


def main() -> None:
    """Run the program."""
    at, fault, *sys.argv = sys.argv[1:]
    install(at, fault)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
