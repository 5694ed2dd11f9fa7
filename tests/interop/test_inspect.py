"""What inspect decodes is what the QEMU that wrote the file says of itself."""

import re
from pathlib import Path

import pytest

from migrationd.ctl.file_summary import summarize
from migrationd.ctl.inspect_file import fields_of, find_devices
from tests.support.moves import Host
from tests.support.releases import qemu_binary

pytestmark = pytest.mark.interop

REGISTERS = {"EAX": 0, "ECX": 1, "EDX": 2, "EBX": 3, "ESP": 4, "EBP": 5, "ESI": 6, "EDI": 7}


@pytest.mark.parametrize("version", ["7.2", "10.0", "11.1"])
async def test_registers_of_the_processor(
    version: str, tmp_path: Path, closing: list[object]
) -> None:
    source = await Host(qemu_binary(version)).start("QEMU A")
    closing.append(source)
    await source.wait_serial(2)
    await source.execute("stop")
    text = str(await source.execute("human-monitor-command", {"command-line": "info registers"}))
    path = tmp_path / "saved"
    await source.migrate(f"exec:cat >{path}", return_path=False)
    await source.wait_migration()

    summary = summarize(path)
    (cpu,) = find_devices(summary, "cpu")
    fields, problem = fields_of(summary, cpu)
    assert problem is None
    values = {field.path: field.value for field in fields}
    said = {name: int(value, 16) for name, value in re.findall(r"\b(E[A-Z]{2})=(\w+)", text)}
    for name, number in REGISTERS.items():
        assert values[f"env.regs[{number}]"] == said[name], name
    assert values["env.eip"] == said["EIP"]
    segment = re.search(r"CS =(\w+) (\w+) (\w+)", text)
    assert segment is not None
    assert values["env.segs[1].selector"] == int(segment[1], 16)
    assert values["env.segs[1].base"] == int(segment[2], 16)
