"""The description's words on the configuration in front of it."""

import json

import pytest

from migrationd.codec.records import Configuration
from migrationd.codec.vmdescription import with_configuration

PLAIN = Configuration("pc-q35-10.0")
FIELDS = (
    '"fields": [{"name": "len", "type": "uint32", "size": 4}, '
    '{"name": "name", "type": "buffer", "size": 11}]'
)
AS_QEMU = (
    f'{{"configuration": {{"vmsd_name": "configuration", "version": 1, {FIELDS}}}, '
    '"page_size": 4096, "devices": [{"name": "x", "fields": [], "fields": []}]}'
).encode()
CAPABILITY = (
    ', "subsections": [{"vmsd_name": "configuration/capabilities", "version": 1, "fields": '
    '[{"name": "caps_count", "type": "uint32", "size": 4}, '
    '{"name": "capabilities", "type": "capability", "size": 11}]}]'
)
MAPPED = Configuration("pc-q35-10.0", capabilities=("mapped-ram",))
AS_QEMU_MAPPED = AS_QEMU.replace(FIELDS.encode(), (FIELDS + CAPABILITY).encode())


def test_it_is_as_qemu_writes_it_and_the_rest_stays() -> None:
    assert with_configuration(AS_QEMU, MAPPED) == AS_QEMU_MAPPED
    assert with_configuration(AS_QEMU_MAPPED, PLAIN) == AS_QEMU


def test_what_fits_stays_as_it_came() -> None:
    spaced = AS_QEMU.replace(b'{"configuration":', b' { "configuration" :')
    assert with_configuration(spaced, PLAIN) == spaced
    assert with_configuration(AS_QEMU_MAPPED, MAPPED) is AS_QEMU_MAPPED


def test_one_of_an_old_qemu_describes_none_until_it_must() -> None:
    old = b'{"page_size": 4096, "devices": []}'
    assert with_configuration(old, PLAIN) == old
    text = json.loads(with_configuration(old, MAPPED))
    assert list(text) == ["configuration", "page_size", "devices"]


def test_each_subsection_is_described() -> None:
    full = Configuration("virt-10.0", 12, ("mapped-ram", "x-ignore-shared"), bytes(16))
    described = json.loads(with_configuration(b'{"devices": []}', full))["configuration"]
    names = [entry["vmsd_name"] for entry in described["subsections"]]
    assert names == [f"configuration/{n}" for n in ("target-page-bits", "capabilities", "uuid")]
    capabilities = described["subsections"][1]["fields"]
    assert [(field.get("index"), field["size"]) for field in capabilities[1:]] == [(0, 11), (1, 16)]


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"[]", b"{}", b"x{}", b'{"configuration": 7}', b'{"configuration": ', b"null"],
)
def test_what_is_no_description_stays_as_it_came(text: bytes) -> None:
    assert with_configuration(text, MAPPED) == text
