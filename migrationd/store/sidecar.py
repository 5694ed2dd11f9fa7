"""The sidecar of a guest at rest: what QEMU's file has no place for.

A small JSON object; its ``version`` is raised when a reader of the old one would misread it.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from migrationd.errors import StoreError

SIDECAR_VERSION = 1
OWNERS = ("held", "handing-over", "handed-over")

_LIMIT_BYTES = 1 << 20
_PAGE_SIZE_MAX = 1 << 40
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What the sidecar says.

    Attributes:
        name: Guest name.
        owner: One of ``OWNERS``.
        destination: Where it is being or was handed over to.
        run_state: Run state that was chosen for the next host; None: as it came.
        seen: Which optional parts the arriving stream had.
        file_bytes: Size of the guest's file; None if the file came without a sidecar.
        metadata_crc32: Sum of everything in the file but pages; None as ``file_bytes``.
        page_sizes: Bytes of the huge pages behind a block, by its name, where they are known.
        lazy: While it is being handed over by postcopy: ``preempt`` and ``is_loaded``.
    """

    name: str
    owner: str = "held"
    destination: str | None = None
    run_state: str | None = None
    seen: dict[str, bool] = field(default_factory=dict)
    file_bytes: int | None = None
    metadata_crc32: int | None = None
    lazy: dict[str, bool] | None = None
    page_sizes: dict[str, int] = field(default_factory=dict)


def read_sidecar(path: Path) -> Sidecar | None:
    """Read a sidecar; None if there is none.

    Raises:
        StoreError: It cannot be read or is not a guest's record.
    """
    try:
        # Not blocking: what is no file is read as an empty one.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            raw = file.read(_LIMIT_BYTES + 1) or b""
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"'{path}': {error.strerror}") from error
    try:
        return _parse(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"'{path}' is not a guest's record: {error}") from None


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Replace a sidecar, durably: afterwards the old or the new one is there, never a mixture.

    Raises:
        OSError: It is not on stable storage.
    """
    os.rename(write_aside(path, sidecar), path)
    sync_directory(path.parent)


def write_aside(path: Path, sidecar: Sidecar) -> Path:
    """Write a sidecar beside the one that it is to replace; returns where, to be renamed.

    Raises:
        OSError: It is not on stable storage.
    """
    aside = path.with_name(path.name + ".part")
    text = json.dumps({"version": SIDECAR_VERSION, **asdict(sidecar)}, indent=2)
    with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return aside


def sync_directory(path: Path) -> None:
    """Make renames and removals in a directory durable.

    Raises:
        OSError: As the calls.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _parse(raw: bytes) -> Sidecar:
    if len(raw) > _LIMIT_BYTES:
        raise ValueError(f"more than {_LIMIT_BYTES} bytes")
    tree = json.loads(raw)
    if not isinstance(tree, dict):
        raise ValueError("no JSON object")
    if tree.get("version") != SIDECAR_VERSION:
        raise ValueError(f"version {tree.get('version')}, only {SIDECAR_VERSION} is known")
    if tree.get("owner") not in OWNERS:
        raise ValueError(f"owner {tree.get('owner')!r}, expected one of {', '.join(OWNERS)}")
    seen = _flags(tree, "seen") or {}
    return Sidecar(
        name=_value(tree, "name", str) or "",
        owner=tree["owner"],
        destination=_value(tree, "destination", str),
        lazy=_flags(tree, "lazy"),
        run_state=_value(tree, "run_state", str),
        seen=seen,
        file_bytes=_value(tree, "file_bytes", int),
        metadata_crc32=_value(tree, "metadata_crc32", int),
        page_sizes=_page_sizes(tree),
    )


def _page_sizes(tree: dict[str, object]) -> dict[str, int]:
    sizes = _value(tree, "page_sizes", dict) or {}
    for size in sizes.values():
        if type(size) is not int or not 0 < size <= _PAGE_SIZE_MAX or size & (size - 1):
            raise ValueError(f"'page_sizes' holds {size!r}, which is no page size")
    return sizes


def _flags(tree: dict[str, object], key: str) -> dict[str, bool] | None:
    flags = _value(tree, key, dict)
    if flags is not None and not all(isinstance(value, bool) for value in flags.values()):
        raise ValueError(f"'{key}' holds other values than true and false")
    return flags


def _value(tree: dict[str, object], key: str, kind: type[_T]) -> _T | None:
    value = tree.get(key)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"'{key}' is {value!r}, expected {kind.__name__}")
    return value
