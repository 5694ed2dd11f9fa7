"""Where a source may come back whose connection was lost.

One listener at a time, opened by ``migrate-recover`` and replaced by the next one; nobody
is let in before. It lives as long as the migration, on the event loop.

Reference: stream format 6.6.
"""

import asyncio
import logging

from migrationd.errors import ChannelError, MigrationdError
from migrationd.incoming.channels import IncomingChannels
from migrationd.transport.listen import Listener

log = logging.getLogger(__name__)


class RecoveryDoor:
    """Lets a lost source in again."""

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._opened = asyncio.Event()
        self._error: MigrationdError | None = None

    @property
    def listener(self) -> Listener | None:
        """Where it is awaited; None before ``migrate-recover``."""
        return self._listener

    def open(self, listener: Listener) -> None:
        """Wait for the source here, and nowhere else any more."""
        self.close()
        self._listener = listener
        self._opened.set()

    async def enter(self) -> IncomingChannels:
        """Wait until the source is back; the listener goes with its connections.

        Raises:
            MigrationdError: What :meth:`give_up` was called with.
        """
        while True:
            await self._opened.wait()
            if self._error is not None:
                raise self._error
            listener = self._listener
            assert listener is not None
            channels = IncomingChannels(listener)
            try:
                await channels.accept_first()
            except ChannelError as error:
                channels.close()
                if listener is self._listener:
                    log.warning("recovery: %s; migrate-recover opens another address", error)
                    self.close()
                continue
            self._opened.clear()
            return channels

    def give_up(self, error: MigrationdError) -> None:
        """Nobody who comes in can be of use any more."""
        self._error = error
        self.close()
        self._opened.set()

    def close(self) -> None:
        """Wait for nobody."""
        self._opened.clear()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
