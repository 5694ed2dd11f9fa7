"""Device state as declarations: what is saved, in which version, and what it is called.

    COUNTER = VMState(
        "counter", version_id=2, minimum_version_id=1,
        fields=(u64("value"), u32("step", since=2)),
        subsections=(subsection("counter/alarm", needed=lambda c: c.armed, fields=(u64("at"),)),),
    )

Bodies are encoded as QEMU encodes such declarations, and described so that its tools
can read them.

Reference: VMState bodies, subsections and descriptions, stream format 7.4 and 7.5.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from migrationd.errors import GuestError
from migrationd.workload.fields import Described, Field, Reader
from migrationd.workload.names import check_name

SUBSECTION_MARK = 0x05
"""Byte before each subsection."""

Hook = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class VMState:
    """The state of one kind of device, or of a structure in one.

    Attributes:
        name: Name; of a device also the section's.
        version_id: Version of the body that is written.
        minimum_version_id: Oldest version that is read.
        fields: In the order of the body.
        subsections: Optional parts; one that the destination does not know is refused there.
        pre_save: Called with the object before it is encoded.
        pre_load: Called before it is decoded.
        post_load: Called after; it raises if the state makes no sense.
        unmigratable: Why a guest with this device cannot migrate; None if it can.
    """

    name: str
    version_id: int = 1
    minimum_version_id: int = 1
    fields: Sequence[Field] = ()
    subsections: Sequence["Subsection"] = field(default=())
    pre_save: Hook | None = None
    pre_load: Hook | None = None
    post_load: Hook | None = None
    unmigratable: str | None = None

    def __post_init__(self) -> None:
        name = self.name
        check_name(name, "a device")
        if not 0 <= self.minimum_version_id <= self.version_id < 1 << 31:
            raise GuestError(
                f"'{name}': version {self.version_id}, at least {self.minimum_version_id}"
            )
        names = [item.name for item in self.fields]
        if len(set(names)) != len(names):
            raise GuestError(f"'{name}' declares a field twice")
        for index, item in enumerate(self.fields):
            if item.count_field is not None and item.count_field not in names[:index]:
                raise GuestError(f"'{name}': '{item.name}' counts by a field that comes later")
            if item.since > self.version_id:
                raise GuestError(f"'{name}': '{item.name}' is newer than version_id")
        parts = [sub.state.name for sub in self.subsections]
        if len(set(parts)) != len(parts):
            raise GuestError(f"'{name}' declares a subsection twice")
        for sub in self.subsections:
            if not sub.state.name.startswith(f"{name}/"):
                raise GuestError(f"a subsection of '{name}' is named '{name}/...'")

    def encode(self, obj: object) -> tuple[bytes, Described]:
        """Body of the object, and its description.

        Raises:
            GuestError: A value does not fit its field.
        """
        if self.pre_save is not None:
            self.pre_save(obj)
        parts: list[bytes] = []
        described: list[Described] = []
        for item in self.fields:
            if item.is_present(obj, self.version_id):
                body, objects = item.encode(obj, f"device '{self.name}'")
                parts.append(body)
                described += objects
        out: Described = {
            "vmsd_name": self.name,
            "version": self.version_id,
            "fields": described,
        }
        subsections = []
        for sub in self.subsections:
            if sub.needed(obj):
                body, description = sub.state.encode(obj)
                parts.append(sub.header() + body)
                subsections.append(description)
        if subsections:
            out["subsections"] = subsections
        return b"".join(parts), out

    def decode(self, data: bytes, obj: object, version: int) -> None:
        """Load a whole body into the object.

        Raises:
            GuestError: Version, field or subsection; what was decoded before stays.
        """
        reader = Reader(data, self.name)
        self.decode_body(reader, obj, version)
        if reader.rest:
            raise reader.error(
                f"{reader.rest} bytes of the body are left at {reader.at}: "
                "the source's declaration has more than this one"
            )

    def decode_body(self, reader: Reader, obj: object, version: int) -> None:
        """Load fields and subsections from where the reader is.

        Raises:
            GuestError: As :meth:`decode`.
        """
        self.check_version(version)
        if self.pre_load is not None:
            self.pre_load(obj)
        for item in self.fields:
            if item.is_present(obj, version):
                item.decode(reader, obj)
        self._decode_subsections(reader, obj)
        if self.post_load is not None:
            self.post_load(obj)

    def check_version(self, version: int) -> None:
        """Whether a body of this version can be read.

        Raises:
            GuestError: It is too new or too old.
        """
        if version > self.version_id:
            raise GuestError(
                f"device '{self.name}': incoming version_id {version} is too new for local "
                f"version_id {self.version_id}"
            )
        if version < self.minimum_version_id:
            raise GuestError(
                f"device '{self.name}': incoming version_id {version} is too old for local "
                f"minimum version_id {self.minimum_version_id}"
            )

    def declaration(self) -> dict[str, object]:
        """The declaration as JSON, for comparing two versions of a workload."""
        out: dict[str, object] = {
            "name": self.name,
            "version_id": self.version_id,
            "minimum_version_id": self.minimum_version_id,
            "fields": [item.signature() for item in self.fields],
        }
        if self.subsections:
            out["subsections"] = [sub.state.declaration() for sub in self.subsections]
        if self.unmigratable is not None:
            out["unmigratable"] = self.unmigratable
        return out

    def _decode_subsections(self, reader: Reader, obj: object) -> None:
        known = {sub.state.name: sub.state for sub in self.subsections}
        prefix = f"{self.name}/".encode()
        while (head := reader.peek(2)) and head[0] == SUBSECTION_MARK and len(head) == 2:
            name = reader.peek(2 + head[1])[2:]
            if not name.startswith(prefix):
                return  # the next field of what this is nested in begins with the same byte
            state = known.pop(name.decode("ascii", "replace"), None)
            if state is None:
                raise reader.error(f"subsection '{name.decode('ascii', 'replace')}' is not known")
            reader.take(2 + head[1], "a subsection")
            version = int.from_bytes(reader.take(4, "a subsection's version"), "big")
            state.decode_body(reader, obj, version)


@dataclass(frozen=True, slots=True)
class Subsection:
    """A part of a device's state that travels only when it matters.

    Args:
        name: ``parent/part``.
        needed: Whether this object needs it.
        fields: As of a device.
    """

    state: VMState
    needed: Callable[[Any], bool]

    def header(self) -> bytes:
        """What stands before its body."""
        name = self.state.name.encode()
        return bytes((SUBSECTION_MARK, len(name))) + name + self.state.version_id.to_bytes(4, "big")


def subsection(
    name: str,
    *,
    needed: Callable[[Any], bool],
    fields: Sequence[Field],
    version_id: int = 1,
    minimum_version_id: int = 1,
    post_load: Hook | None = None,
) -> Subsection:
    """Declare a subsection; its fields are attributes of the device's object.

    Args:
        name: ``parent/part``.
        needed: Whether this object needs it: it is left out otherwise.
        fields: In the order of the body.
        version_id: Version that is written.
        minimum_version_id: Oldest that is read.
        post_load: Called with the object after the fields were read.
    """
    state = VMState(name, version_id, minimum_version_id, fields, post_load=post_load)
    return Subsection(state, needed)
