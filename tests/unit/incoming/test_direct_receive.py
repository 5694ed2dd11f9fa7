"""Pages straight into guest memory give the same guest as pages by way of the decoder."""

import random
import socket
import threading
from collections.abc import Callable

import numpy as np
import pytest

from migrationd.codec.ram_encode import (
    encode_block_list,
    encode_eos,
    encode_named_header,
    page_headers,
    zero_records,
)
from migrationd.codec.records import RamBlockEntry, RamBlockList
from migrationd.codec.section import encode_section_footer, encode_section_header
from migrationd.codec.stream import StreamDecoder
from migrationd.guest.base import GuestIdentity
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.incoming import direct_receive
from migrationd.incoming.direct_receive import (
    LEAST_RUN_PAGES,
    LEAST_USUAL_PAGES,
    WINDOW_PAGES,
    RunGuess,
)
from migrationd.incoming.loader import Pause, StreamLoader
from migrationd.transport.channel import Channel
from tests.unit.transport.support import tcp_pair

SIZE = 4096
PAGES = 2048

SocketPair = Callable[[], tuple[socket.socket, socket.socket]]


def page_records(pages: np.ndarray, contents: np.ndarray) -> bytes:
    return np.hstack((page_headers(pages, SIZE), contents[pages])).tobytes()


def stream(rng: np.random.Generator, kinds: list[str]) -> tuple[bytes, np.ndarray]:
    """A stream of runs, and the memory that it means."""
    memory = np.zeros((PAGES, SIZE), np.uint8)
    out = [
        bytes.fromhex("5145564d00000003"),
        encode_section_header(1, 1, "ram", 0, 4),
        encode_block_list((RamBlockEntry("ram", PAGES * SIZE),)),
        encode_eos(),
        encode_section_footer(1),
        encode_section_header(2, 1),
        encode_named_header(0, SIZE, "ram", is_zero=True) + b"\0",
    ]
    for kind in kinds:
        first = int(rng.integers(0, PAGES - 700))
        count = int(rng.integers(1, 700))
        pages = np.arange(first, first + count, dtype=np.int64)
        contents = np.zeros((PAGES, SIZE), np.uint8)
        contents[pages, :8] = rng.integers(0, 255, (count, 8), np.uint8)
        if kind == "zero":
            out.append(zero_records(pages, SIZE).tobytes())
            memory[pages] = 0
        elif kind == "section":
            out += [encode_eos(), encode_section_footer(1), encode_section_header(2, 1)]
        else:
            if kind == "scattered":
                rng.shuffle(pages)
            out.append(page_records(pages, contents))
            memory[pages] = contents[pages]
    out += [encode_eos(), encode_section_footer(1), encode_section_header(3, 1), encode_eos()]
    out += [encode_section_footer(1), bytes.fromhex("00 06 00000002 7b7d")]
    return b"".join(out), memory


def load(
    data: bytes, cuts: list[int], make_pair: SocketPair = socket.socketpair
) -> tuple[ParkedGuest, int]:
    """Load a stream that arrives in pieces, over a connection that stays open behind its end."""
    ours, theirs = make_pair()

    def send() -> None:
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            theirs.sendall(data[begin:end])

    sender = threading.Thread(target=send)
    sender.start()
    channel = Channel(ours.detach())
    loader = StreamLoader(channel, StreamDecoder(), lambda: None)
    guest: ParkedGuest | None = None
    try:
        while (result := loader.step()) is not Pause.FINISHED:
            if isinstance(result, RamBlockList):
                guest = ParkedGuest.create(
                    GuestIdentity(),
                    [RamBlockSpec("ram", PAGES * SIZE, SIZE)],
                    lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size),
                )
                loader.use_blocks(guest.ram)
    finally:
        channel.shutdown()
        sender.join()
        theirs.close()
        channel.close()
    assert guest is not None
    return guest, loader.position


