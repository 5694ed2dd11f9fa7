"""Compares two answers to ``query-qmp-schema``, whose type names mean nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

Entity = dict[str, Any]


def named(entities: Sequence[Entity]) -> list[str]:
    """Names of the commands and events."""
    return [item["name"] for item in entities if item["meta-type"] in ("command", "event")]


def differences(ours: Sequence[Entity], theirs: Sequence[Entity], name: str) -> Iterator[str]:
    """How a command or event differs, with every type that it reaches.

    Args:
        ours: Entities of migrationd.
        theirs: Entities of QEMU.
        name: The command or event; both have it.

    Yields:
        ``PATH: +x`` for what only migrationd has, ``PATH: -x`` for what only QEMU has,
        ``PATH: OURS, not THEIRS`` for the rest.
    """
    walk = _Walk({item["name"]: item for item in ours}, {item["name"]: item for item in theirs})
    yield from walk.compare(name, name, name)


class _Walk:
    def __init__(self, ours: dict[str, Entity], theirs: dict[str, Entity]) -> None:
        self._ours = ours
        self._theirs = theirs
        self._seen: set[tuple[str, str]] = set()

    def compare(self, path: str, our_name: str, their_name: str) -> Iterator[str]:
        if (our_name, their_name) in self._seen:
            return
        self._seen.add((our_name, their_name))
        ours, theirs = self._ours[our_name], self._theirs[their_name]
        for key in ("meta-type", "json-type", "tag", "allow-oob", "features"):
            if ours.get(key) != theirs.get(key):
                yield f"{path}: {key} {ours.get(key)}, not {theirs.get(key)}"
        if ours["meta-type"] != theirs["meta-type"]:
            return
        for key, word in (("arg-type", ""), ("ret-type", " returns"), ("element-type", "[]")):
            if key in ours:
                yield from self.compare(path + word, ours[key], theirs[key])
        if ours["meta-type"] == "alternate":
            yield from self._alternate(path, ours, theirs)
            return
        yield from self._listed(path, ours.get("members", []), theirs.get("members", []), "name")
        yield from self._listed(path, ours.get("variants", []), theirs.get("variants", []), "case")

    def _listed(
        self, path: str, ours: list[Entity], theirs: list[Entity], key: str
    ) -> Iterator[str]:
        our_names = [item[key] for item in ours]
        their_names = [item[key] for item in theirs]
        if our_names != their_names and sorted(our_names) == sorted(their_names):
            yield f"{path}: order {our_names}, not {their_names}"
        for name in their_names:
            if name not in our_names:
                yield f"{path}: -{name}"
        for item in ours:
            name = item[key]
            if name not in their_names:
                yield f"{path}: +{name} {' '.join(item.get('features', []))}".rstrip()
                continue
            other = theirs[their_names.index(name)]
            if item.get("features") != other.get("features"):
                yield f"{path}.{name}: features {item.get('features')}, not {other.get('features')}"
            if ("default" in item) != ("default" in other):
                ways = ("optional", "required") if "default" in item else ("required", "optional")
                yield f"{path}.{name}: is {ways[0]}, not {ways[1]}"
            if "type" in item:
                yield from self.compare(f"{path}.{name}", item["type"], other["type"])

    def _alternate(self, path: str, ours: Entity, theirs: Entity) -> Iterator[str]:
        pairs = [[item["type"] for item in side["members"]] for side in (ours, theirs)]
        if len(pairs[0]) != len(pairs[1]):
            yield f"{path}: {len(pairs[0])} alternatives, not {len(pairs[1])}"
            return
        for our_type, their_type in zip(*pairs, strict=True):
            yield from self.compare(path, our_type, their_type)
