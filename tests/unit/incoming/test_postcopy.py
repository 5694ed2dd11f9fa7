"""What the commands of postcopy do, without a network."""

import socket
from collections.abc import Callable, Iterator

import pytest

from migrationd.codec.postcopy import (
    encode_advise,
    encode_recv_bitmap,
    encode_resume,
    unpack_received,
)
from migrationd.codec.records import Command, Package, RamBlockList
from migrationd.codec.return_path import Pong, RecvBitmap, ResumeAck, ReturnPathMessage
from migrationd.codec.stream import StreamDecoder
from migrationd.errors import ChannelClosed, StreamCorrupt, StreamError, StreamUnsupported
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming.loader import Pause, StreamLoader
from migrationd.incoming.postcopy import Phase, PostcopyArrival
from migrationd.migration.status import Cause
from migrationd.transport.channel import Channel
from tests.unit.codec.support import FOOTER, HEAD, PAGE, PART, be, cstr8, full, ram_start

ADVISE = encode_advise([PAGE], PAGE)
BLOCKS = ram_start({"a": 8, "b": 2})


def ping(value: int) -> bytes:
    return b"\x08\0\x02\0\x04" + be(value, 4)


def discard(idstr: str, *ranges: tuple[int, int]) -> bytes:
    payload = b"\0" + cstr8(idstr) + b"\0" + b"".join(be(n) for pair in ranges for n in pair)
    return b"\x08\0\x06" + be(len(payload), 2) + payload


def packaged(*parts: bytes) -> bytes:
    body = b"\x08\0\x04\0\0" + b"".join(parts) + b"\x08\0\x05\0\0"
    return b"\x08\0\x07\0\x04" + be(len(body), 4) + body


def page(idstr: str, number: int, fill: bytes) -> bytes:
    return be(number * PAGE | 8) + cstr8(idstr) + fill * PAGE


def part(*records: bytes) -> bytes:
    return PART + b"".join(records) + be(0x10) + FOOTER


class Destination:
    """A loader and the commands of postcopy; what they answer and report is kept."""

    def __init__(self, *, takes_ram: bool = True) -> None:
        self.open: list[socket.socket | Channel] = []
        self.answers: list[ReturnPathMessage] = []
        self.causes: list[Cause] = []
        self.refuses: int | None = None
        self.postcopy = PostcopyArrival(
            takes_ram=takes_ram, answer=self.answer, report=self.causes.append
        )
        self.source, channel = self.connection()
        self.loader = StreamLoader(channel, StreamDecoder(), lambda: None)
        self.blocks: tuple[RamBlock, ...] = ()

    def connection(self) -> tuple[socket.socket, Channel]:
        near, far = socket.socketpair()
        channel = Channel(far.detach())
        self.open += [near, channel]
        return near, channel

    def close(self) -> None:
        for end in self.open:
            end.close()

    def answer(self, message: ReturnPathMessage) -> None:
        if isinstance(message, Pong) and message.value == self.refuses:
            raise ChannelClosed("gone")
        self.answers.append(message)

    def feed(self, data: bytes) -> None:
        """Send bytes, and obey until nothing more comes."""
        self.source.sendall(data)
        while True:
            result = self.loader.step()
            match result:
                case Pause.QUIET | Pause.FINISHED:
                    return
                case Command(number) if number == 7:
                    pass
                case Command():
                    self.postcopy.obey(result, self.loader)
                case Package():
                    self.postcopy.unpack(result, self.loader)
                case RamBlockList():
                    self.blocks = tuple(
                        RamBlock(
                            RamBlockSpec(entry.idstr, entry.used_length, PAGE),
                            AnonymousMemory(entry.used_length, PAGE),
                        )
                        for entry in result.blocks
                    )
                    self.postcopy.prepare(self.blocks)
                    self.loader.use_blocks(self.blocks)

    def come_back(self) -> None:
        """The source connects again."""
        self.source, channel = self.connection()
        self.postcopy.recover()
        self.loader.resume(channel)


