"""What a process holds: a migration that ended has given back what it took."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.support.deadline import until

POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Most threads of asyncio's own pool. It grows when two calls meet, and never shrinks."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a process holds at one instant.

    Attributes:
        descriptors: What each is.
        threads: How many.
        children: Process ids, of all threads' children.
    """

    descriptors: tuple[str, ...]
    threads: int
    children: tuple[int, ...]

    def fits(self, before: "Resources") -> bool:
        """Whether nothing of a migration is left, beside what was there before."""
        return (
            len(self.descriptors) <= len(before.descriptors)
            and self.threads <= max(before.threads, POOL_THREADS + 1)
            and len(self.children) <= len(before.children)
        )


def held(pid: int) -> Resources:
    """Look at a process."""
    proc = Path(f"/proc/{pid}")
    descriptors = []
    for entry in (proc / "fd").iterdir():
        try:
            descriptors.append(os.readlink(entry))
        except FileNotFoundError:  # closed in between
            continue
    tasks = list((proc / "task").iterdir())
    return Resources(tuple(sorted(descriptors)), len(tasks), tuple(children(pid)))


def children(pid: int) -> list[int]:
    """Child processes of all threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # the thread ended in between
            continue
    return found


async def given_back(pid: int, before: Resources, what: str) -> None:
    """Wait until a process holds no more than before.

    Raises:
        AssertionError: It does, in the end; says what.
    """
    try:
        await until(lambda: held(pid).fits(before), what)
    except AssertionError as error:
        raise AssertionError(f"{error}: held {held(pid)}, before {before}") from error
