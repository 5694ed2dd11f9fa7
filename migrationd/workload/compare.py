"""Can one version of a workload migrate into another? Answered from declarations alone.

    python -m migrationd.workload.compare OLD.json NEW.json

The files hold what ``Workload.declarations()`` gives. Exit status 0: both ways work;
1: at least one does not.
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
    sent = _present(source, version)
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
    known = {item["name"] for item in destination.get("subsections", ())}
    found += [
        f"{where}: subsection '{item['name']}' is not known at the destination"
        for item in source.get("subsections", ())
        if item["name"] not in known
    ]
    by_name = {item["name"]: item for item in destination.get("subsections", ())}
    for item in source.get("subsections", ()):
        if item["name"] in by_name:
            found += _compare(item, by_name[item["name"]], f"subsection '{item['name']}'")
    return found


def _compare_field(mine: Declaration, theirs: Declaration, where: str) -> list[str]:
    left, right = mine["type"], theirs["type"]
    for member in ("length", "count_field"):
        if mine.get(member) != theirs.get(member):
            return [f"{where}: {member} {mine.get(member)} is {theirs.get(member)} there"]
    if isinstance(left, list) and isinstance(right, list) and left[0] == right[0] == "struct":
        return _compare(left[1], right[1], where)
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
