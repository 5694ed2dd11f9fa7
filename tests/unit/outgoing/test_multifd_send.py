"""What a sender puts on its channels, taken apart by the receiver's own codec."""

import socket
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.codec.multifd import PacketDecoder, block_name
from migrationd.errors import ChannelError, MigrationCancelled
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing import multifd_send
from migrationd.outgoing.multifd_send import MultifdSender, MultifdSettings
from migrationd.pageops.decompress import decompressor
from migrationd.transport.channel import Channel
from migrationd.transport.rate_limit import RateLimiter
from tests.support.deadline import wait_until

PAGE = 4096
PAGES = 3000


class Reader(threading.Thread):
    """Reads one channel to its end; keeps every packet with its pages."""

    def __init__(self, sock: socket.socket, method: str) -> None:
        super().__init__()
        self._sock = sock
        self._decoder = PacketDecoder(0, PAGE, method)
        self._inflate = decompressor(method)
        self.pages: dict[int, bytes] = {}
        self.numbers: list[int] = []
        self.zero_pages: list[int] = []
        self.syncs = 0
        self.bytes = 0
        self.start()

    def run(self) -> None:
        with self._sock:
            self._read()

    def _read(self) -> None:
        while header := self._exactly(self._decoder.header_bytes):
            packet = self._decoder.decode(header)
            self.numbers.append(int.from_bytes(header[24:32], "big"))
            self.syncs += packet.is_sync
            if packet.is_sync:
                continue
            assert block_name(packet.ramblock) == "ram"
            numbers = self._decoder.offsets(header, packet, PAGES * PAGE, "ram").tolist()
            data = self._exactly(packet.data_bytes)
            if self._inflate is not None and data:
                data = self._inflate(memoryview(data), packet.normal_pages * PAGE)
            for index, page in enumerate(numbers[: packet.normal_pages]):
                assert page not in self.pages
                self.pages[page] = data[index * PAGE : (index + 1) * PAGE]
            self.zero_pages += numbers[packet.normal_pages :]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._sock.recv(size - len(data))
            if not piece:
                break
            data += piece
        self.bytes += len(data)
        return data


class Ends:
    """A sender and what reads its channels."""

    def __init__(self, settings: MultifdSettings, rate: int = 0, *, is_live: bool = False) -> None:
        pairs = [socket.socketpair() for _ in range(settings.channels)]
        self.channels = [Channel(ours.detach()) for ours, _ in pairs]
        self.theirs = [theirs for _, theirs in pairs]
        self.stats = OutgoingStats(page_size=PAGE, total_bytes=PAGES * PAGE)
        self.should_stop = False
        self.sent = {"ram": np.zeros(PAGES, np.bool_)}
        self.waits: list[float] = []
        self.sender = MultifdSender(
            self.channels,
            page_size=PAGE,
            settings=settings,
            is_live=is_live,
            stats=self.stats,
            limiter=RateLimiter(rate),
            clock=SystemClock(),
            wait=self._wait,
            should_stop=lambda: self.should_stop,
            sent=self.sent,
        )

    def _wait(self, delay_s: float) -> None:
        self.waits.append(delay_s)
        threading.Event().wait(delay_s)

    def readers(self, method: str = "none") -> list[Reader]:
        return [Reader(sock, method) for sock in self.theirs]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


@pytest.fixture
def block() -> Iterator[RamBlock]:
    spec = RamBlockSpec("ram", PAGES * PAGE, PAGE)
    block = RamBlock(spec, AnonymousMemory(spec.used_length, PAGE))
    generator = np.random.default_rng(1)
    pages = block.memory.view.reshape(-1, PAGE)
    block.present[100:900] = True
    block.present[1000:3000:3] = True
    block.present[2999] = True
    pages[block.present] = generator.integers(0, 255, (block.present_count, PAGE), np.uint8)
    # What lies under a page that is not present says nothing.
    pages[50] = 7
    yield block
    block.memory.close()


def send(ends: Ends, block: RamBlock) -> None:
    ends.sender.begin_round()
    ends.sender.put(block, np.flatnonzero(~block.present), is_zero=True)
    ends.sender.put(block, np.flatnonzero(block.present), is_zero=False)
    ends.sender.end_round()
    ends.sender.sync()


