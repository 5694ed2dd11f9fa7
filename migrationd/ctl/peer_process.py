"""A child process with a QMP monitor: what QEMU and migrationd have in common.

Everything of one process lives in a directory of its own under the system's temporary
directory (socket paths are short on purpose); ``close`` removes it.
"""

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from qemu.qmp import ConnectError, EventListener, Message, QMPClient, QMPError

from migrationd.errors import MigrationdError

FINAL_STATUSES = ("completed", "failed", "cancelled", "postcopy-paused")
"""Values of ``query-migrate``'s status at which a migration does not go on by itself."""

DEFAULT_TIMEOUT_S = 30.0
_POLL_S = 0.005


class PeerError(MigrationdError):
    """A child process did not do what was expected; the text says what it printed."""


class PeerProcess:
    """A running child process and its QMP connection.

    All methods run on the event loop that started the process.

    Attributes:
        directory: The process's own directory.
        qmp: The connected client.
        events: Every event so far, in order.
    """

    def __init__(self, name: str, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.directory = directory
        self.qmp = QMPClient(name)
        self.qmp.logger.setLevel(logging.CRITICAL)
        self.events: list[Message] = []
        self._process = process
        self._listener = EventListener()
        self._arrived = asyncio.Condition()
        self._collector: asyncio.Task[None] | None = None

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        *,
        name: str,
        directory: Path,
        pass_fds: Sequence[int] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Start a process which listens on ``DIRECTORY/qmp.sock``, and negotiate.

        Args:
            command: Program and arguments.
            name: How messages call it.
            directory: Its own directory, made by ``make_directory``; removed by ``close``.
            pass_fds: Descriptors that it inherits.
            timeout_s: How long its monitor may take to answer.
            environment: Environment, or None for ours.

        Raises:
            PeerError: It could not be started, ended, or did not answer in time.
        """
        try:
            with (directory / "stderr").open("wb") as stderr:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    pass_fds=pass_fds,
                    env=environment,
                )
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise PeerError(f"{name} cannot be started: {error}") from error
        peer = cls(name, directory, process)
        try:
            await peer._connect(timeout_s)
        except BaseException:
            await peer.close()
            raise
        return peer

    @staticmethod
    def make_directory() -> Path:
        """Make a directory with a short path, for one process."""
        return Path(tempfile.mkdtemp(prefix="migrationd-"))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal, or None while it runs."""
        return self._process.returncode

    @property
    def qmp_path(self) -> Path:
        """The monitor's socket."""
        return self.directory / "qmp.sock"

    @property
    def stderr(self) -> str:
        """What the process printed so far, without the serial port."""
        return (self.directory / "stderr").read_text(errors="replace")

    async def _connect(self, timeout_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            if self.returncode is not None:
                raise self._ended()
            if self.qmp_path.exists():
                try:
                    await self.qmp.connect(str(self.qmp_path))
                    break
                except ConnectError as error:
                    refused = isinstance(error.exc, OSError)
                    if not refused or asyncio.get_running_loop().time() > deadline:
                        raise PeerError(f"{self.name}: {error}; {self.stderr}") from error
            elif asyncio.get_running_loop().time() > deadline:
                raise PeerError(f"{self.name} has no monitor after {timeout_s} s: {self.stderr}")
            await asyncio.sleep(_POLL_S)
        self.qmp.register_listener(self._listener)
        self._collector = asyncio.create_task(self._collect())

    def _ended(self) -> PeerError:
        return PeerError(f"{self.name} ended with status {self.returncode}: {self.stderr.strip()}")

    async def _collect(self) -> None:
        async for event in self._listener:
            async with self._arrived:
                self.events.append(event)
                self._arrived.notify_all()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a QMP command and return its value.

        Raises:
            qemu.qmp.ExecuteError: The command was refused; its text says why.
        """
        return await self.qmp.execute(command, arguments)

    async def query(self, command: str) -> dict[str, object]:
        """Execute a command that returns an object."""
        value = await self.execute(command)
        assert isinstance(value, dict)
        return value

    async def query_migrate(self) -> dict[str, object]:
        """Return ``query-migrate``'s object."""
        return await self.query("query-migrate")

    async def run_state(self) -> str:
        """Return ``query-status``'s run state."""
        return str((await self.query("query-status"))["status"])

    async def set_capabilities(self, capabilities: Mapping[str, bool]) -> None:
        """Set migration capabilities by name."""
        states = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await self.execute("migrate-set-capabilities", {"capabilities": states})

    async def set_parameters(self, parameters: Mapping[str, object]) -> None:
        """Set migration parameters by name."""
        await self.execute("migrate-set-parameters", parameters)

    async def wait_event(
        self,
        name: str,
        *,
        matching: Callable[[Mapping[str, object]], bool] = lambda _data: True,
        since: int = 0,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Message:
        """Wait for an event; one that came already counts.

        Args:
            name: Event name.
            matching: Says of the event's data whether it is the one.
            since: Index in ``events`` of the first that counts.
            timeout_s: How long to wait.

        Raises:
            PeerError: It did not come in time, or the process ended.
        """

        def find() -> Message | None:
            for event in self.events[since:]:
                if event["event"] == name and matching(_object(event.get("data", {}))):
                    return event
            return None

        async def wait() -> Message:
            async with self._arrived:
                while (event := find()) is None:
                    await self._arrived.wait()
                return event

        try:
            return await asyncio.wait_for(wait(), timeout_s)
        except TimeoutError:
            seen = [str(event["event"]) for event in self.events[since:]]
            raise PeerError(f"{self.name}: no {name} in {timeout_s} s; came: {seen}") from None

    async def wait_migration(
        self, *statuses: str, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> dict[str, object]:
        """Poll ``query-migrate`` until it has one of these statuses.

        Args:
            statuses: Statuses to wait for; ``completed`` when none is named.
            timeout_s: How long to wait.

        Returns:
            The last ``query-migrate``.

        Raises:
            PeerError: Another final status came, or none in time.
        """
        wanted = statuses or ("completed",)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                info = await self.query_migrate()
            except (QMPError, EOFError) as error:
                if self.returncode is not None:
                    raise self._ended() from error
                raise
            status = str(info.get("status", "none"))
            if status in wanted:
                return info
            late = asyncio.get_running_loop().time() > deadline
            if late or status in FINAL_STATUSES:
                raise PeerError(
                    f"{self.name}: migration is '{status}', expected {' or '.join(wanted)}"
                    f": {info.get('error-desc', info)} {self.stderr.strip()}"
                )
            await asyncio.sleep(_POLL_S)

    async def wait_run_state(self, *states: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
        """Poll ``query-status`` until it is one of these run states.

        Raises:
            PeerError: It is not, in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (state := await self.run_state()) not in states:
            if asyncio.get_running_loop().time() > deadline:
                raise PeerError(f"{self.name}: run state is '{state}', expected {states}")
            await asyncio.sleep(_POLL_S)
        return state

    async def wait_exit(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Wait until the process has ended and return its exit status."""
        try:
            return await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            raise PeerError(f"{self.name} has not ended after {timeout_s} s") from None

    async def listening_uri(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
        """Return the ``tcp:`` URI on which an incoming migration with port 0 listens.

        Raises:
            PeerError: ``query-migrate`` shows no inet address in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            info = await self.query_migrate()
            for address in _list(info.get("socket-address")):
                entry = _object(address)
                if entry.get("type") == "inet":
                    return f"tcp:{entry['host']}:{entry['port']}"
            if asyncio.get_running_loop().time() > deadline:
                raise PeerError(f"{self.name} does not say where it listens: {info}")
            await asyncio.sleep(_POLL_S)

    async def quit(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Ask the process to end (QMP ``quit``) and return its exit status."""
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self.execute("quit")
        return await self.wait_exit(timeout_s)

    async def kill(self) -> None:
        """Kill the process as ``kill -9`` does, and wait."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def close(self) -> None:
        """Kill the process and remove its directory; may be called again."""
        await self.kill()
        if self._collector is not None:
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self.qmp.disconnect()
        shutil.rmtree(self.directory, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