Make = Callable[..., Destination]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Destination] = []

    def one(*, takes_ram: bool = True) -> Destination:
        made.append(Destination(takes_ram=takes_ram))
        return made[-1]

    yield one
    for destination in made:
        destination.close()


@pytest.fixture
def destination(make: Make) -> Destination:
    return make()


def received(block: RamBlock) -> list[int]:
    assert block.received is not None
    return block.received.nonzero()[0].tolist()


def test_a_guest_turns_and_comes_back(destination: Destination) -> None:
    destination.feed(HEAD + ADVISE + BLOCKS)
    destination.feed(part(page("a", 0, b"0"), page("a", 1, b"1"), be(2 * PAGE | 0x22) + b"\0"))
    a, b = destination.blocks
    assert received(a) == [0, 1, 2]
    destination.feed(discard("a", (PAGE, 2 * PAGE)))
    assert received(a) == [0]
    assert bytes(a.page(1)) == bytes(PAGE)
    assert not destination.postcopy.owns_guest
    destination.feed(packaged(full(5, "cpu", b"state"), ping(3), ping(0x42)))
    assert destination.answers == [Pong(3), Pong(0x42)]
    assert destination.causes == [Cause.POSTCOPY, Cause.PACKAGE_LOADED]
    assert destination.postcopy.owns_guest
    assert [device.idstr for device in destination.loader.arrival.devices] == ["cpu"]

    destination.feed(part(page("b", 1, b"x")) + PART + page("a", 3, b"3")[:-1])
    destination.come_back()
    destination.feed(encode_recv_bitmap("a") + encode_recv_bitmap("b"))
    of_a, of_b = destination.answers[2:]
    assert isinstance(of_a, RecvBitmap)
    assert isinstance(of_b, RecvBitmap)
    assert unpack_received("a", of_a.bitmap, 8).tolist() == [True] + 7 * [False]
    assert unpack_received("b", of_b.bitmap, 2).tolist() == [False, True]
    destination.feed(encode_resume())
    assert destination.answers[4:] == [ResumeAck(1)]
    assert destination.causes[2:] == [Cause.RECOVERED]
    destination.feed(part(page("a", 3, b"3"), page("b", 0, b"y")))
    assert received(a) == [0, 3]
    assert [bytes(b.page(n)[:1]) for n in (0, 1)] == [b"y", b"x"]
    assert b.missing_count == 0


def test_a_section_may_end_again_after_a_recovery(destination: Destination) -> None:
    end = b"\x03\0\0\0\x01" + be(0x10) + FOOTER
    destination.feed(HEAD + ADVISE + BLOCKS + packaged() + end)
    destination.come_back()
    destination.feed(encode_resume() + end + b"\0")
    assert destination.loader.step() is Pause.FINISHED


@pytest.mark.parametrize(("refused", "owns"), [(3, False), (0x42, False), (None, True)])
def test_the_source_has_given_up_once_it_can_know(
    refused: int | None, owns: bool, destination: Destination
) -> None:
    destination.refuses = refused
    stream = HEAD + ADVISE + BLOCKS + packaged(ping(3), ping(0x42))
    if refused is None:
        destination.feed(stream)
    else:
        with pytest.raises(ChannelClosed):
            destination.feed(stream)
    assert destination.postcopy.owns_guest is owns


def test_an_old_source_gives_up_when_it_sends_the_package(destination: Destination) -> None:
    destination.refuses = 3
    with pytest.raises(ChannelClosed):
        destination.feed(HEAD + ADVISE + BLOCKS + packaged(ping(3)))
    assert destination.postcopy.owns_guest


def test_dirty_bitmaps_alone_turn_too(make: Make) -> None:
    destination = make(takes_ram=False)
    destination.feed(HEAD + b"\x08\0\x03\0\0" + BLOCKS + packaged())
    assert destination.postcopy.owns_guest
    assert not destination.postcopy.has_ram
    assert destination.blocks[0].received is None