def check(readers: Sequence[Reader], block: RamBlock, ends: Ends, *, listed: bool) -> None:
    ends.close()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
        assert reader.syncs == 1
        assert reader.numbers == sorted(reader.numbers)
    numbers = [number for reader in readers for number in reader.numbers]
    assert sorted(numbers) == list(range(len(numbers)))
    merged: dict[int, bytes] = {}
    for reader in readers:
        merged |= reader.pages
    expected = block.memory.view.reshape(-1, PAGE)
    present = np.flatnonzero(block.present).tolist()
    for page in present:
        assert merged.pop(page) == expected[page].tobytes()
    zero = sorted(page for reader in readers for page in reader.zero_pages)
    absent = np.flatnonzero(~block.present).tolist()
    if listed:
        assert zero == absent
    else:
        assert sorted(merged) == absent
        assert set(merged.values()) == {bytes(PAGE)}
    stats = ends.stats
    assert stats.normal_pages == len(present)
    assert stats.duplicate_pages == len(absent)
    assert stats.multifd_bytes == stats.transferred_bytes
    assert stats.multifd_bytes == sum(reader.bytes for reader in readers)
    assert ends.sent["ram"].all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("method", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("zeros", ["multifd", "none"])
def test_every_page_goes_once(channels: int, method: str, zeros: str, block: RamBlock) -> None:
    ends = Ends(MultifdSettings(channels, method, zero_page_detection=zeros))
    readers = ends.readers(method)
    send(ends, block)
    check(readers, block, ends, listed=zeros == "multifd")


def test_pages_of_a_running_guest_are_handed_out_as_they_go(
    block: RamBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multifd_send, "LIVE_QUEUED_PAGES", 600)
    ends = Ends(MultifdSettings(1), is_live=True)
    ends.sender.begin_round()

    def hand_out() -> None:
        for start in range(0, PAGES, 500):
            ends.sender.put(block, np.arange(start, start + 500), is_zero=False)

    handing_out = threading.Thread(target=hand_out)
    handing_out.start()
    handing_out.join(0.3)
    assert handing_out.is_alive(), "nobody reads, and all of it is queued"
    readers = ends.readers()
    handing_out.join(10)
    assert not handing_out.is_alive()
    ends.sender.end_round()
    ends.close()
    for reader in readers:
        reader.join(10)
    assert sum(len(reader.pages) for reader in readers) == PAGES


def test_pages_that_may_change_are_copied_before_they_are_compressed(block: RamBlock) -> None:
    ends = Ends(MultifdSettings(2, "zlib"), is_live=True)
    readers = ends.readers("zlib")
    send(ends, block)
    check(readers, block, ends, listed=True)


def test_the_rate_holds_for_all_channels_together(block: RamBlock) -> None:
    rate = 20 << 20
    ends = Ends(MultifdSettings(4), rate)
    readers = ends.readers()
    clock = SystemClock()
    begin_s = clock.monotonic_s()
    send(ends, block)
    elapsed_s = clock.monotonic_s() - begin_s
    check(readers, block, ends, listed=True)
    assert ends.waits
    # The first window is free and the last one need not be waited for.
    assert elapsed_s > ends.stats.transferred_bytes / rate - 0.25


def test_what_is_asked_to_stop_sends_no_more(block: RamBlock) -> None:
    ends = Ends(MultifdSettings(2))
    ends.should_stop = True
    readers = ends.readers()
    send(ends, block)
    ends.close()
    for reader in readers:
        reader.join(10)
        assert reader.syncs == 1
        assert not reader.pages
    assert not ends.sent["ram"].any()


def test_a_broken_channel_ends_the_round_and_the_others(block: RamBlock) -> None:
    ends = Ends(MultifdSettings(3))
    for sock in ends.theirs[1:]:
        sock.close()
    with pytest.raises(ChannelError):
        send(ends, block)
    with pytest.raises(ChannelError):
        ends.channels[0].send(b"x")
    ends.close()
    ends.theirs[0].close()


def test_a_channel_that_the_destination_closed_is_noticed_without_a_send(block: RamBlock) -> None:
    """One channel is blocked; the other one has nothing to send when it is closed."""
    ends = Ends(MultifdSettings(2))
    ends.sender.begin_round()
    ends.sender.put(block, np.flatnonzero(block.present), is_zero=False)
    wait_until(lambda: any(has_data(sock) for sock in ends.theirs), "one channel is busy")
    idle, busy = sorted(ends.theirs, key=has_data)
    assert not has_data(idle)
    idle.close()
    with pytest.raises(ChannelError, match=r"closed multifd channel \d"):
        ends.sender.end_round()
    ends.close()
    busy.close()


def has_data(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def test_stop_ends_what_is_blocked(block: RamBlock) -> None:
    ends = Ends(MultifdSettings(2))
    ends.sender.begin_round()
    ends.sender.put(block, np.flatnonzero(block.present), is_zero=False)
    ends.sender.stop()
    with pytest.raises((MigrationCancelled, ChannelError)):
        ends.sender.end_round()
    ends.close()
    for sock in ends.theirs:
        sock.close()
