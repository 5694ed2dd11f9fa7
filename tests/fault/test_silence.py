"""Sources that have said all and wait for the answer: the end must be found in what is there."""

import asyncio
from pathlib import Path

import pytest

from migrationd.codec.return_path import Pong, Shut, encode_return_path
from migrationd.ctl.daemon_process import DaemonProcess
from tests.unit.codec.support import END, FOOTER, HEAD, be, cstr8, full, ram_start, vmdescription

pytestmark = pytest.mark.fault

RETURN_PATH = bytes.fromhex("08 0001 0000")
PING = bytes.fromhex("08 0002 0004 00000001")
START = HEAD + RETURN_PATH + PING + ram_start({"pc.ram": 4}) + END + FOOTER

FORGED = b"\x7e\0\0\0\x02\x04\0\0\0\x09" + cstr8("forged") + be(0, 4) + be(1, 4) + b"zz"
"""What a guest could leave in a device's memory: a footer, and a section that never ends."""

STREAMS = {
    "no description": START + full(2, "timer", b"abc") + b"\0",
    "forged section that never ends": (
        START + full(2, "dev", FORGED) + vmdescription([("dev", 0, len(FORGED))])
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_the_source_is_answered_although_it_stays_silent(
    name: str, tmp_path: Path, closing: list[object]
) -> None:
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    closing.append(daemon)
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    writer.write(STREAMS[name])
    expected = encode_return_path(Pong(1)) + encode_return_path(Shut(0))
    async with asyncio.timeout(30):
        assert await reader.readexactly(len(expected)) == expected
    await daemon.wait_run_state("paused")
    writer.close()


async def test_silence_inside_a_section_is_no_end(tmp_path: Path, closing: list[object]) -> None:
    """A source that stalls for longer than that, and then goes on."""
    daemon = await DaemonProcess.start(incoming=f"unix:{tmp_path}/in.sock")
    closing.append(daemon)
    reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/in.sock")
    stream = START + full(2, "timer", bytes(1000)) + vmdescription([("timer", 0, 1000)])
    half = len(START) + 500
    writer.write(stream[:half])
    await reader.readexactly(len(encode_return_path(Pong(1))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await reader.read(1)
    assert (await daemon.query_migrate())["status"] == "active"
    writer.write(stream[half:])
    assert await reader.readexactly(8) == encode_return_path(Shut(0))
    writer.close()
