"""Base of all models, QAPI's number types, and QEMU's texts for wrong arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic import GetJsonSchemaHandler as Handler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from migrationd.errors import QMPError


class _Null:
    """Stands for a JSON null where none is allowed: no type accepts it."""


_NULL = _Null()


class QapiModel(BaseModel):
    """A QAPI struct: member names with dashes, no others, no null for "absent".

    What a command returns comes from ``make``.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        defer_build=True,
        frozen=True,
        alias_generator=lambda name: name.rstrip("_").replace("_", "-"),
    )

    nullable: ClassVar[frozenset[str]] = frozenset()
    """Members, by QMP name, that accept null."""

    @classmethod
    def make(cls, **members: object) -> Self:
        """A value of ours: not validated, the tests do that.

        Args:
            members: By field name; None is an absent member.
        """
        given = {name: value for name, value in members.items() if value is not None}
        model = cls.__new__(cls)
        # What model_construct comes to; it looks at each field again, at ten times the cost.
        object.__setattr__(model, "__dict__", _defaults(cls) | given)
        object.__setattr__(model, "__pydantic_fields_set__", set(given))
        object.__setattr__(model, "__pydantic_extra__", None)
        object.__setattr__(model, "__pydantic_private__", None)
        return model

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, data: Any) -> Any:  # noqa: ANN401  # any JSON value
        if not isinstance(data, dict):
            return data
        return {
            key: _NULL if value is None and key not in cls.nullable else value
            for key, value in data.items()
        }


@cache
def _defaults(model: type[QapiModel]) -> dict[str, object]:
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in model.model_fields.items()
        if not field.is_required()
    }


class Facts:
    """What is known of a member beside its type; becomes part of its JSON Schema.

    Args:
        facts: since, unit, minimum and so on; ``deprecated`` and ``unstable`` are features.
    """

    def __init__(self, facts: dict[str, object]) -> None:
        self.facts = {name: value for name, value in facts.items() if value not in ("", ())}

    def __call__(self, schema: dict[str, Any]) -> None:
        """Called by pydantic with the member's JSON Schema."""
        schema.pop("default", None)
        schema.update(self.facts)

    @property
    def features(self) -> tuple[str, ...]:
        """Features as the introspection names them."""
        return tuple(name for name in ("deprecated", "unstable") if self.facts.get(name))


def optional(**facts: object) -> Any:  # noqa: ANN401  # stands for a value of any type
    """A member that may be absent; see :class:`Facts`."""
    return Field(default=None, json_schema_extra=Facts(facts))


def required(**facts: object) -> Any:  # noqa: ANN401  # stands for a value of any type
    """A member that must be there, with what is known of it; see :class:`Facts`."""
    return Field(json_schema_extra=Facts(facts))


@dataclass(frozen=True, slots=True, eq=False)
class EnumFeatures:
    """Marks values of an enumeration: value to its features."""

    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class QapiUnion:
    """How a union of models looks to clients, who see a tag and the members of each case.

    Attributes:
        base: Members that every case has; one of them is the tag, an enumeration.
        tag: QMP name of the tag.
        cases: Value of the tag to its own members; values that are left out have none.
    """

    base: type[QapiModel]
    tag: str
    cases: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _QapiNumber:
    """Names a QAPI number type in the schema, with its range."""

    name: str
    bits: int

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: Handler) -> JsonSchemaValue:
        schema = handler(core)
        schema["qapi-type"] = self.name
        schema["minimum"] = 0
        schema["maximum"] = (1 << self.bits) - 1
        return schema


def _unsigned(bits: int) -> BeforeValidator:
    """An unsigned QAPI number: 64-bit ones wrap negatives, narrower ones refuse them."""
    too_large: Any = "uint64" if bits == 64 else f"uint{bits}_t"

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise PydanticCustomError("qapi_expects", "uint64")
        if bits == 64 and -(1 << 63) <= value < 1 << 64:
            return value & 0xFFFFFFFFFFFFFFFF
        if not 0 <= value < 1 << bits:
            raise PydanticCustomError("qapi_expects", too_large)
        return value

    return BeforeValidator(check)


