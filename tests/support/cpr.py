"""Channels of cpr-transfer for tests."""

import json
from pathlib import Path

CprChannel = dict[str, object]


def channel(kind: str, path: Path) -> CprChannel:
    """One MigrationChannel to a unix socket."""
    return {
        "channel-type": kind,
        "addr": {"transport": "socket", "type": "unix", "path": str(path)},
    }


def incoming_arguments(path: Path) -> list[str]:
    """What a destination is started with besides its main channel."""
    return ["-incoming", json.dumps(channel("cpr", path))]
