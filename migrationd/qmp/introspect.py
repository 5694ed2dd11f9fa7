"""``query-qmp-schema`` from the models: entities whose type names are masked.

Pure. Commands and events come first, then types in the order in which they are first
named; a type's name is its number, an array's the element's in brackets, and all
integers are ``int``.

Reference: ``SchemaInfo`` of QEMU's introspection schema.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from migrationd.qmp.models.base import EnumFeatures, Facts, QapiModel, QapiUnion

Mark = TypeVar("Mark")

_BUILTIN: dict[object, tuple[str, str]] = {
    str: ("str", "string"),
    int: ("int", "int"),
    float: ("number", "number"),
    bool: ("bool", "boolean"),
    type(None): ("null", "null"),
    None: ("null", "null"),
    Any: ("any", "value"),
}
"""Python type to its name and to its JSON type, in QAPI's words."""

Entity = dict[str, object]


class Nothing(QapiModel):
    """The object without members."""


@dataclass(frozen=True, slots=True)
class CommandForm:
    """What the introspection says of a command.

    Attributes:
        name: Name.
        arguments: Model of the arguments, or an annotated union.
        returns: Annotation of what it returns.
        features: In order.
        allows_oob: Whether it may run out of band.
    """

    name: str
    arguments: Any
    returns: Any
    features: tuple[str, ...] = ()
    allows_oob: bool = False


def introspect(commands: Sequence[CommandForm], events: Mapping[str, Any]) -> list[Entity]:
    """All entities.

    Args:
        commands: In the order in which they are to appear.
        events: Name to the model of the data.

    Returns:
        JSON objects as ``query-qmp-schema`` returns them.
    """
    masker = _Masker()
    named: list[Entity] = []
    for command in commands:
        entity: Entity = {
            "name": command.name,
            "ret-type": "",
            "meta-type": "command",
            "arg-type": masker.use(command.arguments),
        }
        entity["ret-type"] = masker.use(command.returns)
        if command.allows_oob:
            entity["allow-oob"] = True
        named.append(_with_features(entity, command.features))
    for name, data in events.items():
        named.append({"name": name, "meta-type": "event", "arg-type": masker.use(data)})
    return named + masker.entities()


class _Masker:
    """Gives numbers to types and describes each once."""

    def __init__(self) -> None:
        self._names: dict[object, str] = {}
        self._numbers = 0
        self._found: list[tuple[str, Any, tuple[Any, ...]]] = []
        self.use(Nothing)

    def use(self, form: Any, metadata: Sequence[Any] = ()) -> str:  # noqa: ANN401  # annotation
        """The masked name of a type; it is described later."""
        form, metadata = _bare(form, metadata)
        if isinstance(form, type) and issubclass(form, QapiModel) and not form.model_fields:
            form = Nothing
        key = _key(form, metadata)
        if key not in self._names:
            place = len(self._found)
            self._found.append(("", form, tuple(metadata)))
            self._names[key] = name = self._new_name(form)
            self._found[place] = (name, form, tuple(metadata))
        return self._names[key]

    def entities(self) -> list[Entity]:
        """All types that were named, with those that they name in turn."""
        done = []
        position = 0
        while position < len(self._found):
            done.append(self._describe(*self._found[position]))
            position += 1
        return done

    def _new_name(self, form: Any) -> str:  # noqa: ANN401  # annotation
        if form in _BUILTIN:
            return _BUILTIN[form][0]
        if get_origin(form) is list:
            return f"[{self.use(get_args(form)[0])}]"
        self._numbers += 1
        return str(self._numbers - 1)

    def _describe(self, name: str, form: Any, metadata: tuple[Any, ...]) -> Entity:  # noqa: ANN401
        if form in _BUILTIN:
            return {"name": name, "json-type": _BUILTIN[form][1], "meta-type": "builtin"}
        if get_origin(form) is list:
            element = self.use(get_args(form)[0])
            return {"name": name, "element-type": element, "meta-type": "array"}
        if get_origin(form) is Literal:
            return _describe_enum(name, get_args(form), metadata)
        if union := _find(metadata, QapiUnion):
            return self._describe_union(name, union)
        if get_origin(form) in (Union, types.UnionType):
            members = [{"type": self.use(branch)} for branch in get_args(form)]
            return {"name": name, "members": members, "meta-type": "alternate"}
        return {"name": name, "members": self._members(form), "meta-type": "object"}

    def _describe_union(self, name: str, union: QapiUnion) -> Entity:
        tag = next(field for field in union.base.model_fields.values() if field.alias == union.tag)
        return {
            "name": name,
            "tag": union.tag,
            "variants": [
                {"case": case, "type": self.use(union.cases.get(case, Nothing))}
                for case in get_args(_bare(tag.annotation, ())[0])
            ],
            "members": self._members(union.base),
            "meta-type": "object",
        }

    def _members(self, model: type[QapiModel]) -> list[Entity]:
        members = []
        for field in model.model_fields.values():
            member: Entity = {"name": str(field.alias)}
            if not field.is_required():
                member["default"] = None
            member["type"] = self.use(field.annotation, field.metadata)
            members.append(_with_features(member, _features(field)))
        return members


def _describe_enum(name: str, values: tuple[str, ...], metadata: tuple[Any, ...]) -> Entity:
    marks = _find(metadata, EnumFeatures) or EnumFeatures()
    members = [_with_features({"name": value}, marks.features.get(value, ())) for value in values]
    return {"name": name, "members": members, "meta-type": "enum", "values": list(values)}


def _with_features(entity: Entity, features: Sequence[str]) -> Entity:
    if features:
        entity["features"] = list(features)
    return entity


def _features(field: FieldInfo) -> tuple[str, ...]:
    facts = field.json_schema_extra
    return facts.features if isinstance(facts, Facts) else ()


def _bare(form: Any, metadata: Sequence[Any]) -> tuple[Any, Sequence[Any]]:  # noqa: ANN401
    while get_origin(form) is Annotated:
        form, *more = get_args(form)
        metadata = [*more, *metadata]
    return form, metadata


def _key(form: Any, metadata: Sequence[Any]) -> object:  # noqa: ANN401  # annotation
    if get_origin(form) is list:
        return ("list", _key(*_bare(get_args(form)[0], ())))
    if union := _find(metadata, QapiUnion):
        return id(union)
    if get_origin(form) is Literal:
        return ("enum", get_args(form))
    return form


def _find(metadata: Sequence[Any], kind: type[Mark]) -> Mark | None:
    return next((item for item in metadata if isinstance(item, kind)), None)
