"""The QEMU releases that the tests meet, and which of them the default run takes."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import pytest

from migrationd.ctl.qemu_process import find_qemu, installed_versions

RELEASES = ("7.2", "10.0", "11.1")
"""Releases of the full matrix, oldest first."""


def default_release() -> str:
    """The release of the default run: the oldest that is installed."""
    return next(iter(installed_versions()), RELEASES[0])


def how_to_install(release: str | None = None, architecture: str = "x86_64") -> str:
    """What is not installed, with the way to get it."""
    if release is not None:
        return f"QEMU {release} (tests/support/install-qemus)"
    package = "arm" if architecture == "aarch64" else "x86"
    return f"qemu-system-{architecture} (Debian: apt-get install qemu-system-{package})"


def qemu_binary(release: str | None = None, architecture: str = "x86_64") -> str:
    """A QEMU; the test is skipped where there is none.

    Args:
        release: As ``MAJOR.MINOR``, or None for the one on the path.
        architecture: As in ``qemu-system-ARCHITECTURE``.
    """
    binary = find_qemu(release, architecture)
    if binary is None:
        pytest.skip(f"missing: {how_to_install(release, architecture)}")
    return binary


def release_cases(
    *axes: Mapping[str, object] | Sequence[str], default: Callable[..., bool] = lambda *_: True
) -> list[object]:
    """Sets of a test's arguments: every release with every value of the axes.

    The others than those of the default run belong to the full matrix.

    Args:
        axes: Values of each argument behind the release, by their names in the test's name;
            a string is its own name.
        default: Whether values, with the default release, belong to the default run.
    """
    named = [
        list(axis.items()) if isinstance(axis, Mapping) else [(value, value) for value in axis]
        for axis in axes
    ]
    out: list[object] = []
    for release in RELEASES:
        for chosen in product(*named):
            values = [value for _, value in chosen]
            is_default = release == default_release() and default(*values)
            name = "-".join((release, *(name for name, _ in chosen)))
            marks = [] if is_default else [pytest.mark.matrix]
            out.append(pytest.param(release, *values, marks=marks, id=name))
    return out


PREEMPT = {"plain": False, "preempt": True}
"""The axis of ``postcopy-preempt``."""
