"""``schemas/``: JSON Schema of every command, return, event and type, from the models.

``introspection.json`` is what ``query-qmp-schema`` returns.

python -m migrationd.qmp.schema --write     write the files anew
python -m migrationd.qmp.schema --check     fail if they are not what the models give
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from migrationd.guest.protocol import REQUESTS, Introduction
from migrationd.qmp.handlers.introspection import entities
from migrationd.qmp.handlers.table import COMMANDS
from migrationd.qmp.models.events import EVENTS

DIRECTORY = Path(__file__).resolve().parents[2] / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = "../types.json#/$defs/{model}"


def generate() -> dict[str, str]:
    """File name below ``schemas/`` to its text."""
    forms: dict[Any, Any] = {}
    for spec in COMMANDS.values():
        forms[spec.name, "arguments"] = spec.arguments
        forms[spec.name, "returns"] = spec.returns
    for name, model in EVENTS.items():
        forms[name, "data"] = model
    shapes, types = _json_schemas(forms)
    files: dict[str, str] = {}
    commands: dict[str, object] = {}
    for name, spec in sorted(COMMANDS.items()):
        path = f"commands/{name}.json"
        files[path] = _text(
            {
                "$schema": _DRAFT,
                "title": name,
                "description": (spec.handler.__doc__ or "").strip(),
                "allow-oob": spec.allows_oob,
                "features": list(spec.features),
                "arguments": shapes[name, "arguments"],
                "returns": shapes[name, "returns"],
            }
        )
        commands[name] = path
    events: dict[str, object] = {}
    for name in sorted(EVENTS):
        path = f"events/{name}.json"
        files[path] = _text({"$schema": _DRAFT, "title": name, "data": shapes[name, "data"]})
        events[name] = path
    files["types.json"] = _text({"$schema": _DRAFT, "$defs": types})
    files["index.json"] = _text({"commands": commands, "events": events})
    files["introspection.json"] = _lines(entities(COMMANDS.values()))
    files |= _guest_socket()
    return files


def _guest_socket() -> dict[str, str]:
    """The messages of the guest socket: a workload's introduction, and each request."""
    introduction: dict[str, object] = {"$schema": _DRAFT, **Introduction.model_json_schema()}
    files: dict[str, str] = {"guest/introduction.json": _text(introduction)}
    for name, (arguments, returns) in REQUESTS.items():
        tree: dict[str, object] = {
            "$schema": _DRAFT,
            "title": name,
            "arguments": arguments.model_json_schema(),
            "returns": returns.model_json_schema(),
        }
        files[f"guest/{name}.json"] = _text(tree)
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


def _json_schemas(forms: dict[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Each form as a JSON Schema that refers to types.json, and the types of that file."""
    schemas, tree = TypeAdapter.json_schemas(
        [(key, "validation", TypeAdapter(form)) for key, form in forms.items()]
    )
    types = tree.get("$defs", {})
    shapes = {}
    for name, part in forms:
        text = json.dumps(schemas[(name, part), "validation"])
        text = re.sub(r'"#/\$defs/(\w+)"', r'"../types.json#/$defs/\1"', text)
        shapes[name, part] = json.loads(text)
    return shapes, types


def _lines(values: list[dict[str, object]]) -> str:
    """A list with one value in each line, so that a change is easy to see."""
    return "[\n" + ",\n".join(json.dumps(value) for value in values) + "\n]\n"


def _text(tree: dict[str, object]) -> str:
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.exit(main())
