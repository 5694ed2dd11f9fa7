"""Can one version of a workload migrate into another? Answered from declarations alone.

    python -m migrationd.workload.compare OLD.json NEW.json

The files hold what ``Workload.declarations()`` gives. Exit status 0: both ways work;
1: at least one does not; 2: a file cannot be read or holds no declarations.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Declaration = Mapping[str, Any]


def problems(source: Sequence[Declaration], destination: Sequence[Declaration]) -> list[str]:
    """Why a workload with these devices cannot migrate into one with those.

    Args:
        source: Declarations of all devices of the source, each with its ``instance_id``.
        destination: The same of the destination.

    Returns:
        One line for each reason, naming the device and field; empty if it can.
    """
    for side, devices in (("source", source), ("destination", destination)):
        if not is_declarations(devices):
            return [f"what the {side} has is no list of declarations"]
    there = {_key(device): device for device in destination}
    found: list[str] = []
    for device in source:
        where = f"device '{device['name']}'"
        if device.get("instance_id", 0):
            where += f" instance {device['instance_id']}"
        if reason := device.get("unmigratable"):
            found.append(f"{where} cannot migrate: {reason}")
        other = there.get(_key(device))
        if other is None:
            found.append(f"{where} does not exist at the destination")
        else:
            found += _compare(device, other, where)
    return found


def is_declarations(value: object) -> bool:
    """Whether it is a list of declarations; it may come from anywhere."""
    return isinstance(value, list) and all(map(_is_declaration, value))


def _compare(source: Declaration, destination: Declaration, where: str) -> list[str]:
    version = source["version_id"]
    if version > destination["version_id"]:
        return [
            f"{where}: version_id {version} is too new for the destination's "
            f"{destination['version_id']}"
        ]
    if version < destination["minimum_version_id"]:
        return [
            f"{where}: version_id {version} is too old for the destination's minimum "
            f"{destination['minimum_version_id']}"
        ]
    return _compare_bodies(source, destination, version, where)


def _compare_bodies(
    source: Declaration, destination: Declaration, version: int, where: str
) -> list[str]:
    """Compare what the source writes with what the destination reads of this version."""
    sent = _present(source, source["version_id"])
    wanted = _present(destination, version)
    found = []
    for index in range(max(len(sent), len(wanted))):
        mine = sent[index] if index < len(sent) else None
        theirs = wanted[index] if index < len(wanted) else None
        if mine is None or theirs is None:
            name = (mine or theirs or {})["name"]
            side = "destination" if theirs is None else "source"
            found.append(f"{where}: field '{name}' does not exist at the {side}")
            break
        if mine["name"] != theirs["name"]:
            found.append(
                f"{where}: field '{mine['name']}' stands where the destination has "
                f"'{theirs['name']}'"
            )
            break
        found += _compare_field(mine, theirs, f"{where}: field '{mine['name']}'")
    known = {item["name"]: item for item in destination.get("subsections", ())}
    for item in source.get("subsections", ()):
        name = f"subsection '{item['name']}'"
        if item["name"] not in known:
            found.append(f"{where}: {name} is not known at the destination")
        else:
            found += _compare(item, known[item["name"]], name)
    return found


def _compare_field(mine: Declaration, theirs: Declaration, where: str) -> list[str]:
    left, right = mine["type"], theirs["type"]
    for member in ("length", "count_field", "conditional"):
        if mine.get(member) != theirs.get(member):
            return [f"{where}: {member} {mine.get(member)} is {theirs.get(member)} there"]
    if isinstance(left, list) and isinstance(right, list) and left[0] == right[0] == "struct":
        # No version of a structure is on the wire: it is read as the destination has it.
        return _compare_bodies(left[1], right[1], right[1]["version_id"], where)
    if left != right:
        return [f"{where}: type {_type(left)} is {_type(right)} at the destination"]
    return []


def _present(declaration: Declaration, version: int) -> list[Declaration]:
    return [item for item in declaration["fields"] if item.get("since", 0) <= version]


def _type(signature: object) -> str:
    if isinstance(signature, list):
        return "struct" if signature[0] == "struct" else f"{signature[0]}[{signature[1]}]"
    return str(signature)


def _key(device: Declaration) -> tuple[str, int]:
    return device["name"], device.get("instance_id", 0)


def _is_declaration(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    fields, subsections = value.get("fields"), value.get("subsections", [])
    numbers = (value.get("version_id"), value.get("minimum_version_id"))
    return (
        isinstance(value.get("name"), str)
        and isinstance(value.get("instance_id", 0), int)
        and all(isinstance(number, int) for number in numbers)
        and isinstance(fields, list)
        and all(map(_is_field, fields))
        and isinstance(subsections, list)
        and all(map(_is_declaration, subsections))
    )


def _is_field(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    signature = value.get("type")
    is_known = isinstance(signature, str)
    if isinstance(signature, list) and len(signature) == 2:
        is_known = signature[0] != "struct" or _is_declaration(signature[1])
    is_named = isinstance(value.get("name"), str) and isinstance(value.get("since", 0), int)
    return is_known and is_named


def main(arguments: list[str] | None = None) -> int:
    """Compare two files; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="migrationd.workload.compare", description="Can two versions migrate to each other?"
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        old = json.loads(options.old.read_text("utf-8"))
        new = json.loads(options.new.read_text("utf-8"))
    except (OSError, ValueError) as error:
        print(f"cannot read a declaration: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for path, devices in ((options.old, old), (options.new, new)):
        if not is_declarations(devices):
            print(f"{path}: no list of declarations", file=sys.stderr)  # noqa: T201
            return 2
    status = 0
    for text, source, destination in (("old to new", old, new), ("new to old", new, old)):
        found = problems(source, destination)
        print(f"{text}: {'no' if found else 'yes'}")  # noqa: T201
        for line in found:
            print(f"  {line}")  # noqa: T201
        status = status or int(bool(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
