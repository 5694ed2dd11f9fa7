"""pydantic without plugins.

When pydantic builds its first model it looks for plugins among all installed packages, and
imports parsers of e-mail, CSV and archives for that: 2 MB, while the first command waits.
"""

import sys
from types import ModuleType

LOADER = "pydantic.plugin._loader"


def forgo_plugins() -> None:
    """Say that there are none, for this process; before the first model is used.

    Does nothing where pydantic has loaded them, or keeps its loader elsewhere.
    """
    loader = ModuleType(LOADER)
    loader.get_plugins = tuple  # type: ignore[attr-defined]
    sys.modules.setdefault(LOADER, loader)
