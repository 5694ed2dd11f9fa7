import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrationd.codec.device_fields import DeviceField, describe_devices


def device(*fields: dict[str, object], **more: object) -> bytes:
    entry = {"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1}
    return json.dumps({"devices": [{**entry, "fields": list(fields), **more}]}).encode()


def cut(description: bytes, body: bytes) -> tuple[dict[str, DeviceField], str | None]:
    (found,) = describe_devices(description)
    fields, problem = found.fields(body)
    return {field.path: field for field in fields}, problem


def number(name: str, kind: str, size: int, **more: object) -> dict[str, object]:
    return {"name": name, "type": kind, "size": size, **more}


def test_numbers_truth_values_timers_and_buffers() -> None:
    description = device(
        number("a", "uint8", 1),
        number("b", "int16", 2),
        number("c", "bool", 1),
        number("d", "timer", 8),
        number("e", "buffer", 3),
        number("f", "int32 le", 4),
        number("g", "uint64", 8),
    )
    body = b"\xff" + struct.pack(">h", -2) + b"\1" + b"\xff" * 8 + b"xyz" + struct.pack("<i", -7)
    fields, problem = cut(description, body + (1 << 63).to_bytes(8, "big"))
    assert problem is None
    assert [field.value for field in fields.values()] == [255, -2, True, -1, b"xyz", -7, 1 << 63]
    assert fields["d"].text == "not armed"
    assert fields["b"].text == "-2 (0xfffe)"
    assert [field.offset for field in fields.values()] == [0, 1, 3, 4, 12, 15, 19]


def test_arrays_indexed_entries_structs_and_subsections() -> None:
    inner = {"vmsd_name": "in", "version": 1, "fields": [number("x", "uint8", 1)]}
    description = device(
        number("regs", "uint16", 2, array_len=3),
        number("chan", "struct", 1, index=0, struct=inner),
        number("chan", "struct", 1, index=1, struct=inner),
        subsections=[{"vmsd_name": "dev/more", "version": 2, "fields": [number("y", "uint8", 1)]}],
    )
    body = bytes([0, 1, 0, 2, 0, 3, 8, 9]) + b"\x05\x08dev/more\0\0\0\x02\x2a"
    fields, problem = cut(description, body)
    assert problem is None
    assert {path: field.value for path, field in fields.items()} == {
        "regs[0]": 1,
        "regs[1]": 2,
        "regs[2]": 3,
        "chan[0].x": 8,
        "chan[1].x": 9,
        "/more": 2,
        "/more.y": 42,
    }


def test_a_list_repeats_its_keys() -> None:
    element = (
        '"vmsd_name": "e", "version": 1, "fields": [{"name": "v", "type": "uint8", "size": 1}]'
    )
    field = f'{{"name": "q", "type": "qtailq", {element}, {element}, "size": 5}}'
    description = (
        '{"devices": [{"name": "dev", "instance_id": 0, "vmsd_name": "d", "version": 1, '
        f'"fields": [{field}]}}]}}'
    ).encode()
    fields, problem = cut(description, b"\1\x07\1\x09\0")
    assert problem is None
    assert {path: field.value for path, field in fields.items()} == {"q[0].v": 7, "q[1].v": 9}


def test_what_is_not_as_described_is_shown_as_bytes() -> None:
    wrong = {"vmsd_name": "in", "version": 1, "fields": [number("x", "uint8", 3)]}
    description = device(number("s", "struct", 2, struct=wrong), number("z", "uint8", 1))
    fields, problem = cut(description, b"\1\2\3")
    assert problem is None
    assert fields["s"].value == b"\1\2"
    assert fields["z"].value == 3


@pytest.mark.parametrize(
    ("body", "problem"), [(b"\1", "goes beyond the body"), (b"\1\2\3", "1 bytes are not described")]
)
def test_a_body_of_another_length_is_said(body: bytes, problem: str) -> None:
    description = device(number("x", "uint16", 2))
    found, said = cut(description, body)
    assert said is not None
    assert problem in said
    assert sum(field.size for field in found.values()) == len(body)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"devices": [{}]}', b"[" * 100_000])
def test_other_documents_are_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        describe_devices(text)


def test_deep_nesting_ends() -> None:
    tree: dict[str, object] = {"vmsd_name": "in", "version": 1, "fields": []}
    for _ in range(200):
        tree = {"vmsd_name": "in", "version": 1, "fields": [number("s", "struct", 1, struct=tree)]}
    fields, _ = cut(device(number("s", "struct", 1, struct=tree)), b"\1")
    assert sum(field.size for field in fields.values()) == 1


@given(
    st.recursive(
        st.fixed_dictionaries(
            {
                "name": st.text(max_size=4),
                "type": st.sampled_from(["uint8", "struct", "qtailq", "bool", "odd"]),
                "size": st.integers(-1, 9),
            },
            optional={"array_len": st.integers(-1, 1 << 50), "index": st.integers()},
        ),
        lambda inner: st.fixed_dictionaries(
            {
                "name": st.just("n"),
                "type": st.sampled_from(["struct", "qtailq"]),
                "size": st.integers(0, 9),
                "fields": st.lists(inner, max_size=3),
                "struct": st.fixed_dictionaries({"fields": st.lists(inner, max_size=3)}),
            }
        ),
        max_leaves=8,
    ),
    st.binary(max_size=12),
)
def test_fields_of_any_description_lie_in_the_body_and_never_overlap(
    entry: dict[str, object], body: bytes
) -> None:
    fields, _ = describe_devices(device(entry))[0].fields(body)
    at = 0
    for field in fields:
        assert field.offset >= at
        at = field.offset + field.size
    assert at <= len(body)