@pytest.mark.parametrize(
    ("takes_ram", "stream", "error", "message"),
    [
        (False, HEAD + ADVISE, StreamUnsupported, "off here but on at the source"),
        (True, HEAD + b"\x08\0\x03\0\0", StreamUnsupported, "on here but off at the source"),
        (True, HEAD + encode_advise([PAGE], 8192), StreamUnsupported, "8192"),
        (True, HEAD + ADVISE + ADVISE, StreamCorrupt, "ADVISE when advised"),
        (True, HEAD + BLOCKS + ADVISE, StreamCorrupt, "behind a section"),
        (True, HEAD + BLOCKS + packaged(), StreamCorrupt, "a package when precopy"),
        (True, HEAD + ADVISE + packaged(), StreamCorrupt, "before the RAM block list"),
        (True, HEAD + BLOCKS + discard("a", (0, PAGE)), StreamCorrupt, "DISCARD when precopy"),
        (True, HEAD + ADVISE + b"\x08\0\x04\0\0", StreamCorrupt, "outside a package"),
        (True, HEAD + ADVISE + b"\x08\0\x05\0\0", StreamCorrupt, "outside a package"),
        (True, HEAD + ADVISE + encode_resume(), StreamCorrupt, "RESUME when advised"),
    ],
)
def test_what_is_not_legal_now(
    takes_ram: bool, stream: bytes, error: type[StreamError], message: str, make: Make
) -> None:
    destination = make(takes_ram=takes_ram)
    with pytest.raises(error, match=message):
        destination.feed(stream)
    assert not destination.postcopy.owns_guest


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (discard("c", (0, PAGE)), "'c', which this guest does not have"),
        (discard("a", (0, 9 * PAGE)), "outside the block"),
        (discard("a", (1 << 63, PAGE)), "outside the block"),
        (discard("a", (1, PAGE)), "whole pages"),
        (discard("a", (0, 100)), "whole pages"),
        (discard("a", (0, 0)), "whole pages"),
        (packaged(encode_advise([PAGE], PAGE)), "command 3 in a package"),
        (packaged(b"\x08\0\x05\0\0"), "command 5 in a package"),
        (packaged(full(5, "x", b"1"), full(6, "x", b"1")), "duplicate section"),
    ],
)
def test_bad_commands_before_the_switch(
    destination: Destination, command: bytes, message: str
) -> None:
    destination.feed(HEAD + ADVISE + BLOCKS)
    with pytest.raises(StreamCorrupt, match=message):
        destination.feed(command)
    assert not destination.postcopy.owns_guest


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (encode_recv_bitmap("c"), "'c', which this guest does not have"),
        (b"\x08\0\x0a\0\x02\5a", "RECV_BITMAP of 2 bytes"),
        (part(page("a", 1, b"1")), "before POSTCOPY_RESUME"),
        (packaged(), "a package when recovering"),
        (HEAD, "unknown element"),
        (discard("a", (0, PAGE)), "DISCARD when recovering"),
    ],
)
def test_a_bad_recovery_costs_nothing_but_itself(
    destination: Destination, stream: bytes, message: str
) -> None:
    destination.feed(HEAD + ADVISE + BLOCKS + packaged() + part(page("a", 5, b"5")))
    destination.come_back()
    with pytest.raises(StreamCorrupt, match=message):
        destination.feed(stream)
    assert destination.postcopy.owns_guest
    assert destination.postcopy.phase is Phase.RECOVERING
    destination.come_back()
    destination.feed(encode_recv_bitmap("a") + encode_resume() + part(page("a", 1, b"1")))
    assert received(destination.blocks[0]) == [1, 5]


def test_no_deltas_in_postcopy(destination: Destination) -> None:
    destination.feed(HEAD + ADVISE + BLOCKS + packaged())
    with pytest.raises(StreamCorrupt, match="XBZRLE page in postcopy"):
        destination.feed(PART + be(0x40) + cstr8("a") + b"\1\0\4\0\2xx")
