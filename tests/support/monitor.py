"""A monitor without sockets: bytes in, replies out."""

import json

from migrationd.errors import QMPError
from migrationd.qmp.context import Control
from migrationd.qmp.dispatch import answer
from migrationd.qmp.fds import FdTable, PassedFds, RequestFds
from migrationd.qmp.json_reader import JsonError, JsonReader
from migrationd.qmp.message import Json
from migrationd.qmp.session import OOB, UNSET, Session, failure
from migrationd.qmp.version import VERSION


class Monitor:
    """One client's reader and session over a control.

    Args:
        control: What performs commands.
    """

    def __init__(self, control: Control) -> None:
        self.control = control
        self.session = Session(VERSION, (OOB,))
        self.reader = JsonReader()
        self.fds = FdTable()

    async def feed(self, data: bytes) -> list[dict[str, object]]:
        """Replies to what is complete now, in order."""
        replies = []
        for item in self.reader.feed(data):
            if isinstance(item, JsonError):
                replies.append(failure(UNSET, QMPError(item.text)))
                continue
            fds = RequestFds(self.fds, PassedFds([]))
            reply = answer(self.control, item.value, self.session, fds)
            if not isinstance(reply, dict):
                reply = await reply
            if isinstance(value := reply.get("return"), Json):
                reply["return"] = json.loads(value.text)
            replies.append(reply)
        return replies
