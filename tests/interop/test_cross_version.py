"""A guest that changes its QEMU's release on the way through the daemon."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from tests.support.moves import Host, check_runs_on, memory_digest, parked_guest, send
from tests.support.releases import RELEASES, qemu_binary
from tests.support.results import add_row

pytestmark = [pytest.mark.interop, pytest.mark.matrix]

TABLE = "from one release to another"


@pytest.mark.parametrize("machine", ["pc-i440fx-7.2", "pc-q35-7.2"])
@pytest.mark.parametrize(
    ("older", "newer"),
    list(permutations(RELEASES, 2)),
    ids=lambda value: str(value),
)
async def test_release_changes(
    older: str, newer: str, machine: str, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    here = Host(qemu_binary(older), machine)
    there = replace(here, binary=qemu_binary(newer))
    source, daemon = await parked_guest(here, tmp_path, closing)
    digest = await memory_digest(source, here)
    target = await there.start("QEMU B", incoming=f"unix:{tmp_path}/out.sock", paused=True)
    closing.append(target)
    await send(daemon, target, f"unix:{tmp_path}/out.sock", return_path=True)
    assert await memory_digest(target, there) == digest
    await target.execute("cont")
    passes = await check_runs_on(source.serial, target, there)
    row = (machine, older, newer, f"yes, {passes} passes", "yes")
    add_row(request.config, TABLE, row, head=("machine", "from", "to", "goes on", "RAM equal"))
