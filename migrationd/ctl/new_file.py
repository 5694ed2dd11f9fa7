"""A file that a command writes: there whole, under its name, or not at all.

While it is written it has no name, where the file system can do that: whatever ends the
command leaves nothing behind, and no other file is touched.
"""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from migrationd.errors import StoreError
from migrationd.store.sidecar import sync_directory

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)
_FLAGS = os.O_RDWR | os.O_CLOEXEC


@contextlib.contextmanager
def new_file(target: Path, *, overwrite: bool) -> Iterator[int]:
    """Make a file; it gets its name, durably, when the block ends without an exception.

    Args:
        target: Its name.
        overwrite: Replace a file that has this name.

    Yields:
        Descriptor for reading and writing; closed afterwards.

    Raises:
        StoreError: The file cannot be made or written, or its name is taken.
    """
    try:
        _check_name(target, overwrite=overwrite)
        fd, name = _new_aside(target.parent)
        try:
            yield fd
            os.fsync(fd)
            if name is None and overwrite:
                name = tempfile.mktemp(prefix=".", suffix=".part", dir=target.parent)
                _link(fd, name)
            if name is None:
                _link(fd, str(target))
            else:
                _check_name(target, overwrite=overwrite)
                os.rename(name, target)
                name = None
            sync_directory(target.parent)
        finally:
            os.close(fd)
            if name is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
    except FileExistsError:
        raise StoreError(f"'{target}' is there already; --force replaces it") from None
    except OSError as error:
        raise StoreError(f"'{target}': {error.strerror}") from error


def _check_name(target: Path, *, overwrite: bool) -> None:
    """Refuse a name that is taken, and what is no file of its own: a device, a directory.

    Raises:
        StoreError: It is no regular file.
        OSError: As ``stat``; ``FileExistsError`` where it is there and must not be replaced.
    """
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not os.path.lexists(target):
            return
    else:
        if not stat.S_ISREG(mode):
            raise StoreError(f"'{target}' is no regular file")
    if not overwrite:
        raise FileExistsError


def _new_aside(directory: Path) -> tuple[int, str | None]:
    """A new file in a directory, and its name if it has one.

    Raises:
        OSError: As the calls.
    """
    try:
        return os.open(directory, os.O_TMPFILE | _FLAGS, 0o600), None
    except OSError as error:
        if error.errno not in _NO_NAMELESS:
            raise
    return tempfile.mkstemp(prefix=".", suffix=".part", dir=directory)


def _link(fd: int, name: str) -> None:
    """Give a file without a name one.

    Raises:
        OSError: As ``linkat``.
    """
    # With a directory Python takes linkat, which follows the link that /proc has for the file.
    os.link(f"/proc/self/fd/{fd}", os.path.abspath(name), src_dir_fd=fd, follow_symlinks=True)
