"""Real streams with wrong bytes in them: refused, or taken as they are; the daemon lives on."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from migrationd.ctl.daemon_process import DaemonProcess
from migrationd.ctl.peer_process import PeerError
from tests.support.fuzzing import cases
from tests.support.results import add_row
from tests.support.starting import Ahead

pytestmark = pytest.mark.fault

TABLE = "mutated streams of a real guest"
ROUNDS = cases(60)


DEVICES = (b"timer", b"cpu_common", b"fw_cfg", b"PCIHost", b"i8259", b"serial", b"ps2kbd",
           b"virtio-blk", b"virtio-net", b"globalstate")  # fmt: skip


def structure(stream: bytes) -> list[int]:
    """Positions that a decoder reads; page contents, most of a stream, say nothing.

    The head and the first records of RAM, around the heads of device sections, and the
    end of the device state with the length of the VMDESCRIPTION.
    """
    end = stream.index(b"globalstate")
    places = [*range(2000), *range(end, end + 150)]
    for name in DEVICES:
        at = stream.rindex(name, 0, end + len(b"globalstate"))
        places += range(at - 12, at + 20)
    return places


def mutate(stream: bytes, rng: random.Random) -> tuple[str, bytes]:
    data = bytearray(stream)
    places = structure(stream)
    at = rng.choice(places)
    kind = rng.choice(["bit", "byte", "length", "drop", "repeat", "swap"])
    match kind:
        case "bit":
            data[at] ^= 1 << rng.randrange(8)
        case "byte":
            data[at] = rng.randrange(256)
        case "length":
            data[at : at + 4] = b"\xff\xff\xff\xff"
        case "drop":
            del data[at : at + rng.randrange(1, 64)]
        case "repeat":
            piece = data[at : at + rng.randrange(1, 4096)]
            data[at:at] = piece
        case "swap":
            other = rng.choice(places)
            low, high = sorted((at, other))
            low_piece, high_piece = data[low : low + 32], data[high : high + 32]
            data[high : high + 32] = low_piece
            data[low : low + 32] = high_piece
    return kind, bytes(data)


async def test_wrong_bytes_anywhere(
    parked_file: tuple[Path, str, str], tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    whole = parked_file[0].read_bytes()
    rng = random.Random(23)
    outcomes: dict[str, list[int]] = {}

    async def start(_: int) -> DaemonProcess:
        return await DaemonProcess.start(incoming="defer", arguments=["-ram-limit", "1G"])

    daemons = Ahead(start, closing)
    daemon: DaemonProcess | None = None
    before = 0
    for turn in range(ROUNDS):
        if daemon is None:
            daemon = await daemons.take()
            before = daemon.resident_bytes
        kind, data = mutate(whole, rng)
        path = tmp_path / "in.sock"
        await daemon.execute("migrate-incoming", {"uri": f"unix:{path}", "exit-on-error": False})
        _, writer = await asyncio.open_unix_connection(path)
        with contextlib.suppress(OSError):
            writer.write(data)
            await writer.drain()
            writer.write_eof()
        try:
            info = await daemon.wait_migration("failed", "completed")
        except PeerError as error:
            raise AssertionError(f"round {turn}, {kind}: {error}") from error
        writer.close()
        taken = info["status"] == "completed"
        outcomes.setdefault(kind, [0, 0])[taken] += 1
        assert daemon.resident_bytes - before < 64 << 20
        assert "Traceback" not in daemon.stderr, f"round {turn}, {kind}: {daemon.stderr}"
        assert "internal error" not in daemon.stderr, f"round {turn}, {kind}: {daemon.stderr}"
        if taken:
            # Wrong bytes inside a device's state are for the next QEMU to judge.
            assert await daemon.quit() == 0
            daemon = None
        else:
            assert "position" in str(info["error-desc"]), info
            assert await daemon.run_state() == "inmigrate"
    assert sum(failed for failed, _ in outcomes.values()) > ROUNDS // 4
    for kind, (failed, taken) in sorted(outcomes.items()):
        add_row(
            request.config,
            TABLE,
            (kind, str(failed), str(taken)),
            head=("mutation", "refused", "taken"),
        )
