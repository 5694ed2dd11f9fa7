"""What a live guest's passes put on the wire, judged by a real QEMU: it must have every byte."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from migrationd.guest.memory import Pages
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.multifd_send import MultifdSettings
from tests.support.moves import Host, check_runs_on
from tests.support.releases import default_release, qemu_binary
from tests.support.results import add_row
from tests.support.scripted_guest import Rows, ScriptedGuest, send_live, take_from_qemu

pytestmark = pytest.mark.interop

PASSES = 8
MIB = 1 << 20
TABLE = "live passes: a machine's RAM is written between passes, migrationd -> QEMU"
HEAD = ("to", "way", "passes", "found", "longer than a page", "not kept", "RAM equal", "goes on")


@dataclass
class Writer:
    """Writes pages behind what the boot guest itself uses, in every way that there is.

    Attributes:
        first_page: Where it begins.
    """

    first_page: int
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    def write(self, number: int, rows: Rows) -> Pages:
        """Some other pages each time; fewer and fewer, so that it ends."""
        free = np.arange(self.first_page, len(rows))
        pages = np.sort(self.random.choice(free, len(free) // (number + 1), replace=False))
        rows[pages[0::6], self.random.integers(0, 4096)] += 1
        rows[pages[1::6], 4000:] ^= 0x5A
        rows[pages[2::6]] = self.random.integers(0, 256, rows[pages[2::6]].shape)
        rows[pages[3::6]] = 0
        rows[pages[4::6], ::128] += 3
        return pages


@dataclass(frozen=True)
class Case:
    """One way.

    Attributes:
        version: Of the QEMU.
        way: Name of the way.
        cache_bytes: ``xbzrle-cache-size``.
        multifd: Channels.
    """

    version: str
    way: str
    cache_bytes: int | None = None
    multifd: MultifdSettings | None = None

    @property
    def name(self) -> str:
        return f"{self.version}-{self.way}"


def cases() -> list[object]:
    default = default_release()
    found = []
    for version in ("7.2", "10.0", "11.1"):
        for way, cache, multifd in (
            ("xbzrle", 32 * MIB, None),
            ("xbzrle-small", 2 * MIB, None),
            ("plain", None, None),
            ("multifd", None, MultifdSettings(2)),
            ("multifd-legacy", None, MultifdSettings(3, zero_page_detection="legacy")),
            ("multifd-zstd", None, MultifdSettings(2, "zstd")),
        ):
            is_default = version == default and way in ("xbzrle", "xbzrle-small", "multifd")
            marks = [] if is_default else [pytest.mark.matrix]
            found.append(pytest.param(Case(version, way, cache, multifd), marks=marks))
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
async def test_every_byte_arrives(case: Case, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    host = Host(qemu_binary(case.version))
    parked, printed = await take_from_qemu(host, tmp_path)
    writer = Writer((host.guest.counted_address + host.guest.counted_bytes) // 4096)
    guest = ScriptedGuest(parked, "pc.ram", PASSES, writer.write)
    path = str(tmp_path / "out.sock")
    try:
        async with await host.start("QEMU B", incoming="defer", paused=True) as qemu:
            capabilities = {"events": True, "xbzrle": case.cache_bytes is not None}
            if case.multifd is not None:
                capabilities["multifd"] = True
                await qemu.set_parameters(
                    {
                        "multifd-channels": case.multifd.channels,
                        "multifd-compression": case.multifd.compression,
                    }
                )
            await qemu.set_capabilities(capabilities)
            await qemu.execute("migrate-incoming", {"uri": f"unix:{path}"})
            settings = OutgoingSettings(
                return_path=True,
                downtime_limit_ms=0,
                xbzrle_cache_bytes=case.cache_bytes,
                multifd=case.multifd,
            )
            migration, observer = await send_live(guest, path, settings)
            assert migration.error is None
            assert migration.status == "completed"
            await qemu.wait_migration("completed")
            assert observer.passes > PASSES
            arrived = await qemu.pmemsave(MIB, (host.memory_mib - 1) * MIB)
            wrong = np.flatnonzero(np.frombuffer(arrived, np.uint8) != guest.main[MIB:])
            assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0] + MIB:#x}"
            info = migration.info()
            assert info is not None
            counters = info.xbzrle
            if case.cache_bytes is not None:
                assert counters is not None
                assert counters.pages > 0
                assert counters.overflow > 0
            await qemu.execute("cont")
            passes = await check_runs_on(printed, qemu, host)
            told = ("-", "-", "-")
            if counters is not None:
                told = (str(counters.pages), str(counters.overflow), str(counters.cache_miss))
            row = (case.version, case.way, str(observer.passes), *told)
            add_row(pytestconfig, TABLE, (*row, "yes", f"yes, {passes} passes"), head=HEAD)
    finally:
        guest.close()
