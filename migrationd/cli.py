"""The ``migrationd`` program: arguments, logging, exit status.

Exit status: 0 after ``quit`` or SIGTERM, 1 after a fatal error, 2 for a usage error.
"""

import gc
import sys
from collections.abc import Sequence

from migrationd import __version__
from migrationd.config import DaemonConfig, load_config, split_arguments, usage
from migrationd.errors import ConfigError, MigrationdError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon until it ends.

    Args:
        arguments: Words after the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        values = split_arguments(words)
        if "help" in values:
            print(usage())  # noqa: T201
            return 0
        if "version" in values:
            print(f"migrationd {__version__}")  # noqa: T201
            return 0
        config = load_config(words)
    except ConfigError as error:
        return _die(error, 2)
    return _serve(config)


def _serve(config: DaemonConfig) -> int:
    # Until the daemon is up nothing becomes garbage to speak of; it collects once, then.
    gc.disable()
    import uvloop

    from migrationd.daemon.app import Daemon
    from migrationd.tracing import configure_logging

    configure_logging(config.log_level, config.log_format)
    try:
        daemon = Daemon(config)
        return uvloop.run(daemon.run())
    except ConfigError as error:
        return _die(error, 2)
    except MigrationdError as error:
        return _die(error, 1)
    except KeyboardInterrupt:
        return 0


def _die(error: Exception, status: int) -> int:
    print(f"migrationd: {error}", file=sys.stderr)  # noqa: T201
    return status
