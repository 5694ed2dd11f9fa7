"""Base of all models, QAPI's number types, and QEMU's texts for wrong arguments."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from migrationd.errors import QMPError


class _Null:
    """Stands for a JSON null where none is allowed: no type accepts it."""


_NULL = _Null()


class QapiModel(BaseModel):
    """A QAPI struct: member names with dashes, no others, no null for "absent"."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        alias_generator=lambda name: name.rstrip("_").replace("_", "-"),
        populate_by_name=True,
    )

    nullable: ClassVar[frozenset[str]] = frozenset()
    """Members, by QMP name, that accept null."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_null(cls, data: Any) -> Any:  # noqa: ANN401  # any JSON value
        if not isinstance(data, dict):
            return data
        return {
            key: _NULL if value is None and key not in cls.nullable else value
            for key, value in data.items()
        }


def _unsigned(bits: int) -> BeforeValidator:
    """An unsigned QAPI number: 64-bit ones wrap negatives, narrower ones refuse them."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise PydanticCustomError("qapi_expects", "uint64")
        if bits == 64:
            return value & 0xFFFFFFFFFFFFFFFF
        if not 0 <= value < 1 << bits:
            raise PydanticCustomError("qapi_expects", f"uint{bits}_t")
        return value

    return BeforeValidator(check)


UInt8 = Annotated[int, _unsigned(8), Field(json_schema_extra={"qapi-type": "uint8"})]
UInt16 = Annotated[int, _unsigned(16), Field(json_schema_extra={"qapi-type": "uint16"})]
UInt32 = Annotated[int, _unsigned(32), Field(json_schema_extra={"qapi-type": "uint32"})]
UInt64 = Annotated[int, _unsigned(64), Field(json_schema_extra={"qapi-type": "uint64"})]
Size = Annotated[int, _unsigned(64), Field(json_schema_extra={"qapi-type": "size"})]

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


def parse_arguments(model: type[Model], arguments: Mapping[str, object]) -> Model:
    """Check arguments against their model.

    Raises:
        QMPError: The first problem in schema order, in QEMU's words.
    """
    try:
        return model.model_validate(arguments)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=True)
        # Unknown members are found last.
        problems.sort(key=lambda problem: problem["type"] == "extra_forbidden")
        raise QMPError(_text(problems[0])) from None


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
            value = problem["ctx"]["tag"]
        if isinstance(value, str):
            return f"Parameter '{name}' does not accept value '{value}'"
        return f"Invalid parameter type for '{path}', expected: string"
    if kind == "union_tag_not_found":
        tag = problem["ctx"]["discriminator"].strip("'")
        return f"Parameter '{path}.{tag}' is missing"
    return f"Invalid parameter type for '{path}', expected: {_EXPECTED.get(kind, kind)}"


def _last(problem: ErrorDetails, kind: str) -> str:
    """QEMU names only the last component here; a list element has no name of its own."""
    if kind == "union_tag_invalid":
        return str(problem["ctx"]["discriminator"]).strip("'")
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
