"""``query-qmp-schema`` and ``query-command-line-options``."""

from typing import Annotated, Any, Literal

from pydantic import Field

from migrationd.qmp.models.base import QapiModel, QapiUnion, optional, required


class SchemaInfoBase(QapiModel):
    """What every entity of the schema has."""

    name: str
    meta_type: Literal["builtin", "enum", "array", "object", "alternate", "command", "event"]
    features: list[str] = optional(since="4.2")


class BuiltinMembers(QapiModel):
    """A type that JSON has."""

    json_type: Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]


class EnumMember(QapiModel):
    """A value of an enumeration."""

    name: str
    features: list[str] = optional(since="8.0")


class EnumMembers(QapiModel):
    """An enumeration."""

    members: list[EnumMember] = required(since="6.2")
    values: list[str] = required(deprecated=True)


class ArrayMembers(QapiModel):
    """An array."""

    element_type: str


class ObjectMember(QapiModel):
    """A member of an object; ``default`` is there if the member may be absent."""

    name: str
    type: str
    default: Any = optional()
    features: list[str] = optional(since="6.2")


class ObjectVariant(QapiModel):
    """What an object has besides for one value of its tag."""

    case: str
    type: str


class ObjectMembers(QapiModel):
    """An object, or a union of objects."""

    members: list[ObjectMember]
    tag: str = optional()
    variants: list[ObjectVariant] = optional()


class AlternateMember(QapiModel):
    """One of the types of an alternate."""

    type: str


class AlternateMembers(QapiModel):
    """A value of one of several types."""

    members: list[AlternateMember]


class CommandMembers(QapiModel):
    """A command."""

    arg_type: str
    ret_type: str
    allow_oob: bool = optional(since="2.12")


class EventMembers(QapiModel):
    """An event."""

    arg_type: str


class BuiltinInfo(SchemaInfoBase, BuiltinMembers):
    """Entity: a type that JSON has."""

    meta_type: Literal["builtin"]


class EnumInfo(SchemaInfoBase, EnumMembers):
    """Entity: an enumeration."""

    meta_type: Literal["enum"]


class ArrayInfo(SchemaInfoBase, ArrayMembers):
    """Entity: an array."""

    meta_type: Literal["array"]


class ObjectInfo(SchemaInfoBase, ObjectMembers):
    """Entity: an object."""

    meta_type: Literal["object"]


class AlternateInfo(SchemaInfoBase, AlternateMembers):
    """Entity: a value of one of several types."""

    meta_type: Literal["alternate"]


class CommandEntity(SchemaInfoBase, CommandMembers):
    """Entity: a command."""

    meta_type: Literal["command"]


class EventEntity(SchemaInfoBase, EventMembers):
    """Entity: an event."""

    meta_type: Literal["event"]


SchemaInfo = Annotated[
    BuiltinInfo | EnumInfo | ArrayInfo | ObjectInfo | AlternateInfo | CommandEntity | EventEntity,
    Field(discriminator="meta_type"),
    QapiUnion(
        SchemaInfoBase,
        "meta-type",
        {
            "builtin": BuiltinMembers,
            "enum": EnumMembers,
            "array": ArrayMembers,
            "object": ObjectMembers,
            "alternate": AlternateMembers,
            "command": CommandMembers,
            "event": EventMembers,
        },
    ),
]


class QueryCommandLineOptions(QapiModel):
    """Arguments of ``query-command-line-options``."""

    option: str = optional()


class CommandLineParameterInfo(QapiModel):
    """A parameter of an option."""

    name: str
    type: Literal["string", "boolean", "number", "size"]
    help: str = optional()
    default: str = optional(since="2.1")


class CommandLineOptionInfo(QapiModel):
    """An option and its parameters."""

    option: str
    parameters: list[CommandLineParameterInfo]
