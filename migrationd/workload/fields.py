"""Fields of a device's state: how each is encoded, and what it is called in a description.

Every field reads and writes one attribute of the device's object. Encodings and type
names are QEMU's, so that its tools read them.

Reference: VMState bodies and the VMDESCRIPTION, stream format 7.4 and 7.5.
"""

import struct as packing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from migrationd.errors import GuestError

if TYPE_CHECKING:
    from migrationd.workload.vmstate import VMState

MAX_ARRAY_ITEMS = 1 << 20
"""Most elements of one array."""


class Reader:
    """A body that is being decoded.

    Args:
        data: The body.
        device: Name, for errors.
    """

    def __init__(self, data: bytes, device: str) -> None:
        self._data = data
        self.at = 0
        self.device = device

    def take(self, count: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            GuestError: The body ends before.
        """
        end = self.at + count
        if end > len(self._data):
            raise self.error(
                f"the body ends at byte {len(self._data)}, but {what} needs {count} bytes "
                f"at {self.at}"
            )
        part = self._data[self.at : end]
        self.at = end
        return part

    def peek(self, count: int) -> bytes:
        """Up to so many of the next bytes."""
        return self._data[self.at : self.at + count]

    @property
    def rest(self) -> int:
        """Bytes that are left."""
        return len(self._data) - self.at

    def error(self, text: str) -> GuestError:
        """An error that names the device."""
        return GuestError(f"device '{self.device}': {text}")


Described = dict[str, Any]
"""An object of the description."""


class Kind(Protocol):
    """How one value is encoded."""

    @property
    def type_name(self) -> str:
        """Name in a description."""

    def encode(self, value: Any, what: str) -> tuple[bytes, Described]:  # noqa: ANN401
        """Bytes, and members of the description beyond name, type and size.

        Raises:
            GuestError: The value does not fit.
        """

    def decode(self, reader: Reader, what: str, into: Any) -> Any:  # noqa: ANN401
        """The value; a structure is decoded into the object that is there.

        Raises:
            GuestError: The body does not hold one.
        """

    def signature(self) -> object:
        """What has to be equal on both sides, as a JSON value."""


@dataclass(frozen=True, slots=True)
class Number:
    """An integer, big-endian."""

    type_name: str
    code: str

    def encode(self, value: Any, what: str) -> tuple[bytes, Described]:  # noqa: ANN401
        """See :class:`Kind`."""
        try:
            return packing.pack(f">{self.code}", value), {}
        except (packing.error, TypeError) as error:
            raise GuestError(f"{what}: {value!r} is no {self.type_name}: {error}") from None

    def decode(self, reader: Reader, what: str, into: Any) -> Any:  # noqa: ANN401
        """See :class:`Kind`."""
        return packing.unpack(f">{self.code}", reader.take(packing.calcsize(self.code), what))[0]

    def signature(self) -> object:
        """See :class:`Kind`."""
        return self.type_name


@dataclass(frozen=True, slots=True)
class Boolean:
    """One byte, 0 or 1."""

    type_name: str = "bool"

    def encode(self, value: Any, what: str) -> tuple[bytes, Described]:  # noqa: ANN401
        """See :class:`Kind`."""
        if not isinstance(value, bool):
            raise GuestError(f"{what}: {value!r} is no bool")
        return bytes((value,)), {}

    def decode(self, reader: Reader, what: str, into: Any) -> Any:  # noqa: ANN401
        """See :class:`Kind`."""
        byte = reader.take(1, what)[0]
        if byte > 1:
            raise reader.error(f"{what}: {byte} is no bool")
        return bool(byte)

    def signature(self) -> object:
        """See :class:`Kind`."""
        return "bool"


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes of a fixed length."""

    length: int
    type_name: str = "buffer"

    def encode(self, value: Any, what: str) -> tuple[bytes, Described]:  # noqa: ANN401
        """See :class:`Kind`."""
        try:
            data = bytes(memoryview(value))
        except TypeError as error:
            raise GuestError(f"{what}: {error}") from None
        if len(data) != self.length:
            raise GuestError(f"{what}: {len(data)} bytes instead of {self.length}")
        return data, {}

    def decode(self, reader: Reader, what: str, into: Any) -> Any:  # noqa: ANN401
        """See :class:`Kind`."""
        return reader.take(self.length, what)

    def signature(self) -> object:
        """See :class:`Kind`."""
        return ["buffer", self.length]


@dataclass(frozen=True, slots=True)
class Nested:
    """A structure with a declaration of its own."""

    state: "VMState"
    type_name: str = "struct"

    def encode(self, value: Any, what: str) -> tuple[bytes, Described]:  # noqa: ANN401
        """See :class:`Kind`."""
        body, description = self.state.encode(value)
        return body, {"struct": description}

    def decode(self, reader: Reader, what: str, into: Any) -> Any:  # noqa: ANN401
        """See :class:`Kind`."""
        self.state.decode_body(reader, into, self.state.version_id)
        return into

    def signature(self) -> object:
        """See :class:`Kind`."""
        return ["struct", self.state.declaration()]


@dataclass(frozen=True, slots=True)
class Field:
    """One declared field.

    Attributes:
        name: Attribute of the object, and name in the description.
        kind: Encoding of a value, or of each element.
        length: Elements of a fixed array; None for one value.
        count_field: Earlier field that holds the number of elements.
        since: First version_id that has the field.
        must_equal: The destination's value has to be the same already.
        exists: Whether the object has the field now, besides its version.
    """

    name: str
    kind: Kind
    length: int | None = None
    count_field: str | None = None
    since: int = 0
    must_equal: bool = False
    exists: Callable[[Any], bool] | None = None

    @property
    def is_array(self) -> bool:
        """Whether it has elements."""
        return self.length is not None or self.count_field is not None

    def is_present(self, obj: object, version: int) -> bool:
        """Whether a body of this version of the object has the field."""
        return version >= self.since and (self.exists is None or self.exists(obj))

    def encode(self, obj: object, what: str) -> tuple[bytes, list[Described]]:
        """Bytes, and the objects of the description.

        Raises:
            GuestError: The value does not fit.
        """
        what = f"{what} field '{self.name}'"
        try:
            value = getattr(obj, self.name)
        except AttributeError as error:
            raise GuestError(f"{what}: {error}") from None
        if not self.is_array:
            body, more = self.kind.encode(value, what)
            return body, [self._described(len(body)) | more]
        try:
            items = list(value)
        except TypeError as error:
            raise GuestError(f"{what}: {error}") from None
        if len(items) != (wanted := self._count(obj, what)):
            raise GuestError(f"{what}: {len(items)} elements instead of {wanted}")
        parts = [self.kind.encode(item, what) for item in items]
        return b"".join(body for body, _ in parts), self._describe_items(parts)

    def decode(self, reader: Reader, obj: object) -> None:
        """Set the attribute.

        Raises:
            GuestError: The body does not hold the field, or it must be equal and is not.
        """
        what = f"field '{self.name}'"
        before = getattr(obj, self.name, None)
        if before is None and isinstance(self.kind, Nested):
            raise reader.error(f"{what}: there is nothing to load it into")
        if not self.is_array:
            value = self.kind.decode(reader, what, before)
            if self.must_equal and value != before:
                raise reader.error(f"{what} is {value!r}, but {before!r} here")
        else:
            count = self._count(obj, what)
            olds: Iterable[Any] = before or () if isinstance(self.kind, Nested) else [None] * count
            value = [self.kind.decode(reader, what, old) for old in list(olds)[:count]]
            if len(value) != count:
                raise reader.error(f"{what} has {len(value)} elements here, {count} there")
        setattr(obj, self.name, value)

    def signature(self) -> dict[str, object]:
        """The field as JSON, for comparing declarations."""
        out: dict[str, object] = {"name": self.name, "type": self.kind.signature()}
        if self.length is not None:
            out["length"] = self.length
        if self.count_field is not None:
            out["count_field"] = self.count_field
        if self.since:
            out["since"] = self.since
        if self.exists is not None:
            out["conditional"] = True
        return out

    def _count(self, obj: object, what: str) -> int:
        if self.count_field is None:
            assert self.length is not None
            return self.length
        count = getattr(obj, self.count_field)
        if not isinstance(count, int) or not 0 <= count <= MAX_ARRAY_ITEMS:
            raise GuestError(f"{what}: {count!r} elements")
        return count

    def _described(self, size: int) -> Described:
        return {"name": self.name, "type": self.kind.type_name, "size": size}

    def _describe_items(self, parts: Sequence[tuple[bytes, Described]]) -> list[Described]:
        if not parts:
            return []
        size = len(parts[0][0])
        if all(len(body) == size for body, _ in parts):
            one = self._described(size) | parts[0][1]
            return [one | {"array_len": len(parts)} if len(parts) > 1 else one]
        return [
            self._described(len(body)) | {"index": index} | more
            for index, (body, more) in enumerate(parts)
        ]


def _number(type_name: str, code: str) -> Callable[..., Field]:
    def declare(name: str, **more: Any) -> Field:  # noqa: ANN401
        return Field(name, Number(type_name, code), **more)

    declare.__name__ = type_name
    declare.__doc__ = f"A field of type {type_name}."
    return declare


u8 = _number("uint8", "B")
u16 = _number("uint16", "H")
u32 = _number("uint32", "I")
u64 = _number("uint64", "Q")
i8 = _number("int8", "b")
i16 = _number("int16", "h")
i32 = _number("int32", "i")
i64 = _number("int64", "q")


def boolean(name: str, **more: Any) -> Field:  # noqa: ANN401
    """A field of type bool."""
    return Field(name, Boolean(), **more)


def buffer(name: str, length: int, **more: Any) -> Field:  # noqa: ANN401
    """Bytes of a fixed length."""
    return Field(name, Raw(length), **more)


def struct(name: str, state: "VMState", **more: Any) -> Field:  # noqa: ANN401
    """An object with a declaration of its own; it must exist before it is loaded."""
    return Field(name, Nested(state), **more)


def array(element: Field, length: int) -> Field:
    """A fixed number of elements like this one, by its name.

    Raises:
        GuestError: It has elements itself, or there cannot be so many.
    """
    _check_element(element)
    if not 0 <= length <= MAX_ARRAY_ITEMS:
        raise GuestError(f"field '{element.name}': {length} elements")
    return replace(element, length=length)


def varray(element: Field, count_field: str) -> Field:
    """As many elements as an earlier field says.

    Raises:
        GuestError: It has elements itself.
    """
    _check_element(element)
    return replace(element, count_field=count_field)


def _check_element(element: Field) -> None:
    if element.is_array:
        raise GuestError(f"field '{element.name}': an array of arrays; put the inner in a struct")


def equal(field: Field) -> Field:
    """A field whose value has to be the same at the destination already."""
    return replace(field, must_equal=True)
