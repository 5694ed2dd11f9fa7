"""Objects that users make, and the tree of all objects."""

from typing import Any

from migrationd.errors import QMPError
from migrationd.qmp.command import CommandSpec, Invocation, command
from migrationd.qmp.handlers import migration_type
from migrationd.qmp.handlers.object_tree import (
    Node,
    Property,
    build,
    find,
    known_types,
    value_of,
)
from migrationd.qmp.message import Json
from migrationd.qmp.models import objects as models

_USER_CREATABLE = "user-creatable"
_TYPE = Property("string")


def object_add(call: Invocation, arguments: models.ObjectBase) -> None:
    """``object-add``."""
    given = arguments.model_dump(by_alias=True, exclude_unset=True)
    properties = {name: given[name] for name in given.keys() - {"qom-type", "id"}}
    call.control.objects.add(arguments.qom_type, arguments.id, properties)


def object_del(call: Invocation, arguments: models.ObjectId) -> None:
    """``object-del``."""
    call.control.objects.delete(arguments.id)


def qom_list(call: Invocation, arguments: models.QomPath) -> list[models.ObjectPropertyInfo]:
    """``qom-list``."""
    node = find(build(call), arguments.path)
    return [
        models.ObjectPropertyInfo.make(name=name, type=kind) for name, kind, _ in node.properties()
    ]


def qom_get(call: Invocation, arguments: models.QomProperty) -> Json:
    """``qom-get``."""
    return Json(value_of(find(build(call), arguments.path), arguments.property))


def qom_set(call: Invocation, arguments: models.QomSet) -> None:
    """``qom-set``: nothing here can be changed after it was made."""
    node = find(build(call), arguments.path)
    value_of(node, arguments.property)
    raise QMPError(f"Property '{node.type}.{arguments.property}' is not writable")


def qom_list_get(
    call: Invocation, arguments: models.QomPaths
) -> list[models.ObjectPropertiesValues]:
    """``qom-list-get``."""
    root = build(call)
    return [_values(find(root, path)) for path in arguments.paths]


def qom_list_types(call: Invocation, arguments: models.QomListTypes) -> list[models.ObjectTypeInfo]:
    """``qom-list-types``."""
    types = known_types()
    wanted = arguments.implements if "implements" in arguments.model_fields_set else "object"

    def implements(name: str | None) -> bool:
        if name is None:
            return False
        info = types[name]
        is_such = info.is_user_creatable and wanted == _USER_CREATABLE
        return name == wanted or is_such or implements(info.parent)

    return [
        models.ObjectTypeInfo.make(
            name=name, abstract=True if info.is_abstract else None, parent=info.parent
        )
        for name, info in types.items()
        if implements(name) and (not info.is_abstract or arguments.abstract is True)
    ]


def qom_list_properties(
    call: Invocation, arguments: models.TypeName
) -> list[models.ObjectPropertyInfo]:
    """``qom-list-properties``."""
    if arguments.typename == migration_type.TYPE_NAME:
        return migration_type.all_properties()
    info = known_types().get(arguments.typename)
    if info is None:
        raise QMPError(f"Class '{arguments.typename}' not found", "DeviceNotFound")
    return [
        models.ObjectPropertyInfo.make(name=name, type=item.type)
        for name, item in {"type": _TYPE, **info.properties}.items()
    ]


def device_list_properties(
    call: Invocation, arguments: models.TypeName
) -> list[models.ObjectPropertyInfo]:
    """``device-list-properties``: of devices none is known but the migration itself."""
    if arguments.typename == migration_type.TYPE_NAME:
        return migration_type.device_properties()
    if arguments.typename in known_types():
        raise QMPError("Parameter 'typename' expects a non-abstract device type")
    raise QMPError(f"Device '{arguments.typename}' not found", "DeviceNotFound")


def _values(node: Node) -> models.ObjectPropertiesValues:
    return models.ObjectPropertiesValues.make(
        properties=[
            models.ObjectPropertyValue.make(name=name, type=kind, value=value)
            for name, kind, value in node.properties()
        ]
    )


COMMANDS: tuple[CommandSpec, ...] = (
    command("object-add", object_add, models.ObjectOptions),
    command("object-del", object_del, models.ObjectId),
    command("qom-list", qom_list, models.QomPath, list[models.ObjectPropertyInfo]),
    command("qom-get", qom_get, models.QomProperty, Any),
    command("qom-set", qom_set, models.QomSet),
    command("qom-list-get", qom_list_get, models.QomPaths, list[models.ObjectPropertiesValues]),
    command("qom-list-types", qom_list_types, models.QomListTypes, list[models.ObjectTypeInfo]),
    command(
        "qom-list-properties",
        qom_list_properties,
        models.TypeName,
        list[models.ObjectPropertyInfo],
    ),
    command(
        "device-list-properties",
        device_list_properties,
        models.TypeName,
        list[models.ObjectPropertyInfo],
    ),
)
