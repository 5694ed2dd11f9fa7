"""The release whose monitor is mirrored."""

from migrationd import __version__

VERSION: dict[str, object] = {
    "qemu": {"micro": 0, "minor": 1, "major": 11},
    "package": f"migrationd {__version__}",
}
"""Return value of ``query-version``."""
