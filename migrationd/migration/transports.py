"""Which transports can carry what is switched on.

Reference: QEMU's check of ``migrate`` and ``migrate-incoming`` before anything is opened,
its order and its texts.
"""

from collections.abc import Mapping

from migrationd.errors import QMPError
from migrationd.migration.parameters import Value
from migrationd.transport.address import Address, ExecAddress, FdAddress, FileAddress, RdmaAddress

_SINGLE = (ExecAddress, FdAddress, RdmaAddress)


def check_transport(
    address: Address, capabilities: Mapping[str, bool], parameters: Mapping[str, Value]
) -> None:
    """Check an address against the settings.

    Args:
        address: Of the main connection.
        capabilities: Every capability.
        parameters: Every parameter.

    Raises:
        QMPError: The transport cannot carry it.
    """
    is_file = isinstance(address, FileAddress)
    if capabilities["mapped-ram"] and not is_file:
        raise QMPError("Migration requires seekable transport (e.g. file)")
    if capabilities["multifd"] or capabilities["postcopy-preempt"]:
        is_single = isinstance(address, _SINGLE) or (is_file and not capabilities["mapped-ram"])
        if is_single:
            raise QMPError("Migration requires multi-channel URIs (e.g. tcp)")
    if capabilities["multifd"] and parameters["direct-io"] and not is_file:
        raise QMPError("Migration requires a transport that allows for extra fds (e.g. file)")
    if capabilities["mapped-ram"] and parameters["tls-creds"]:
        raise QMPError("Cannot use TLS with mapped-ram")
