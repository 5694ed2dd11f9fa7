"""The example server by itself: its log when it is full, and its clients while it is throttled."""

import asyncio
import importlib.util
import mmap
from types import ModuleType, SimpleNamespace

import pytest

from migrationd.ctl.dirtier_process import PROGRAM


@pytest.fixture(scope="module")
def kvstore() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvstore", PROGRAM.with_name("kvstore.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_full_can_be_deleted_from(kvstore: ModuleType) -> None:
    with mmap.mmap(-1, 4096) as memory:
        store = kvstore.Store(memory)
        count = 4096 // 32
        for number in range(count):
            store.set(b"%04d" % number, b"x" * 20)
        assert store.end == 4096, "no room for the mark of a deletion"
        with pytest.raises(kvstore.CommandError, match="the block is full"):
            store.set(b"more", b"y" * 20)
        assert store.delete(b"0000")
        assert not store.delete(b"0000")
        store.set(b"more", b"y" * 20)
        there = kvstore.Store(memory)
        there.end = store.end
        there.rebuild()
        assert len(there) == len(store) == count
        assert there.get(b"0000") is None
        assert there.get(b"more") == b"y" * 20


async def test_a_throttled_server_lets_its_clients_wait(kvstore: ModuleType) -> None:
    class Workload:
        rests = [0.01, 0.01, 0.0]  # noqa: RUF012
        entered = 0

        @property
        def rest_s(self) -> float:
            return self.rests.pop(0)

        def try_enter(self) -> bool:
            self.entered += 1
            return True

        def leave(self) -> None:
            pass

    workload = Workload()
    server = SimpleNamespace(workload=workload, connections=set(), store=None)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: kvstore.Connection(server), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    writer.write(b"PING\r\n")
    assert await asyncio.wait_for(reader.readline(), 30) == b"+PONG\r\n"
    assert workload.rests == []
    assert workload.entered == 1
    writer.close()
    await writer.wait_closed()
    listener.close()
    await listener.wait_closed()