@pytest.mark.parametrize("make_pair", [socket.socketpair, tcp_pair])
@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_in_any_pieces(
    seed: int, make_pair: SocketPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    choose = random.Random(seed)
    kinds = choose.choices(["run", "run", "zero", "scattered", "section"], k=8)
    data, memory = stream(rng, kinds)
    cuts = sorted(choose.sample(range(len(data)), 40))
    used: list[int] = []
    receive = direct_receive.DirectReceiver.receive

    def counted(*arguments: object) -> tuple[int, int]:
        result = receive(*arguments)  # type: ignore[arg-type]
        used.append(result[0])
        return result

    monkeypatch.setattr(direct_receive.DirectReceiver, "receive", counted)
    monkeypatch.setattr(direct_receive, "LEAST_RUN_PAGES", 32)
    guest, position = load(data, cuts, make_pair)
    assert position == len(data)
    block = guest.ram[0]
    np.testing.assert_array_equal(block.memory.view.reshape(PAGES, SIZE), memory)
    assert not memory[~block.present].any()
    if "run" in kinds[:3]:
        assert sum(used) > 0


@pytest.mark.parametrize("make_pair", [socket.socketpair, tcp_pair])
def test_a_long_run_goes_directly_and_its_end_waits_for_nothing(make_pair: SocketPair) -> None:
    rng = np.random.default_rng(99)
    pages = np.arange(PAGES, dtype=np.int64)
    contents = np.zeros((PAGES, SIZE), np.uint8)
    contents[:, :8] = rng.integers(1, 255, (PAGES, 8), np.uint8)
    head, _ = stream(rng, [])
    tail = bytes.fromhex("0000000000000010")
    at = head.index(tail + encode_section_footer(1) + encode_section_header(3, 1))
    data = head[:at] + page_records(pages, contents) + head[at:]
    guest, position = load(data, [], make_pair)
    assert position == len(data)
    assert guest.ram[0].present.all()
    np.testing.assert_array_equal(guest.ram[0].memory.view.reshape(PAGES, SIZE), contents)


def ram_block() -> RamBlock:
    return RamBlock(RamBlockSpec("ram", PAGES * SIZE, SIZE), AnonymousMemory(PAGES * SIZE, SIZE))


def test_a_run_is_guessed_to_become_as_long_as_the_one_before() -> None:
    block = ram_block()
    guess = RunGuess()
    guess.saw(block, 0, 256)
    assert guess.pages_ahead() == 0
    guess.saw(block, 512, 3)
    assert guess.pages_ahead() == 253
    guess.interrupted()
    assert guess.pages_ahead() == 0
    guess.saw(block, 515, 253)
    assert guess.pages_ahead() == 0
    assert guess.is_between
    guess.saw(block, 1024, 10)
    guess.ended()
    assert guess.pages_ahead() == 0
    guess.saw(block, 1536, 1)
    assert guess.pages_ahead() == 0, f"runs of 10 pages are below {LEAST_USUAL_PAGES}"


def test_a_mixed_row_ends_a_run_and_begins_the_next() -> None:
    block = ram_block()
    guess = RunGuess()
    guess.saw(block, 0, 120)
    guess.saw_mixed(block, [*range(120, 128), *range(128, 140)], [1] * 8 + [-1] * 10 + [1] * 2)
    assert guess.next == (block, 140)
    assert guess.pages_ahead() == 126
    guess.saw_mixed(block, [140, 141], [1, 1])
    assert guess.pages_ahead() == 124
    guess.saw_mixed(block, [142, 143], [-1, -1])
    assert guess.next is None


def test_a_long_run_is_guessed_to_go_on() -> None:
    block = ram_block()
    guess = RunGuess()
    guess.saw(block, 0, LEAST_RUN_PAGES - 1)
    assert guess.pages_ahead() == 0
    guess.saw(block, LEAST_RUN_PAGES - 1, 1)
    assert guess.pages_ahead() == WINDOW_PAGES


def test_a_pattern_of_runs_and_zeros_goes_directly_from_its_second_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(7)
    contents = np.zeros((PAGES, SIZE), np.uint8)
    contents[:, :8] = rng.integers(1, 255, (PAGES, 8), np.uint8)
    head, _ = stream(rng, [])
    tail = bytes.fromhex("0000000000000010")
    at = head.index(tail + encode_section_footer(1) + encode_section_header(3, 1))
    pages = np.arange(PAGES, dtype=np.int64)
    body = b"".join(
        zero_records(pages[first : first + 128], SIZE).tobytes()
        + page_records(pages[first + 128 : first + 256], contents)
        for first in range(0, PAGES, 256)
    )
    placed: list[int] = []
    receive = direct_receive.DirectReceiver.receive

    def counted(*arguments: object) -> tuple[int, int]:
        result = receive(*arguments)  # type: ignore[arg-type]
        placed.append(result[0])
        return result

    monkeypatch.setattr(direct_receive.DirectReceiver, "receive", counted)
    data = head[:at] + body + head[at:]
    guest, position = load(data, [])
    assert position == len(data)
    contents[(pages & 255) < 128] = 0
    np.testing.assert_array_equal(guest.ram[0].memory.view.reshape(PAGES, SIZE), contents)
    # Seven of the eight runs, but for what the first reads of each had brought.
    assert sum(placed) > PAGES // 4
