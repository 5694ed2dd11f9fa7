"""Guests of other shapes: many devices, old wire dialects, other machines, hot-plugged memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.moves import VIRTIO, Host, check_runs_on, memory_digest, parked_guest, send
from tests.support.releases import qemu_binary
from tests.support.results import add_row

pytestmark = pytest.mark.interop

TABLE = "guests of other shapes"

DISK = ("-blockdev", "driver=null-co,node-name=disk,size=67108864,read-zeroes=on")
DISC = ("-blockdev", "driver=null-co,node-name=cd,size=67108864,read-zeroes=on")
MANY_DEVICES = (
    "VGA",
    "virtio-scsi-pci,id=scsi",
    "scsi-hd,drive=disk",
    "ide-cd,drive=cd",
    "virtio-serial-pci",
    "virtconsole,chardev=console",
    "virtio-balloon-pci",
    "virtio-rng-pci",
    "virtio-net-pci,romfile=,mq=on,vectors=6",
    "e1000,romfile=",
    "qemu-xhci",
    "usb-tablet",
    "usb-kbd",
    "vmgenid",
    "i6300esb",
    "pvpanic",
)
SHAPES = {
    "many devices": (
        "pc",
        (
            *DISK,
            *DISC,
            *("-chardev", "null,id=console", "-smp", "3"),
            *(word for device in MANY_DEVICES for word in ("-device", device)),
        ),
    ),
    "microvm": ("microvm", ()),
    "hot-plugged memory": (
        "pc",
        (
            *("-m", "32M,slots=4,maxmem=1G", "-object", "memory-backend-ram,id=dimm,size=128M"),
            *("-device", "pc-dimm,memdev=dimm"),
        ),
    ),
    "suppress-vmdesc": ("pc,suppress-vmdesc=on", VIRTIO),
    "no footers": ("pc", (*VIRTIO, "-global", "migration.send-section-footer=off")),
    "q35 2.4": ("pc-q35-2.4", VIRTIO),
    "neither footers nor description": ("pc-i440fx-2.2", VIRTIO),
}
ONLY_7_2 = ("q35 2.4", "neither footers nor description")


@pytest.mark.parametrize("return_path", [True, False], ids=["return-path", "one-way"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "version",
    ["7.2", *(pytest.param(version, marks=pytest.mark.matrix) for version in ("10.0", "11.1"))],
)
async def test_shape(
    version: str, shape: str, return_path: bool, tmp_path: Path, closing: list[object],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if shape in ONLY_7_2 and version != "7.2":
        pytest.skip(f"QEMU {version} has no such machine type")
    if shape == "neither footers nor description" and return_path:
        pytest.skip("nothing tells where such a stream ends while the source keeps it open")
    machine, arguments = SHAPES[shape]
    host = replace(Host(qemu_binary(version)), machine=machine, arguments=arguments)
    source, daemon = await parked_guest(host, tmp_path, closing, return_path=return_path)
    target = await host.start("QEMU B", incoming=f"unix:{tmp_path}/out.sock", paused=True)
    closing.append(target)
    await send(daemon, target, f"unix:{tmp_path}/out.sock", return_path=return_path)
    if (version, shape) != ("11.1", "hot-plugged memory"):
        # That one loses a tick of its guest now and then between two QEMUs as well.
        assert await memory_digest(target, host) == await memory_digest(source, host)
    await target.execute("cont")
    passes = await check_runs_on(source.serial, target, host)
    row = (version, shape, "yes" if return_path else "no", f"yes, {passes} passes")
    add_row(request.config, TABLE, row, head=("QEMU", "guest", "return path", "goes on"))
