"""A key-value server that speaks RESP and whose data lives in guest memory.

    python examples/kvstore.py SOCKET [--port 6380] [--mib 64]

Any RESP client talks to it: ``redis-cli -p 6380 set a 1``. The data is a log of records in
one RAM block, found by an index in ordinary memory; the end of the log is a device's
state. A destination rebuilds the index from the memory that arrived.

An acknowledged write is in the log, and the log migrates. When the server is stopped it
closes its connections and its port: clients connect again, to it or to its destination.
"""

import argparse
import asyncio
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator

from migrationd.workload import VMState, Workload, u64

RECORD = struct.Struct("<II")
DELETED = 0xFFFFFFFF
MAX_KEY_BYTES = 64 << 10
MAX_VALUE_BYTES = 16 << 20
MAX_ARGUMENTS = 1024
MAX_PENDING_BYTES = 64 << 20


class CommandError(Exception):
    """What a client is told."""


class Store:
    """A log of records in a block of memory.

    Args:
        memory: The block.

    Attributes:
        end: Where the next record goes; travels as a device's state.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._index: dict[bytes, tuple[int, int]] = {}
        self._live_bytes = 0
        self.end = 0

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: bytes) -> bytes | None:
        """Value of a key."""
        place = self._index.get(key)
        return None if place is None else self._memory[place[0] : place[0] + place[1]]

    def set(self, key: bytes, value: bytes) -> None:
        """Write a record.

        Raises:
            CommandError: There is no room.
        """
        if len(key) > MAX_KEY_BYTES or len(value) > MAX_VALUE_BYTES:
            raise CommandError("ERR key or value is too long")
        self._make_room(RECORD.size + len(key) + len(value))
        self._append(key, value)

    def delete(self, key: bytes) -> bool:
        """Write that a key is gone."""
        place = self._index.pop(key, None)
        if place is None:
            return False
        self._live_bytes -= RECORD.size + len(key) + place[1]
        if self.end + RECORD.size + len(key) <= len(self._memory):
            self._write(RECORD.pack(len(key), DELETED) + key)
        else:
            self._compact()
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._index.clear()
        self._live_bytes = self.end = 0

    def rebuild(self) -> None:
        """Make the index of what is in memory."""
        self._index.clear()
        self._live_bytes = 0
        for key, at, length in self._records():
            old = self._index.pop(key, None)
            if old is not None:
                self._live_bytes -= RECORD.size + len(key) + old[1]
            if length != DELETED:
                self._index[key] = at, length
                self._live_bytes += RECORD.size + len(key) + length

    def _records(self) -> Iterator[tuple[bytes, int, int]]:
        at = 0
        while at < self.end:
            key_bytes, value_bytes = RECORD.unpack_from(self._memory, at)
            begin = at + RECORD.size + key_bytes
            yield self._memory[at + RECORD.size : begin], begin, value_bytes
            at = begin + (0 if value_bytes == DELETED else value_bytes)

    def _make_room(self, needed: int) -> None:
        if self.end + needed <= len(self._memory):
            return
        if self._live_bytes + needed > len(self._memory):
            raise CommandError("OOM the block is full")
        self._compact()

    def _compact(self) -> None:
        """Write what the index has, and nothing else."""
        kept = [(key, self.get(key) or b"") for key in self._index]
        self.clear()
        for key, value in kept:
            self._append(key, value)

    def _append(self, key: bytes, value: bytes) -> None:
        old = self._index.get(key)
        if old is not None:
            self._live_bytes -= RECORD.size + len(key) + old[1]
        self._write(RECORD.pack(len(key), len(value)) + key + value)
        self._index[key] = self.end - len(value), len(value)
        self._live_bytes += RECORD.size + len(key) + len(value)

    def _write(self, record: bytes) -> None:
        self._memory[self.end : self.end + len(record)] = record
        self.end += len(record)


STATE = VMState("kvstore", fields=(u64("end"),))


def execute(store: Store, words: list[bytes]) -> bytes:
    """Perform a command; its reply."""
    name, arguments = words[0].upper(), words[1:]
    match name, len(arguments):
        case b"PING", 0:
            return b"+PONG\r\n"
        case b"GET", 1:
            return bulk(store.get(arguments[0]))
        case b"SET", 2:
            store.set(arguments[0], arguments[1])
            return b"+OK\r\n"
        case b"INCR", 1:
            try:
                value = int(store.get(arguments[0]) or b"0") + 1
            except ValueError:
                raise CommandError("ERR value is not an integer") from None
            store.set(arguments[0], b"%d" % value)
            return b":%d\r\n" % value
        case b"DEL", count if count:
            return b":%d\r\n" % sum([store.delete(key) for key in arguments])
        case b"EXISTS", 1:
            return b":%d\r\n" % (store.get(arguments[0]) is not None)
        case b"DBSIZE", 0:
            return b":%d\r\n" % len(store)
        case b"FLUSHALL", 0:
            store.clear()
            return b"+OK\r\n"
        case b"CONFIG", 2 if arguments[0].upper() == b"GET":
            return b"*2\r\n" + bulk(arguments[1]) + bulk(b"")  # asked for by redis-benchmark
        case b"COMMAND" | b"CONFIG", _:
            return b"*0\r\n"
    raise CommandError(f"ERR unknown command or arguments: {name.decode('latin-1')[:64]}")


def bulk(value: bytes | None) -> bytes:
    """A RESP bulk string."""
    return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)


def parse(data: bytearray) -> tuple[list[bytes], int] | None:
    """The first command in the input, and its length; None if it is not complete.

    Raises:
        CommandError: The input is no command.
    """
    line_end = data.find(b"\r\n")
    if line_end < 0:
        if len(data) > MAX_KEY_BYTES:
            raise CommandError("ERR Protocol error: too long a line")
        return None
    if data[:1] != b"*":
        return bytes(data[:line_end]).split() or [b"PING"], line_end + 2
    count = _number(data[1:line_end], MAX_ARGUMENTS)
    if not count:
        raise CommandError("ERR Protocol error: an empty command")
    at = line_end + 2
    words = []
    for _ in range(count):
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            return None
        if data[at : at + 1] != b"$":
            raise CommandError("ERR Protocol error: expected '$'")
        length = _number(data[at + 1 : line_end], MAX_VALUE_BYTES)
        at = line_end + 2 + length + 2
        if len(data) < at:
            return None
        words.append(bytes(data[line_end + 2 : at - 2]))
    return words, at


def _number(digits: bytearray, limit: int) -> int:
    if not digits.isdigit() or len(digits) > 10 or int(digits) > limit:
        raise CommandError("ERR Protocol error: invalid length")
    return int(digits)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._data = bytearray()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """A client says something."""
        self._data += data
        self._serve()

    def _serve(self) -> None:
        """Perform what is complete; a server that was stopped answers nothing any more."""
        workload = self._server.workload
        if rest_s := workload.rest_s:
            # Throttled, so that its memory can be sent: its clients wait.
            self.transport.pause_reading()
            asyncio.get_running_loop().call_later(rest_s, self._go_on)
            return
        if not workload.try_enter():
            self.transport.abort()
            return
        try:
            replies = b"".join(self._perform())
        finally:
            workload.leave()
        self.transport.write(replies)
        if len(self._data) > MAX_PENDING_BYTES:
            self.transport.abort()

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._serve()

    def _perform(self) -> Iterator[bytes]:
        while self._data:
            try:
                parsed = parse(self._data)
            except CommandError as error:
                self._data.clear()
                yield b"-%b\r\n" % str(error).encode()
                self.transport.close()
                return
            if parsed is None:
                return
            words, length = parsed
            del self._data[:length]
            try:
                yield execute(self._server.store, words)
            except CommandError as error:
                yield b"-%b\r\n" % str(error).encode()


class Server:
    """The server: its port is open while the workload runs.

    Args:
        port: On the loopback interface.
        memory_bytes: Size of the block.
    """

    def __init__(self, port: int, memory_bytes: int) -> None:
        self._port = port
        self._loop: asyncio.AbstractEventLoop
        self._listener: asyncio.Server | None = None
        self.connections: set[Connection] = set()
        self.workload = Workload(
            "kvstore",
            on_loaded=lambda: self.store.rebuild(),
            on_stopped=lambda: self._in_loop(self._close),
            on_started=lambda: self._in_loop(self._open),
        )
        self.store = Store(self.workload.add_block("heap", memory_bytes))
        self.workload.add_device(STATE, self.store)

    async def run(self, guest_socket: str) -> None:
        """Serve until the daemon says quit."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.workload.attach, guest_socket)
        if self.workload.is_running:
            await self._open()
        await asyncio.Event().wait()

    def _in_loop(self, call: "Callable[[], object]") -> None:
        """Let the event loop do it, and wait: nothing is acknowledged after this."""
        done = threading.Event()

        async def perform() -> None:
            try:
                result = call()
                if asyncio.iscoroutine(result):
                    await result
            finally:
                done.set()

        asyncio.run_coroutine_threadsafe(perform(), self._loop)
        done.wait()

    async def _open(self) -> None:
        while self._listener is None and self.workload.is_running:
            try:
                self._listener = await self._loop.create_server(
                    lambda: Connection(self), "127.0.0.1", self._port, reuse_address=True
                )
            except OSError:  # another server is just leaving this port
                await asyncio.sleep(0.005)

    async def _close(self) -> None:
        for connection in list(self.connections):
            connection.transport.abort()
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description="a RESP server whose memory migrates")
    parser.add_argument("socket", help="the daemon's guest socket")
    parser.add_argument("--port", type=int, default=6380)
    parser.add_argument("--mib", type=int, default=64, help="memory for the data")
    options = parser.parse_args()
    try:
        asyncio.run(Server(options.port, options.mib << 20).run(options.socket))
    except KeyboardInterrupt:
        os._exit(0)


if __name__ == "__main__":
    main()
