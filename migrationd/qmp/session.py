"""One client of a monitor: greeting, negotiation, requests and their replies.

Pure: it decides what a request is and what its reply looks like; it performs no
command and knows no socket.

Reference: QEMU's order of checks and texts (requests and negotiation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from migrationd.errors import QMPError
from migrationd.qmp.json_reader import JsonValue

UNSET = object()
"""For a request without ``id``."""

NEGOTIATE = "qmp_capabilities"
OOB = "oob"
"""The capability that allows ``exec-oob``."""

_IN_BAND = "execute"
_OUT_OF_BAND = "exec-oob"


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request.

    Attributes:
        command: Name of the command.
        arguments: Its arguments, unchecked.
        id: What the client wants back, or ``UNSET``.
        is_oob: Whether it overtakes commands that wait.
    """

    command: str
    arguments: dict[str, object] = field(default_factory=dict)
    id: object = UNSET
    is_oob: bool = False


class RequestError(Exception):
    """A request that is refused before any command runs."""

    def __init__(self, error: QMPError, request_id: object) -> None:
        super().__init__(error.desc)
        self.error = error
        self.id = request_id


class Session:
    """Negotiation state of one connection.

    Args:
        version: Return value of ``query-version``.
        offered: Capabilities that the greeting offers.
    """

    def __init__(self, version: Mapping[str, object], offered: Sequence[str] = ()) -> None:
        self._version = version
        self._offered = tuple(offered)
        self._allows_oob = False
        self.is_negotiated = False

    @property
    def allows_oob(self) -> bool:
        """Whether the client has enabled out-of-band execution."""
        return self._allows_oob

    def greeting(self) -> dict[str, object]:
        """The first message."""
        return {"QMP": {"version": self._version, "capabilities": list(self._offered)}}

    def is_oob(self, item: object) -> bool:
        """Whether what the reader found overtakes others; to be asked when it has been read."""
        value = item.value if isinstance(item, JsonValue) else None
        return self.allows_oob and isinstance(value, dict) and _OUT_OF_BAND in value

    def check_request(self, value: object) -> Request:
        """Check the form of a request.

        Raises:
            RequestError: With QEMU's text, and the id to answer with.
        """
        if not isinstance(value, dict):
            raise RequestError(QMPError("QMP input must be a JSON object"), UNSET)
        request_id = value.get("id", UNSET)
        try:
            command = self._check_members(value)
            self._check_phase(command)
        except QMPError as error:
            raise RequestError(error, request_id) from None
        return Request(command, value.get("arguments", {}), request_id, _OUT_OF_BAND in value)

    def _check_members(self, value: dict[str, object]) -> str:
        command = ""
        for key, item in value.items():
            if key in (_IN_BAND, _OUT_OF_BAND):
                if not isinstance(item, str):
                    raise QMPError(f"QMP input member '{key}' must be a string")
                if key == _OUT_OF_BAND and not self.allows_oob:
                    raise QMPError("QMP input member 'exec-oob' is unexpected")
                command = item
            elif key == "arguments":
                if not isinstance(item, dict):
                    raise QMPError("QMP input member 'arguments' must be an object")
            elif key != "id":
                raise QMPError(f"QMP input member '{key}' is unexpected")
        if _IN_BAND in value and _OUT_OF_BAND in value:
            raise QMPError("QMP input member 'execute' clashes with 'exec-oob'")
        if _IN_BAND not in value and _OUT_OF_BAND not in value:
            raise QMPError("QMP input lacks member 'execute'")
        return command

    def _check_phase(self, command: str) -> None:
        if not self.is_negotiated and command != NEGOTIATE:
            raise QMPError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if self.is_negotiated and command == NEGOTIATE:
            raise QMPError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )

    def negotiate(self, enable: Sequence[str]) -> None:
        """Finish the negotiation.

        Raises:
            QMPError: A capability is not offered; nothing changes.
        """
        missing = [name for name in enable if name not in self._offered]
        if missing:
            raise QMPError(f"Capability {', '.join(missing)} not available")
        self._allows_oob = OOB in enable
        self.is_negotiated = True


def success(request_id: object, value: object) -> dict[str, object]:
    """A success reply."""
    reply: dict[str, object] = {"return": value}
    if request_id is not UNSET:
        reply["id"] = request_id
    return reply


def failure(request_id: object, error: QMPError) -> dict[str, object]:
    """An error reply."""
    reply: dict[str, object] = {} if request_id is UNSET else {"id": request_id}
    reply["error"] = {"class": error.class_, "desc": error.desc}
    return reply
