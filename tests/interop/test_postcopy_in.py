"""QEMU -> migrationd by postcopy, then on to a QEMU: nothing is lost, with and without preempt."""

from pathlib import Path

import pytest

from tests.support import postcopy_in
from tests.support.events import statuses
from tests.support.moves import VIRTIO, Host
from tests.support.releases import PREEMPT, RELEASES, qemu_binary, release_cases
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "QEMU -> migrationd by postcopy"
HEAD = ("QEMU", "preempt", "rests in", "statuses here", "RAM equal", "goes on")

DESTINATION_STATUSES = [
    "setup", "active", "postcopy-device", "postcopy-active", "completed",
]  # fmt: skip


def report(request: pytest.FixtureRequest, row: tuple[str, ...]) -> None:
    add_row(request.config, TABLE, row, head=HEAD)


def host_of(version: str) -> Host:
    """A small guest on that QEMU."""
    return Host(qemu_binary(version))


@pytest.mark.parametrize(
    ("version", "preempt", "rests"),
    release_cases(
        PREEMPT,
        {"memory": "memory", "file": "a file"},
        default=lambda preempt, rests: preempt == (rests == "a file"),
    ),
)
async def test_a_guest_arrives_by_postcopy(
    version: str, preempt: bool, rests: str, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    host = host_of(version)
    arguments = ["-ram-dir", str(tmp_path), "-name", "g"] if rests == "a file" else []
    source, daemon = await postcopy_in.start_pair(host, closing, arguments=arguments)
    await daemon.set_capabilities({"postcopy-blocktime": True})
    await postcopy_in.begin(source, daemon, f"unix:{tmp_path}/in.sock", preempt=preempt)
    info = await daemon.wait_migration("completed")
    # A parked guest has no processors that wait.
    assert (info["postcopy-blocktime"], info["postcopy-vcpu-blocktime"]) == (0, [])
    await source.wait_migration("completed")
    seen = statuses(daemon)
    assert seen == DESTINATION_STATUSES
    assert await daemon.run_state() == "paused"
    passes = await postcopy_in.on_to_qemu(source, daemon, host, tmp_path, closing)
    report(
        request,
        (version, "yes" if preempt else "no", rests, " ".join(seen), "yes",
         f"yes, {passes} passes"),
    )  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("version", ["7.2", "11.1"])
async def test_multifd_until_the_switch(
    version: str, preempt: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """QEMU 10.0 refuses the pair; 7.2 has it synchronise its channels after the switch, too."""
    host = host_of(version)
    source, daemon = await postcopy_in.start_pair(host, closing, stands=True)
    await postcopy_in.begin(
        source, daemon, f"unix:{tmp_path}/in.sock", preempt=preempt, also={"multifd": True}
    )
    passes = await postcopy_in.on_to_qemu(source, daemon, host, tmp_path, closing)
    report(request, (version, "yes" if preempt else "no", "memory", "with multifd", "yes",
                     f"yes, {passes} passes"))  # fmt: skip


def free_huge_pages() -> int:
    """Huge pages of 2 MiB that the host has set aside."""
    path = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    return int(path.read_text()) if path.exists() else 0


@pytest.mark.matrix
@pytest.mark.parametrize("preempt", [False, True])
@pytest.mark.parametrize("version", RELEASES)
async def test_a_guest_in_huge_pages(
    version: str, preempt: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    host = host_of(version)
    if free_huge_pages() < host.memory_mib // 2:
        pytest.skip(f"{host.memory_mib // 2} huge pages: sysctl vm.nr_hugepages sets some aside")
    backend = f"memory-backend-memfd,id=ram0,size={host.memory_mib}M,hugetlb=on,hugetlbsize=2M"
    huge = Host(host.binary, "pc,memory-backend=ram0", arguments=(*VIRTIO, "-object", backend))
    source, daemon = await postcopy_in.start_pair(huge, closing)
    await postcopy_in.begin(source, daemon, f"unix:{tmp_path}/in.sock", preempt=preempt)
    passes = await postcopy_in.on_to_qemu(
        source, daemon, huge, tmp_path, closing, closes_source=True
    )
    report(request, (version, "yes" if preempt else "no", "memory", "from huge pages", "yes",
                     f"yes, {passes} passes"))  # fmt: skip
