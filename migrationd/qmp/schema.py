"""``schemas/``: JSON Schema of every command, return, event and type, from the models.

python -m migrationd.qmp.schema --write     write the files anew
python -m migrationd.qmp.schema --check     fail if they are not what the models give
"""

import argparse
import json
import sys
from pathlib import Path

from pydantic.json_schema import models_json_schema

from migrationd.qmp.handlers.table import COMMANDS, EVENTS
from migrationd.qmp.models.base import QapiModel

DIRECTORY = Path(__file__).resolve().parents[2] / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def generate() -> dict[str, str]:
    """File name below ``schemas/`` to its text."""
    files: dict[str, str] = {}
    index: dict[str, object] = {"commands": {}, "events": {}}
    commands: dict[str, object] = {}
    for name, spec in sorted(COMMANDS.items()):
        path = f"commands/{name}.json"
        returns = _reference(spec.returns)
        files[path] = _text(
            {
                "$schema": _DRAFT,
                "title": name,
                "description": (spec.handler.__doc__ or "").strip(),
                "allow-oob": spec.allows_oob,
                "deprecated": spec.deprecated,
                "arguments": _reference(spec.arguments),
                "returns": {"type": "array", "items": returns} if spec.returns_list else returns,
            }
        )
        commands[name] = path
    events: dict[str, object] = {}
    for name, model in sorted(EVENTS.items()):
        path = f"events/{name}.json"
        files[path] = _text({"$schema": _DRAFT, "title": name, "data": _reference(model)})
        events[name] = path
    index["commands"] = commands
    index["events"] = events
    files["types.json"] = _text(_types())
    files["index.json"] = _text(index)
    return files


def main(arguments: list[str] | None = None) -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(description="JSON Schema files of the monitor")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    options = parser.parse_args(arguments)
    wanted = generate()
    found = {
        str(path.relative_to(options.directory)): path.read_text("utf-8")
        for path in options.directory.rglob("*.json")
    }
    if options.check:
        stale = sorted(
            name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
        )
        if stale:
            print(  # noqa: T201
                f"schemas/ is stale: {', '.join(stale[:5])}; run 'make schemas'", file=sys.stderr
            )
        return 1 if stale else 0
    for name in found.keys() - wanted.keys():
        (options.directory / name).unlink()
    for name, text in wanted.items():
        path = options.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    print(f"{len(wanted)} files in {options.directory.name}/")  # noqa: T201
    return 0


def _reference(model: type[QapiModel]) -> dict[str, str]:
    return {"$ref": f"../types.json#/$defs/{model.__name__}"}


def _types() -> dict[str, object]:
    models = {model for spec in COMMANDS.values() for model in (spec.arguments, spec.returns)}
    models |= set(EVENTS.values())
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schema = models_json_schema([(model, "validation") for model in ordered], by_alias=True)
    return {"$schema": _DRAFT, **schema}


def _text(tree: dict[str, object]) -> str:
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.exit(main())
