"""The one mapping from errors of ours to what a client is told."""

from migrationd.errors import MigrationdError, QMPError


def to_qmp(error: MigrationdError) -> QMPError:
    """Class and text for the client."""
    return error if isinstance(error, QMPError) else QMPError(str(error))
