"""Messages between the daemon and an attached workload.

The guest socket is an ``AF_UNIX`` ``SOCK_SEQPACKET`` socket that the daemon listens on.
Each packet is one JSON object in UTF-8 of at most 256 KiB; descriptors travel with it by
``SCM_RIGHTS``. The workload introduces itself, then answers one request at a time:

    workload  {"hello": {...}}            [descriptors that the kernel gave it]
    workload  {"block": {...}}            [memfd], for each RAM block
    workload  {"ready": {}}
    daemon    {"execute": NAME, "arguments": {...}, "id": N}
    workload  {"return": {...}, "id": N}  or {"error": TEXT, "id": N}

    begin         what the daemon wants it for; as a destination it must not run before start
    stop start    returns when no thread of it changes memory or devices any more; lets it go on
    throttle      give up this share of its time
    check         can devices with these declarations be loaded here?
    save          devices, as VMState bodies one behind the other in a memfd
    load          the same, in the other direction
    remap         put another memfd in a block's place, at the same address
    lazy          from the next start on memory may be missing, and a thread that touches it waits
                  for it; a workload that runs so must end with its daemon, whose end of the pipe
                  that comes along closes then: its own threads may not get as far as to notice
    whole         all memory is there
    keep          a note that the next hello says again, to whatever daemon
    reset         begin anew, as after a power cycle; powerdown: somebody wants it to end
    quit          end

``schemas/guest/`` is generated from these models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1
"""Of the protocol; a workload of another one is refused."""

MAX_PACKET_BYTES = 256 << 10
"""One message."""

MAX_BLOCKS = 256
"""RAM blocks of one workload."""

MAX_DEVICES = 4096
"""Devices of one workload."""

MAX_STATE_BYTES = 1 << 30
"""Bodies of all devices together."""

MAX_NOTE = 2048
"""Characters of the note that a workload keeps."""

NAME_PATTERN = r"^[\x21-\x7e]{1,255}$"
Name = Annotated[str, Field(min_length=1, max_length=255, pattern=NAME_PATTERN)]
Descriptor = Literal["pagemap", "userfaultfd", "faults"]
Json = dict[str, Any]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Hello(_Message):
    """First message of a workload."""

    version: int
    name: Name
    page_size: Literal[4096, 16384, 65536]
    running: bool
    devices: Annotated[list[Json], Field(max_length=MAX_DEVICES)]
    """Declarations, each with its ``instance_id``."""
    descriptors: Annotated[list[Descriptor], Field(max_length=4)] = []
    """What comes along, in this order: ``pagemap`` and a ``userfaultfd`` that watches all
    blocks for writes asynchronously; and ``faults``, another one that watches nothing yet, that
    writes and accesses wait for, and that the workload itself does not keep."""
    note: Annotated[str, Field(max_length=MAX_NOTE)] = ""
    """What ``keep`` said last; empty if nothing."""
    has_guest: bool = False
    """Whether a daemon took it as a source before, loaded it, or let it run: what is in its memory
    must not be emptied then, unless the note says that it was handed over."""


class Block(_Message):
    """A RAM block: a mapping of the memfd that comes along."""

    name: Name
    size: Annotated[int, Field(gt=0, lt=1 << 46)]
    address: Annotated[int, Field(ge=0, lt=1 << 63)]
    """Where the workload has mapped it."""


class Ready(_Message):
    """Everything was introduced."""


class Introduction(_Message):
    """One message before the first request; exactly one member is there."""

    hello: Hello | None = None
    block: Block | None = None
    ready: Ready | None = None


class SavedDevice(_Message):
    """One device in the memfd of ``save`` and ``load``."""

    name: Name
    instance_id: Annotated[int, Field(ge=0, lt=1 << 32)]
    version_id: Annotated[int, Field(ge=0, lt=1 << 31)]
    length: Annotated[int, Field(ge=0, le=MAX_STATE_BYTES)]


class Begin(_Message):
    """Arguments of ``begin``."""

    role: Literal["source", "destination"]


class Throttle(_Message):
    """Arguments of ``throttle``."""

    percentage: Annotated[int, Field(ge=0, le=99)]


class Check(_Message):
    """Arguments of ``check``."""

    devices: Annotated[list[Json], Field(max_length=MAX_DEVICES)]


class Saved(_Message):
    """What ``save`` returns, and the arguments of ``load``; bodies are in the memfd."""

    devices: Annotated[list[SavedDevice], Field(max_length=MAX_DEVICES)]
    description: Annotated[list[Json], Field(max_length=MAX_DEVICES)] = []
    """Objects of the VMDESCRIPTION, in the same order."""


class Remap(_Message):
    """Arguments of ``remap``; the memfd comes along.

    Memory that is lent belongs to another process until ``load`` has succeeded: a workload
    whose daemon goes before that has to let go of it. It must not run on memory that another
    process runs on: who runs holds an exclusive ``flock`` on each block's memfd.
    """

    block: Name
    is_lent: bool


class Keep(_Message):
    """Arguments of ``keep``."""

    note: Annotated[str, Field(max_length=MAX_NOTE, pattern=r"^[\x20-\x7e]*$")]


class Nothing(_Message):
    """No arguments, or an empty return."""


class Request(_Message):
    """From the daemon."""

    execute: Literal[
        "begin",
        "stop",
        "start",
        "throttle",
        "check",
        "save",
        "load",
        "remap",
        "lazy",
        "whole",
        "keep",
        "reset",
        "powerdown",
        "quit",
    ]
    arguments: Json = {}
    id: int


class Reply(_Message):
    """To the daemon."""

    id: int
    return_: Annotated[Json | None, Field(alias="return")] = None
    error: Annotated[str | None, Field(max_length=4096)] = None


REQUESTS: dict[str, tuple[type[_Message], type[_Message]]] = {
    "begin": (Begin, Nothing),
    "stop": (Nothing, Nothing),
    "start": (Nothing, Nothing),
    "throttle": (Throttle, Nothing),
    "check": (Check, Nothing),
    "save": (Nothing, Saved),
    "load": (Saved, Nothing),
    "remap": (Remap, Nothing),
    "lazy": (Nothing, Nothing),
    "whole": (Nothing, Nothing),
    "keep": (Keep, Nothing),
    "reset": (Nothing, Nothing),
    "powerdown": (Nothing, Nothing),
    "quit": (Nothing, Nothing),
}
"""Arguments and return of each request."""

WITH_DESCRIPTORS = ("save",)
"""Requests that are answered with descriptors."""


def build_models() -> None:
    """Make all models usable now; on their first use it would be while a guest stands still."""
    for model in _Message.__subclasses__():
        model.model_rebuild()
