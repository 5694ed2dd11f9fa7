"""One client of a monitor: greeting, negotiation, requests and their replies.

Pure: it decides what a request is and what its reply looks like; it performs no
command and knows no socket.

Reference: QEMU's order of checks and texts (requests and negotiation).
"""

from dataclasses import dataclass, field

from migrationd.errors import QMPError

UNSET = object()
"""For a request without ``id``."""

_KNOWN = ("execute", "exec-oob", "arguments", "id")
NEGOTIATE = "qmp_capabilities"


@dataclass(frozen=True, slots=True)
class Request:
    """A well-formed request."""

    command: str
    arguments: dict[str, object] = field(default_factory=dict)
    id: object = UNSET


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

    def __init__(self, version: dict[str, object], offered: tuple[str, ...] = ()) -> None:
        self._version = version
        self._offered = offered
        self.is_negotiated = False

    def greeting(self) -> dict[str, object]:
        """The first message."""
        return {"QMP": {"version": self._version, "capabilities": list(self._offered)}}

    def check_request(self, value: object) -> Request:
        """Check the form of a request.

        Raises:
            RequestError: With QEMU's text, and the id to answer with.
        """
        if not isinstance(value, dict):
            raise RequestError(QMPError("QMP input must be a JSON object"), UNSET)
        request_id = value.get("id", UNSET)

        def refuse(text: str, class_: str = "GenericError") -> RequestError:
            return RequestError(QMPError(text, class_), request_id)

        for key, item in value.items():
            if key in ("execute", "exec-oob") and not isinstance(item, str):
                raise refuse(f"QMP input member '{key}' must be a string")
            if key == "exec-oob" and "execute" not in value:
                raise refuse("QMP input member 'exec-oob' is unexpected")
            if key == "arguments" and not isinstance(item, dict):
                raise refuse("QMP input member 'arguments' must be an object")
            if key not in _KNOWN:
                raise refuse(f"QMP input member '{key}' is unexpected")
        if "execute" in value and "exec-oob" in value:
            raise refuse("QMP input member 'exec-oob' clashes with 'execute'")
        if "execute" not in value:
            raise refuse("QMP input lacks member 'execute'")
        command = value["execute"]
        if not self.is_negotiated and command != NEGOTIATE:
            raise refuse(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if self.is_negotiated and command == NEGOTIATE:
            raise refuse(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        return Request(command, value.get("arguments", {}), request_id)

    def negotiate(self, enable: list[str]) -> None:
        """Finish the negotiation.

        Raises:
            QMPError: A capability is not offered; nothing changes.
        """
        missing = [name for name in enable if name not in self._offered]
        if missing:
            raise QMPError(f"Capability {', '.join(missing)} not available")
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
