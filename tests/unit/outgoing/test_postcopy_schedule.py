"""Every page goes once, in the order that the guest wants."""

import threading

import numpy as np
import pytest

from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.ram_block import RamBlock, RamBlockSpec
from migrationd.outgoing.postcopy_schedule import Batch, BlockPages, PageSchedule
from migrationd.outgoing.postcopy_writer import PageWriter
from migrationd.transport.channel import Channel
from tests.unit.transport.support import unix_pair


def block(bits: str, host_pages: int = 1) -> BlockPages:
    return BlockPages("m", np.array([bit == "1" for bit in bits]), host_pages)


def mark_sent(schedule: PageSchedule, pages: object) -> None:
    schedule.blocks[0].sent[pages] = True
    schedule.recount()


def push(schedule: PageSchedule, limit: int = 2) -> list[tuple[int, int]]:
    """Drain the background push."""
    order = []
    while (batch := schedule.next_batch(limit)) is not None:
        order += [(batch.block, int(page)) for page in schedule.claim(batch.block, batch.pages)]
    return order


def test_zero_pages_are_not_pushed() -> None:
    schedule = PageSchedule([block("10110"), block("000"), block("01")])
    assert schedule.remaining_pages == 4
    assert push(schedule) == [(0, 0), (0, 2), (0, 3), (2, 1)]
    assert schedule.remaining_pages == 0


def test_the_push_goes_on_behind_a_request_and_comes_round() -> None:
    schedule = PageSchedule([block("1111"), block("1111")])
    assert schedule.next_batch(1) is not None
    assert schedule.claim_page(1, 1)
    schedule.requested(1, 1, 1)
    assert push(schedule, 1) == [(1, 2), (1, 3), (0, 1), (0, 2), (0, 3), (1, 0), (0, 0)]


def test_a_page_is_claimed_once() -> None:
    schedule = PageSchedule([block("111")])
    assert schedule.claim_page(0, 1)
    assert not schedule.claim_page(0, 1)
    assert schedule.claim(0, np.array([0, 1, 2])).tolist() == [0, 2]
    assert schedule.claim(0, np.array([0, 1, 2])).tolist() == []


def test_a_requested_zero_page_is_claimed_and_does_not_count() -> None:
    schedule = PageSchedule([block("10")])
    assert schedule.claim_page(0, 1)
    assert schedule.remaining_pages == 1


def test_pages_claimed_by_many_threads_go_once() -> None:
    count = 20000
    schedule = PageSchedule([BlockPages("m", np.ones(count, np.bool_))])
    claimed: list[list[int]] = [[], [], []]

    def ask(mine: list[int], seed: int) -> None:
        for page in np.random.default_rng(seed).permutation(count)[: count // 2].tolist():
            if schedule.claim_page(0, page):
                mine.append(page)
                if not seed:
                    schedule.requested(0, page, 1)

    askers = [threading.Thread(target=ask, args=(claimed[i], i)) for i in range(2)]
    for asker in askers:
        asker.start()
    claimed[2] = [page for _, page in push(schedule, 16)]
    for asker in askers:
        asker.join()
    assert sorted(page for mine in claimed for page in mine) == list(range(count))
    assert schedule.remaining_pages == 0


def test_host_pages_go_whole() -> None:
    schedule = PageSchedule([block("010000000001", host_pages=4)])
    assert schedule.remaining_pages == 8
    assert push(schedule, 1) == [(0, page) for page in (0, 1, 2, 3, 8, 9, 10, 11)]


def test_what_precopy_sent_is_not_pushed() -> None:
    schedule = PageSchedule([block("1111")])
    mark_sent(schedule, np.array([0, 1]))
    assert schedule.discards(0).tolist() == [[2, 2]]
    assert push(schedule) == [(0, 2), (0, 3)]


def test_nothing_sent_discards_the_whole_block() -> None:
    assert PageSchedule([block("0110")]).discards(0).tolist() == [[0, 4]]


def test_all_sent_discards_nothing() -> None:
    schedule = PageSchedule([block("11")])
    mark_sent(schedule, np.arange(2))
    assert schedule.discards(0).tolist() == []


def test_discards_spare_only_pages_that_hold_something() -> None:
    # Zero pages that were sent are forgotten rather than cut around, or left alone.
    schedule = PageSchedule([block("0101010")])
    mark_sent(schedule, np.array([0, 2, 4, 6, 1]))
    assert schedule.discards(0).tolist() == [[2, 5]]
    assert schedule.blocks[0].sent.tolist() == [True, True] + [False] * 5
    assert push(schedule) == [(0, 3), (0, 5)]


def test_a_host_page_that_was_sent_in_part_is_forgotten_whole() -> None:
    schedule = PageSchedule([block("11111111", host_pages=4)])
    mark_sent(schedule, np.arange(6))
    assert schedule.discards(0).tolist() == [[4, 4]]
    assert push(schedule, 4) == [(0, page) for page in (4, 5, 6, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_discards_cover_every_page_that_must_still_be_asked_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    state = BlockPages("m", rng.random(200) < 0.6)
    schedule = PageSchedule([state])
    sent = np.flatnonzero(rng.random(200) < 0.5)
    mark_sent(schedule, sent)
    before = state.sent.copy()
    covered = np.zeros(200, np.bool_)
    for first, length in schedule.discards(0).tolist():
        covered[first : first + length] = True
    assert np.array_equal(covered & state.present & before, np.zeros(200, np.bool_))
    assert covered[state.present & ~before].all()
    assert np.array_equal(state.sent, before & ~covered)
    assert {page for _, page in push(schedule)} == set(
        np.flatnonzero(state.present & ~before).tolist()
    )


def test_after_a_pause_only_the_destination_knows() -> None:
    schedule = PageSchedule([block("1111")])
    push(schedule)
    schedule.adopt_received(0, np.array([True, False, True, False]))
    assert schedule.remaining_pages == 2
    assert push(schedule) == [(0, 1), (0, 3)]


def test_learned_batches_go_first_and_in_parts() -> None:
    schedule = PageSchedule([block("1100"), block("0111")])
    schedule.push_first([Batch(0, np.array([2, 3]), is_zero=True), Batch(1, np.array([3, 1, 2]))])
    assert schedule.claim_page(1, 3)
    first = schedule.next_batch(2)
    assert first is not None
    assert (first.block, first.pages.tolist(), first.is_zero) == (0, [2, 3], True)
    schedule.claim(0, first.pages)
    assert push(schedule, 1) == [(1, 1), (1, 2), (0, 0), (0, 1)]


def test_a_large_hole_is_crossed() -> None:
    present = np.zeros(3 << 20, np.bool_)
    present[[0, -1]] = True
    assert push(PageSchedule([BlockPages("m", present)])) == [(0, 0), (0, (3 << 20) - 1)]


def test_a_window_never_divides_a_host_page() -> None:
    ours, theirs = unix_pair()
    block = RamBlock(RamBlockSpec("m", 8 * 4096, 4096), AnonymousMemory(8 * 4096, 4096))
    block.present[1] = True
    schedule = PageSchedule([BlockPages("m", block.present, 4)])
    channel = Channel(ours.detach())
    with theirs:
        writer = PageWriter(channel, [block], schedule, 4096)
        writer.open(b"")
        batch = schedule.next_batch(1)
        assert batch is not None
        sent, size = writer.push(batch, 2)
        assert (batch.done, sent) == (4, 4)
        # Zero, whole, and two zero pages: in this order, whole records.
        assert size == len(theirs.recv(1 << 20)) == (8 + 2 + 1) + (8 + 4096) + (8 + 1) + 9
        channel.close()
