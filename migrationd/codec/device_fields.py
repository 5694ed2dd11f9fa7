"""Fields of a device's body, as the VMDESCRIPTION names them.

    body := { field }*  { 05  cstr8 name  be32 version  body }*        subsections at the end

The description is data of the stream: a body that does not have the described form is
shown as bytes, never guessed at.

Reference: encodings and keys, stream format 7.4 and 7.5. Lists repeat the keys of their
elements in one object, so repeated keys are kept here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from migrationd.codec.constants import QEMU_VM_SUBSECTION

DEPTH_LIMIT = 64
FIELD_LIMIT = 1 << 20

Value = int | bool | bytes

_INTEGERS = {
    f"{sign}int{bits}{suffix}": (bits // 8, not sign)
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
    for suffix in ("", " equal", " le")
}
_LISTS = ("qtailq", "qlist")

SUBSECTION = "subsection"
"""Type of the entry that a subsection's head has among the fields; its value is the version."""


@dataclass(frozen=True, slots=True)
class DeviceField:
    """One value of a body.

    Attributes:
        path: Names from the device's top, joined by dots; elements of arrays in brackets.
        type: Type name of the description.
        offset: Of the value in the body, bytes.
        size: Bytes.
        value: A number or a truth value; bytes where the type is the device's own.
    """

    path: str
    type: str
    offset: int
    size: int
    value: Value

    @property
    def text(self) -> str:
        """The value for people; long bytes are cut."""
        if isinstance(self.value, bytes):
            return _hex(self.value)
        if isinstance(self.value, bool):
            return "true" if self.value else "false"
        if self.type == SUBSECTION:
            return f"version {self.value}"
        if self.type == "timer":
            return "not armed" if self.value == -1 else f"{self.value} ns"
        return f"{self.value} ({self.value & ((1 << 8 * self.size) - 1):#x})"


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """What the description says of one device."""

    idstr: str
    instance_id: int
    vmsd_name: str | None
    version: int | None
    tree: "_Object"

    def fields(self, body: bytes) -> tuple[list[DeviceField], str | None]:
        """Cut a body into its fields.

        Returns:
            The fields in their order, and what does not agree with the description, or None;
            after a disagreement the rest of the body is one field of bytes.
        """
        walker = _Walker(body)
        problem = None
        try:
            walker.members(self.tree, "", 0)
        except (_Mismatch, ValueError) as error:
            problem = f"{error}" or "the body does not have the described form"
        if walker.at < len(body):
            problem = problem or f"{len(body) - walker.at} bytes are not described"
            walker.rest()
        return walker.found, problem