UInt8 = Annotated[int, _unsigned(8), _QapiNumber("uint8", 8)]
UInt16 = Annotated[int, _unsigned(16), _QapiNumber("uint16", 16)]
UInt32 = Annotated[int, _unsigned(32), _QapiNumber("uint32", 32)]
UInt64 = Annotated[int, _unsigned(64), _QapiNumber("uint64", 64)]
Size = Annotated[int, _unsigned(64), _QapiNumber("size", 64)]

_EXPECTED = {
    "string_type": "string",
    "bool_type": "boolean",
    "int_type": "integer",
    "float_type": "number",
    "list_type": "array",
    "dict_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
}

Model = TypeVar("Model", bound=QapiModel)


_ADAPTERS: dict[int, tuple[object, TypeAdapter[Any]]] = {}


def parse_arguments(
    form: type[Model] | Any,  # noqa: ANN401  # a model or an annotation
    arguments: Mapping[str, object],
) -> Model:
    """Check arguments against their model.

    Args:
        form: A model, or a union of models as an annotation.
        arguments: What the client sent.

    Raises:
        QMPError: The first problem, in QEMU's order and words: members in schema order,
            each with all that is in it, and members that are not in the schema last.
    """
    if not arguments and isinstance(form, type) and _takes_nothing(form):
        # Most requests; and until there is another one no validator takes room.
        return cast("type[Model]", form).make()
    try:
        if isinstance(form, type):
            return cast("type[Model]", form).model_validate(arguments)
        if id(form) not in _ADAPTERS:
            _ADAPTERS[id(form)] = (form, TypeAdapter(form))
        return cast("Model", _ADAPTERS[id(form)][1].validate_python(arguments))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=True)[0]
        problem["loc"] = _without_branches(problem["loc"], arguments)
        raise QMPError(_text(problem)) from None


@cache
def _takes_nothing(model: type[QapiModel]) -> bool:
    return len(_defaults(model)) == len(model.model_fields)


def _without_branches(loc: tuple[int | str, ...], value: object) -> tuple[int | str, ...]:
    """A place without the tags of the unions on the way, which are no members."""
    place: list[int | str] = []
    for index, part in enumerate(loc):
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        elif isinstance(value, dict):
            is_last = index == len(loc) - 1
            if part not in value and part in value.values() and not is_last:
                continue
            value = value.get(part)
        place.append(part)
    return tuple(place)


def _text(problem: ErrorDetails) -> str:
    path = _path(problem["loc"])
    kind = problem["type"]
    value = problem.get("input")
    if kind == "missing":
        return f"Parameter '{path}' is missing"
    if kind == "extra_forbidden":
        return f"Parameter '{path}' is unexpected"
    if kind == "qapi_expects":
        return f"Parameter '{path}' expects {problem['msg']}"
    if kind == "qapi_alternate":
        return f"Invalid parameter type for '{path}', expected: {problem['msg']}"
    if kind in ("literal_error", "union_tag_invalid"):
        name = _last(problem, kind)
        if kind == "union_tag_invalid":
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str):
            return f"Parameter '{name}' does not accept value '{value}'"
        if kind == "union_tag_invalid":
            path = f"{path}.{name}" if path else name
        return f"Invalid parameter type for '{path}', expected: string"
    if kind == "union_tag_not_found":
        tag = _tag(problem)
        path = f"{path}.{tag}" if path else tag
        return f"Parameter '{path}' is missing"
    return f"Invalid parameter type for '{path}', expected: {_EXPECTED.get(kind, kind)}"


def _tag(problem: ErrorDetails) -> str:
    """QMP name of a union's tag; pydantic writes ``'field_name' | 'qmp-name'``."""
    return str(problem["ctx"]["discriminator"]).split(" | ")[-1].strip("'")


def _last(problem: ErrorDetails, kind: str) -> str:
    """QEMU names only the last component here; a list element has no name of its own."""
    if kind == "union_tag_invalid":
        return _tag(problem)
    last = problem["loc"][-1]
    return "null" if isinstance(last, int) else str(last)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.startswith("@"):
            continue  # the name of a union's branch
        else:
            path += f".{part}" if path else part
    return path
