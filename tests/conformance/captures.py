"""The recorded QEMU streams and what their manifest says about them."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).with_name("captures")


@dataclass(frozen=True)
class Capture:
    """One recorded connection and direction, or file.

    Attributes:
        scenario: The manifest's entry of the migration it belongs to.
        entry: The manifest's entry of the file.
    """

    scenario: dict[str, Any]
    entry: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.entry["file"]).removesuffix(".bin.gz")

    @property
    def version(self) -> str:
        return str(self.scenario["qemu"])

    @property
    def kind(self) -> str:
        """What it holds; ``return path`` for what the destination sent."""
        if self.entry["direction"] == "destination-to-source":
            return "return path" if "messages" in self.entry else "COLO return path"
        return str(self.entry["kind"])

    @property
    def is_colo(self) -> bool:
        return "x-colo" in self.scenario["capabilities"]

    @property
    def is_mapped_ram(self) -> bool:
        return "mapped-ram" in self.scenario["capabilities"]

    @property
    def is_complete(self) -> bool:
        return bool(self.entry.get("complete"))

    @property
    def oracle(self) -> dict[str, Any] | None:
        """Hash of the source's memory, if this file alone must reproduce it.

        multifd, preempt and recovery connections carry pages of their own; 11.1 loses dirty
        pages with ``postcopy-ram`` on; a shared or transferred block is not in the stream.
        """
        capabilities = set(self.scenario["capabilities"])
        if (
            len([f for f in self.scenario["files"] if f["direction"] != "destination-to-source"])
            > 1
            or (self.version == "11.1" and "postcopy-ram" in capabilities)
            or capabilities & {"x-ignore-shared", "x-colo", "mapped-ram"}
            or self.scenario["source_status"] != "completed"
        ):
            return None
        found: dict[str, Any] | None = self.scenario.get("ram_oracle")
        return found

    def data(self) -> bytes:
        """The bytes as they were on the wire, checked against the manifest."""
        data = gzip.decompress((DIRECTORY / self.entry["file"]).read_bytes())
        assert hashlib.sha256(data).hexdigest() == self.entry["sha256"]
        return data[self.entry.get("stream_offset", 0) :]


@cache
def all_captures() -> tuple[Capture, ...]:
    """Every file of the manifest, in its order."""
    manifest = json.loads((DIRECTORY / "manifest.json").read_text())
    return tuple(_captures(manifest))


def captures(kind: str) -> list[Capture]:
    """The files of one kind."""
    return [capture for capture in all_captures() if capture.kind == kind]


def _captures(manifest: dict[str, Any]) -> Iterator[Capture]:
    for scenario in manifest["captures"]:
        for entry in scenario["files"]:
            yield Capture(scenario, entry)