class _Object:
    """A JSON object that keeps repeated keys."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: Sequence[tuple[str, object]]) -> None:
        self.pairs = pairs

    def get(self, key: str) -> object:
        """The last value of a key, as a plain JSON reader would have it."""
        return next((value for name, value in reversed(self.pairs) if name == key), None)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        value = self.get(key)
        return value if isinstance(value, int) and 0 <= value < 1 << 40 else None

    def objects(self, key: str) -> Iterator["_Object"]:
        value = self.get(key)
        return iter(_objects(value))


def describe_devices(description: bytes) -> list[DeviceDescription]:
    """Read a VMDESCRIPTION.

    Returns:
        One entry for each device, in stream order; empty if none is listed.

    Raises:
        ValueError: It is not JSON, or not of the expected form.
    """
    try:
        tree = json.loads(description, object_pairs_hook=_Object)
    except RecursionError:
        raise ValueError("the description is nested too deeply") from None
    if not isinstance(tree, _Object):
        raise ValueError("an object is expected")
    devices = []
    for entry in tree.objects("devices"):
        idstr, instance_id = entry.text("name"), entry.number("instance_id")
        if idstr is None or instance_id is None:
            raise ValueError("a device without a name or an instance")
        devices.append(
            DeviceDescription(
                idstr, instance_id, entry.text("vmsd_name"), entry.number("version"), entry
            )
        )
    return devices


class _Mismatch(Exception):
    """Body and description do not agree."""


class _Walker:
    """Walks a body and the description side by side."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.at = 0
        self.found: list[DeviceField] = []

    def members(self, struct: _Object, path: str, depth: int) -> None:
        """Fields and subsections of an object at the cursor."""
        if depth > DEPTH_LIMIT:
            raise _Mismatch("the description is nested too deeply")
        for entry in struct.objects("fields"):
            self._field(entry, path, depth)
        for entry in struct.objects("subsections"):
            self._subsection(entry, path, depth)

    def rest(self) -> None:
        """What is left, as bytes."""
        self._add("", "undescribed", len(self._body) - self.at)

    def _field(self, entry: _Object, path: str, depth: int) -> None:
        name, kind, size = entry.text("name"), entry.text("type"), entry.number("size")
        if name is None or kind is None or size is None:
            raise _Mismatch("a field without name, type or size")
        index, count = entry.number("index"), entry.number("array_len")
        path = f"{path}.{name}" if path else name
        if index is not None:
            path += f"[{index}]"
        for element in range(1 if count is None else count):
            self._value(entry, path if count is None else f"{path}[{element}]", kind, size, depth)
            if not size:
                break

    def _value(self, entry: _Object, path: str, kind: str, size: int, depth: int) -> None:
        end = self.at + size
        if end > len(self._body):
            raise _Mismatch(f"'{path}' goes beyond the body of {len(self._body)} bytes")
        before, start = len(self.found), self.at
        nested = entry.get("struct")
        try:
            if isinstance(nested, _Object):
                self.members(nested, path, depth + 1)
            elif kind in _LISTS:
                self._elements(entry, path, depth)
            elif entry.get("fields") is not None:
                self.members(entry, path, depth + 1)
            else:
                self._add(path, kind, size)
            if self.at != end:
                raise _Mismatch(path)
        except _Mismatch:
            # The field's own size holds; what is in it is not as described.
            del self.found[before:]
            self.at = start
            self._add(path, kind, size)

    def _elements(self, entry: _Object, path: str, depth: int) -> None:
        number = 0
        for name, value in entry.pairs:
            if name != "fields":
                continue
            if self._take(1) != b"\x01":
                raise _Mismatch(path)
            self.members(_Object([("fields", value)]), f"{path}[{number}]", depth + 1)
            number += 1
        if self._take(1) != b"\x00":
            raise _Mismatch(path)

    def _subsection(self, entry: _Object, path: str, depth: int) -> None:
        name = entry.text("vmsd_name") or ""
        raw = name.encode("latin-1", "replace")
        head = bytes([QEMU_VM_SUBSECTION, len(raw) & 0xFF]) + raw
        if self._take(len(head)) != head:
            raise _Mismatch(f"subsection '{name}' is not at {self.at - len(head)}")
        version = int.from_bytes(self._take(4), "big")
        last = name.rsplit("/", 1)[-1]
        path = f"{path}/{last}"
        size = len(head) + 4
        self._keep(DeviceField(path, SUBSECTION, self.at - size, size, version))
        self.members(entry, path, depth + 1)

    def _take(self, count: int) -> bytes:
        if self.at + count > len(self._body):
            raise _Mismatch(f"the body ends at {len(self._body)}")
        self.at += count
        return self._body[self.at - count : self.at]

    def _add(self, path: str, kind: str, size: int) -> None:
        offset = self.at
        self._keep(DeviceField(path, kind, offset, size, _decode(kind, self._take(size))))

    def _keep(self, field: DeviceField) -> None:
        if len(self.found) == FIELD_LIMIT:
            raise ValueError(f"more than {FIELD_LIMIT} fields")
        self.found.append(field)


def _decode(kind: str, raw: bytes) -> Value:
    if kind == "bool" and raw in (b"\0", b"\1"):
        return raw == b"\1"
    if kind == "timer" and len(raw) == 8:
        return int.from_bytes(raw, "big", signed=True)
    width, is_signed = _INTEGERS.get(kind, (0, False))
    if width and width == len(raw):
        return int.from_bytes(raw, "little" if kind.endswith(" le") else "big", signed=is_signed)
    return raw


def _hex(raw: bytes, limit: int = 24) -> str:
    if not raw:
        return "no bytes"
    if not any(raw):
        return f"{len(raw)} zero bytes"
    text = raw[:limit].hex(" ", 4)
    return text if len(raw) <= limit else f"{text} … {len(raw)} bytes"


def _objects(value: object) -> list[_Object]:
    return (
        [entry for entry in value if isinstance(entry, _Object)] if isinstance(value, list) else []
    )
