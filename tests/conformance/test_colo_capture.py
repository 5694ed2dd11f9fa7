"""A recorded COLO primary, played to the destination turn by turn."""

import asyncio
from pathlib import Path

from migrationd.daemon.shelter import MemoryBerth
from migrationd.incoming.berth import IncomingSettings
from migrationd.incoming.driver import IncomingMigration
from migrationd.transport.address import UnixAddress
from migrationd.transport.listen import listen
from tests.conformance.colo_primary import READY, recorded, recorded_devices
from tests.support.deadline import until


async def test_the_replica_answers_as_qemu_s_own_did(tmp_path: Path) -> None:
    first, checkpoint, said = recorded()
    path = str(tmp_path / "in.sock")
    statuses: list[str] = []
    ended: list[str] = []
    incoming = IncomingMigration(
        MemoryBerth(),
        lambda: IncomingSettings(colo=True),
        statuses.append,
        on_colo_exit=ended.append,
    )
    incoming.begin()
    incoming.listen_on(await listen(UnixAddress(path), lambda _: -1))
    loading = asyncio.create_task(incoming.run())
    reader, writer = await asyncio.open_unix_connection(path)
    async with asyncio.timeout(30):
        writer.write(first)
        assert await reader.readexactly(4) == READY
        # The primary begins a checkpoint only then.
        writer.write(checkpoint)
        assert await reader.readexactly(12) == said[4:]
        writer.close()
        await until(lambda: bool(ended), "the primary's end is noticed")
        assert incoming.status == "colo"
        incoming.fail_over()
        guest = await loading
    assert ended == ["error"]
    assert guest is not None
    assert statuses == ["setup", "active", "colo", "completed"]
    sections = b"".join(
        bytes([4])
        + item.section_id.to_bytes(4, "big")
        + bytes([len(item.idstr)])
        + item.idstr.encode()
        + item.instance_id.to_bytes(4, "big")
        + item.version_id.to_bytes(4, "big")
        + item.body
        + b"\x7e"
        + item.section_id.to_bytes(4, "big")
        for item in guest.devices
    )
    assert sections + b"\0" == recorded_devices()
    guest.close()
