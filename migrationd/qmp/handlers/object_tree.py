"""The object tree as tools see it: objects that users made, monitors, and the machine.

Built anew for each question: it is small, and what it shows changes elsewhere. The machine
has no devices, for those of its guest are bytes.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from migrationd.errors import QMPError
from migrationd.qmp.command import Invocation
from migrationd.qmp.models.base import Facts
from migrationd.qmp.models.objects import OBJECT_MEMBERS


@dataclass(frozen=True, slots=True)
class Property:
    """A property of a type.

    Attributes:
        type: As ``qom-list`` shows it.
        initial: What it is when nobody gave it.
    """

    type: str
    initial: object = ""


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """A type.

    Attributes:
        parent: Type that it is derived from.
        properties: By name, without ``type``.
        is_abstract: Whether no object has it.
        is_user_creatable: Whether ``object-add`` makes it.
    """

    parent: str | None
    properties: dict[str, Property] = field(default_factory=dict)
    is_abstract: bool = False
    is_user_creatable: bool = False


@dataclass(slots=True)
class Node:
    """An object of the tree.

    Attributes:
        type: Its type.
        values: Properties and what they are.
        children: By name.
        path: From the root.
    """

    type: str
    values: Mapping[str, tuple[str, object]] = field(default_factory=dict)
    children: "dict[str, Node]" = field(default_factory=dict)
    path: str = ""

    def properties(self) -> Iterator[tuple[str, str, object]]:
        """Name, type and value of each property; a child's value is its path."""
        yield "type", "string", self.type
        for name, (kind, value) in self.values.items():
            yield name, kind, value
        for name, child in self.children.items():
            yield name, f"child<{child.type}>", child.path


_MONITOR = {
    "chardev": Property("string"),
    "pretty": Property("bool", False),
}
_PLAIN: dict[object, str] = {bool: "bool", int: "int"}
_PARENTS = {
    "iothread": "event-loop-base",
    "secret": "secret_common",
    "authz": "authz",
    "tls": "tls-creds",
}


def known_types() -> dict[str, TypeInfo]:
    """Every type that the tree can show, with what they are derived from."""
    types = {
        "object": TypeInfo(None, is_abstract=True),
        "container": TypeInfo("object"),
        "authz": TypeInfo("object", is_abstract=True),
        "event-loop-base": TypeInfo("object", is_abstract=True),
        "secret_common": TypeInfo("object", is_abstract=True),
        "tls-creds": TypeInfo("object", is_abstract=True),
        "chardev": TypeInfo("object", is_abstract=True),
        "chardev-fd": TypeInfo("chardev", is_abstract=True),
        "chardev-socket": TypeInfo("chardev", {"connected": Property("bool", False)}),
        "chardev-stdio": TypeInfo("chardev-fd"),
        "monitor-qmp": TypeInfo("object", _MONITOR),
    }
    for name, model in OBJECT_MEMBERS.items():
        properties = {}
        for member in model.model_fields.values():
            extra = member.json_schema_extra
            facts = extra.facts if isinstance(extra, Facts) else {}
            plain = _PLAIN.get(member.annotation, "string")
            properties[str(member.alias)] = Property(
                str(facts.get("qom", plain)), facts.get("initial", "")
            )
        parent = _PARENTS[name.partition("-")[0]]
        types[name] = TypeInfo(parent, properties, is_user_creatable=True)
    return types


def build(call: Invocation) -> Node:
    """The root of the tree as it is now."""
    control = call.control
    types = known_types()
    chardevs = Node("container")
    objects = Node("container")
    for object_id in control.objects:
        found = control.objects.find(object_id)
        if found is None:
            continue
        values = {
            name: (item.type, found.properties.get(name, item.initial))
            for name, item in types[found.qom_type].properties.items()
        }
        objects.children[object_id] = Node(found.qom_type, values)
    for label, chardev in control.machine.chardevs().items():
        if chardev.is_socket:
            chardevs.children[label] = Node(
                "chardev-socket", {"connected": ("bool", chardev.is_connected)}
            )
        else:
            chardevs.children[label] = Node("chardev-stdio")
        monitor = {"chardev": ("string", label), "pretty": ("bool", chardev.is_pretty)}
        objects.children.setdefault(label, Node("monitor-qmp", monitor))
    machine = Node(f"{control.machine.type_name or 'none'}-machine")
    for name in ("unattached", "peripheral", "peripheral-anon"):
        machine.children[name] = Node("container")
    root = Node("container")
    root.children = {"machine": machine, "objects": objects, "chardevs": chardevs}
    for _ in walk(root):
        pass
    return root


def walk(node: Node, path: str = "") -> Iterator[Node]:
    """A node and all below it; writes their paths."""
    node.path = path or "/"
    yield node
    for name, child in node.children.items():
        yield from walk(child, f"{path}/{name}")


def find(root: Node, path: str) -> Node:
    """The node of a path: from the root, or the end of one path alone.

    Raises:
        QMPError: There is none, or there are several.
    """
    parts = [part for part in path.split("/") if part]
    if path.startswith("/"):
        node: Node | None = root
        for part in parts:
            node = node.children.get(part) if node is not None else None
        found = [node] if node is not None else []
    else:
        tail = "".join(f"/{part}" for part in parts)
        found = [node for node in walk(root) if node.path.endswith(tail)]
    if len(found) > 1:
        raise QMPError(f"Path '{path}' is ambiguous")
    if not found:
        raise QMPError(f"Device '{path}' not found", "DeviceNotFound")
    return found[0]


def value_of(node: Node, name: str) -> str:
    """A property's value as JSON text.

    Raises:
        QMPError: It has no such property.
    """
    for known, _, value in node.properties():
        if known == name:
            return json.dumps(value)
    raise QMPError(f"Property '{node.type}.{name}' not found")
