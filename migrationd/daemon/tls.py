"""TLS of migrations: from parameters and objects to encrypted channels.

Objects are looked up when a connection is made, as at QEMU.
"""

from collections.abc import Awaitable, Callable

from migrationd.errors import MigrationdError
from migrationd.migration.options import MigrationOptions
from migrationd.objects.registry import ObjectRegistry
from migrationd.transport.address import Address, InetAddress, describe
from migrationd.transport.channel import Channel
from migrationd.transport.listen import Listener

OpenChannel = Callable[[], Awaitable[Channel]]


class MigrationTls:
    """Encrypts what ``tls-creds`` says.

    Args:
        options: Where ``tls-creds``, ``tls-hostname`` and ``tls-authz`` are.
        objects: Where credentials and authorization are.
    """

    def __init__(self, options: MigrationOptions, objects: ObjectRegistry) -> None:
        self._options = options
        self._objects = objects

    def outgoing(self, open_channel: OpenChannel, address: Address) -> OpenChannel:
        """What opens a connection of an outgoing migration, encrypted if that is asked for."""
        credentials = self._text("tls-creds")
        if credentials is None:
            return open_channel
        host = self._text("tls-hostname")

        async def open_encrypted() -> Channel:
            # Imported where it is used: most migrations have no TLS.
            from migrationd.transport.tls import start_tls_client

            tls = self._objects.tls_client(credentials, host)
            own = address.host if isinstance(address, InetAddress) else None
            return await start_tls_client(await open_channel(), tls, own, describe(address))

        return open_encrypted

    def incoming(self, listener: Listener) -> Listener:
        """Let connections of a listener be encrypted if that is asked for when they come."""
        listener.secure = self._secure
        return listener

    async def _secure(self, channel: Channel) -> Channel:
        credentials = self._text("tls-creds")
        if credentials is None:
            return channel
        from migrationd.transport.tls import start_tls_server

        try:
            tls = self._objects.tls_server(credentials, self._text("tls-authz"))
        except MigrationdError:
            channel.close()
            raise
        return await start_tls_server(channel, tls, channel.peer_text())

    def _text(self, name: str) -> str | None:
        value = self._options.parameters[name]
        return str(value) if value else None
