"""A QMP connection for one command of ``migrationctl``, to migrationd or to QEMU."""

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from migrationd import units
from migrationd.errors import MigrationdError

CONNECT_TIMEOUT_S = 5.0

_BYTES = re.compile(r"(?<=[kmgtpe])i?b$", re.IGNORECASE)


class ClientError(MigrationdError):
    """What a person is told when a monitor cannot be used."""


class Monitor:
    """A connected monitor."""

    def __init__(self, client: QMPClient, address: str) -> None:
        self._client = client
        self._address = address

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, oob: bool = False
    ) -> object:
        """Execute one command and return its value.

        Args:
            command: QMP name.
            arguments: Its arguments.
            oob: Out of band: it is not kept waiting by a command or a guest that hangs.

        Raises:
            ClientError: The command was refused, or the connection ended.
        """
        try:
            return await self._client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            raise ClientError(str(error)) from error
        except (QMPError, EOFError, OSError) as error:
            raise ClientError(f"{self._address}: the connection ended") from error

    async def query(self, command: str) -> dict[str, object]:
        """Execute a command that returns an object."""
        value = await self.execute(command)
        return value if isinstance(value, dict) else {}

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        """Set migration capabilities by name."""
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await self.execute("migrate-set-capabilities", {"capabilities": states})

    def listening(self, *names: str) -> contextlib.AbstractContextManager[EventListener]:
        """Collect events of these names for the length of a block."""
        return self._client.listener(names)

    async def query_migrate(self) -> dict[str, object]:
        """Return ``query-migrate``'s object."""
        return await self.query("query-migrate")


@contextlib.asynccontextmanager
async def connected(address: str, timeout_s: float = CONNECT_TIMEOUT_S) -> AsyncIterator[Monitor]:
    """Connect to a monitor for the length of a block.

    Args:
        address: Path of a UNIX socket (``unix:PATH`` as well), or ``HOST:PORT``
            (``tcp:HOST:PORT`` as well).
        timeout_s: How long connecting and negotiating may take.

    Raises:
        ClientError: Nobody answers there, or not in QMP.
    """
    client = QMPClient("migrationctl")
    client.logger.setLevel(logging.CRITICAL)
    try:
        await asyncio.wait_for(client.connect(parse_address(address)), timeout_s)
    except TimeoutError:
        raise ClientError(
            f"{address}: no QMP greeting within {timeout_s:.0f} s; "
            "a monitor serves one client at a time: is another one connected?"
        ) from None
    except QMPError as error:
        cause = getattr(error, "exc", None)
        reason = str(error)
        if isinstance(cause, socket.gaierror):
            reason = cause.strerror or reason
        elif isinstance(cause, OSError) and cause.errno:
            reason = os.strerror(cause.errno)  # shorter than the event loop's text
        raise ClientError(f"cannot connect to {address}: {reason}") from error
    try:
        yield Monitor(client, address)
    finally:
        with contextlib.suppress(QMPError, EOFError, OSError):
            await client.disconnect()


def parse_address(text: str) -> str | tuple[str, int]:
    """Tell a socket's path from a host and port.

    Raises:
        ClientError: A ``tcp:`` address without a port, or with one that is none.
    """
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    found = re.fullmatch(r"(?:tcp:)?(\[[^]]+]|[^:/\[\]]+):(\d{1,5})", text)
    if found is not None:
        port = units.parse_whole(found[2], units.PORT_MAX)
        if port is None:
            raise ClientError(f"'{text}': ports go up to {units.PORT_MAX}")
        return found[1].strip("[]"), port
    if text.startswith("tcp:"):
        raise ClientError(f"'{text}' is not tcp:HOST:PORT")
    return text


def parse_size(text: str) -> int:
    """Read a size such as ``64M``, ``1.5G`` or ``1000``, in bytes.

    Raises:
        ClientError: It is none.
    """
    try:
        return units.parse_size(_BYTES.sub("", text))
    except (ValueError, OverflowError):
        raise ClientError(f"'{text}' is not a size: write for example 64M or 1.5G") from None
