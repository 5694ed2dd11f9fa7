"""The push goes where requests go, and comes back."""

import numpy as np
import pytest

from migrationd.outgoing.postcopy_pacer import ALONE, BESIDE, SHARED, GivesWay, Pacer, Shares
from migrationd.outgoing.postcopy_schedule import BlockPages, PageSchedule
from migrationd.outgoing.postcopy_walks import NEIGHBOUR_PAGES, Walks


def full(pages: int, host_pages: int = 1) -> PageSchedule:
    return PageSchedule([BlockPages("m", np.ones(pages, np.bool_), host_pages)])


def serve(schedule: PageSchedule, page: int, count: int = 1) -> bool:
    """Answer a request, if the page is not under way."""
    if not len(schedule.claim(0, np.arange(page, page + count))):
        return False
    schedule.requested(0, page, count)
    return True


def push_one(schedule: PageSchedule, limit: int = 64) -> list[int]:
    batch = schedule.next_batch(limit)
    assert batch is not None
    return [int(page) for page in schedule.claim(0, batch.pages)]


def test_neighbours_follow_one_request_then_the_push_returns() -> None:
    schedule = full(1000)
    assert push_one(schedule, 10) == list(range(10))
    assert serve(schedule, 500)
    assert push_one(schedule) == list(range(501, 501 + NEIGHBOUR_PAGES))
    assert push_one(schedule, 3) == [10, 11, 12]


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("pushed_per_page", [2, 30])
def test_a_walker_is_overtaken_in_either_direction(step: int, pushed_per_page: int) -> None:
    schedule = full(200_000)
    asked = 0
    page = 0 if step > 0 else 199_999
    for _ in range(5_000):
        asked += serve(schedule, page)
        for _ in range(2):
            push_one(schedule, pushed_per_page // 2)
        page += step
    assert asked < 20


def test_walks_do_not_take_each_others_place() -> None:
    schedule = full(300_000)
    places = [0, 100_000, 199_999]
    asked = 0
    for _ in range(2_000):
        for index, step in enumerate((1, 1, -1)):
            asked += serve(schedule, places[index])
            places[index] += step
        push_one(schedule, 64)
    assert asked < 60


def test_strays_are_told_from_walks() -> None:
    schedule = full(100_000)
    for page in range(50_000, 50_100):
        serve(schedule, page)
    assert schedule.strays == 2
    for page in np.random.default_rng(1).permutation(12)[:10] * 4000:
        serve(schedule, int(page))
    assert schedule.strays == 12


def test_what_is_broken_off_is_not_forgotten() -> None:
    schedule = full(10_000)
    serve(schedule, 5000)
    batch = schedule.next_batch(64)
    assert batch is not None
    schedule.claim(0, batch.pages[:8])
    serve(schedule, 100)
    assert schedule.has_restart
    batch.done = 8
    schedule.broken_off(batch)
    assert push_one(schedule) == list(range(101, 101 + NEIGHBOUR_PAGES))
    assert push_one(schedule) == list(range(5009, 5001 + NEIGHBOUR_PAGES))


def test_what_no_walk_was_behind_goes_on_where_it_was() -> None:
    schedule = full(10_000)
    batch = schedule.next_batch(64)
    assert batch is not None
    schedule.claim(0, batch.pages[:8])
    batch.done = 8
    serve(schedule, 5000)
    schedule.broken_off(batch)
    assert push_one(schedule) == list(range(5001, 5001 + NEIGHBOUR_PAGES))
    assert schedule.next_batch(64) is batch
    schedule.claim(0, batch.pages)
    batch.done = 64
    schedule.broken_off(batch)
    assert push_one(schedule, 2) == [64, 65]


@pytest.mark.parametrize("order", [1, -1])
def test_host_pages_of_a_walk_go_whole(order: int) -> None:
    schedule = full(64, host_pages=8)
    for page in [24, 32][::order]:
        serve(schedule, page, 8)
    seen: list[int] = []
    while (batch := schedule.next_batch(3)) is not None:
        assert len(batch.pages) % 8 == 0
        assert (batch.pages.reshape(-1, 8) % 8 == np.arange(8)).all()
        seen += schedule.claim(0, batch.pages).tolist()
    assert sorted(seen) == [page for page in range(64) if not 24 <= page < 40]


def test_pages_at_the_ends_of_a_block_are_walked_to() -> None:
    for page, other in ((0, 1), (9, 8)):
        schedule = full(10)
        serve(schedule, page)
        serve(schedule, other)
        seen = []
        while schedule.remaining_pages:
            seen += push_one(schedule)
        assert sorted(seen) == sorted({*range(10)} - {page, other})


def test_one_request_twice_is_no_walk() -> None:
    walks = Walks()
    assert walks.follow(0, 10, 1) is not None
    assert walks.follow(1, 11, 1) is not None


def test_short_turns_only_while_requests_come() -> None:
    shares = Shares(has_own_channel=False)
    assert shares.pace is SHARED
    assert not shares.update(1, 1.0)
    assert not shares.update(1, 1.005)
    assert shares.update(1, 1.02)
    assert shares.pace is ALONE
    assert not shares.update(1, 5.0)
    other = Shares(has_own_channel=True)
    assert other.pace is BESIDE


def test_the_push_gives_way_until_nobody_asks_or_its_time_is_up() -> None:
    way = GivesWay(0.01)
    assert way.hold_s(2, 1.0) > 0
    assert way.hold_s(4, 1.001) > 0
    assert way.hold_s(4, 1.0035) > 0, "the guest may be slow"
    assert way.hold_s(4, 1.0041) == 0
    assert way.hold_s(4, 1.0042) == 0, "nobody has asked since, however soon the push asks again"
    held_s, now_s = 0.0, 2.0
    for number in range(3, 100):
        hold_s = way.hold_s(2 * number, now_s)
        held_s += hold_s
        now_s += hold_s or 0.001
    assert 0.004 < held_s < 0.008
    assert GivesWay(0).hold_s(2, 1.0) == 0


def test_the_push_gives_way_while_a_disk_is_asked_for_a_page() -> None:
    way = GivesWay(1.0)
    for step in range(50):
        assert way.hold_s(3, 1.0 + step / 100) > 0
    assert way.hold_s(4, 1.5) > 0
    assert way.hold_s(4, 1.5031) == 0


def test_zero_pages_that_went_ahead_are_not_forgotten() -> None:
    schedule = PageSchedule([BlockPages("m", np.array([1, 0, 0, 1, 1], np.bool_))])
    state = schedule.blocks[0]
    state.sent[[1, 3]] = True
    state.led = np.array([0, 1, 0, 1, 0], np.bool_)
    assert schedule.discards(0).tolist() == [[0, 1], [2, 1], [4, 1]]
    assert state.remaining == 2
    assert state.sent.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("seed", range(10))
def test_what_went_ahead_is_kept_and_everything_else_is_discarded(seed: int) -> None:
    rng = np.random.default_rng(seed)
    schedule = PageSchedule([BlockPages("m", rng.random(300) < 0.5)])
    state = schedule.blocks[0]
    state.led = rng.random(300) < 0.3
    state.sent[:] = state.led | (rng.random(300) < 0.2)
    kept = state.sent & (state.led | state.present)
    covered = np.zeros(300, np.bool_)
    for first, count in schedule.discards(0).tolist():
        assert not covered[first : first + count].any()
        covered[first : first + count] = True
    assert np.array_equal(covered, ~kept)
    assert np.array_equal(state.sent, kept)
    assert state.remaining == np.count_nonzero(state.present & ~kept)


def test_a_write_is_no_more_than_some_milliseconds_of_the_limit() -> None:
    assert Pacer(0).most_bytes() is None
    assert Pacer(10 << 20).most_bytes() == (10 << 20) // 100


def test_what_a_walk_passed_is_known() -> None:
    walks = Walks()
    for page in (10, 12, 15):
        walks.follow(0, page, 1)
        assert walks.passed is None or page == 15
    assert walks.passed == (13, 2, 1)
    walks.follow(0, 16, 1)
    assert walks.passed is None, "nothing lies between"
    walks.follow(0, 5000, 1)
    assert walks.passed is None, "it is another walk's first"
    for page in (4998, 4990):
        walks.follow(0, page, 1)
    assert walks.passed == (4997, 7, -1)
