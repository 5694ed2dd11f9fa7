"""The parameter ``block-bitmap-mapping``: under which names dirty bitmaps travel.

Reference: QEMU's checks of the mapping and their texts; names are at most 255 bytes in
the stream.
"""

import re
from dataclasses import dataclass

from migrationd.errors import QMPError

NAME_LIMIT_BYTES = 255

_WELL_FORMED = re.compile(r"[A-Za-z][-._A-Za-z0-9]*+")


@dataclass(frozen=True, slots=True)
class BitmapAlias:
    """A bitmap and its name in the stream.

    Attributes:
        name: Name of the bitmap here.
        alias: Name in the stream.
        persistent: Whether the destination keeps it; None: as it is at the source.
        has_transform: Whether a ``transform`` was given, even an empty one.
    """

    name: str
    alias: str
    persistent: bool | None = None
    has_transform: bool = False


@dataclass(frozen=True, slots=True)
class NodeAlias:
    """A block node, its name in the stream and its bitmaps."""

    node_name: str
    alias: str
    bitmaps: tuple[BitmapAlias, ...]


BitmapMapping = tuple[NodeAlias, ...]


def check_mapping(mapping: BitmapMapping) -> None:
    """Each name and each alias may occur once.

    Raises:
        QMPError: With QEMU's text.
    """
    text = _problem(mapping)
    if text is not None:
        raise QMPError(f"Invalid mapping given for block-bitmap-mapping: {text}")


def _problem(mapping: BitmapMapping) -> str | None:
    names: set[str] = set()
    aliases: set[str] = set()
    for node in mapping:
        if not _WELL_FORMED.fullmatch(node.alias):
            return f"The node alias '{node.alias}' is not well-formed"
        if _is_long(node.alias):
            return f"The node alias '{node.alias}' is longer than {NAME_LIMIT_BYTES} bytes"
        if node.node_name in names:
            return f"The node name '{node.node_name}' is mapped twice"
        if node.alias in aliases:
            return f"The node alias '{node.alias}' is used twice"
        names.add(node.node_name)
        aliases.add(node.alias)
        text = _bitmap_problem(node)
        if text is not None:
            return text
    return None


def _bitmap_problem(node: NodeAlias) -> str | None:
    names: set[str] = set()
    aliases: set[str] = set()
    for bitmap in node.bitmaps:
        if _is_long(bitmap.alias):
            return (
                f"The bitmap alias '{node.alias}'/'{bitmap.alias}' is longer than "
                f"{NAME_LIMIT_BYTES} bytes"
            )
        if bitmap.name in names:
            return f"The bitmap '{node.node_name}'/'{bitmap.name}' is mapped twice"
        if bitmap.alias in aliases:
            return f"The bitmap alias '{node.alias}'/'{bitmap.alias}' is used twice"
        names.add(bitmap.name)
        aliases.add(bitmap.alias)
    return None


def _is_long(alias: str) -> bool:
    return len(alias.encode()) > NAME_LIMIT_BYTES
