"""Whatever a primary says: a documented error, and the replica of the last whole checkpoint."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.colo_primary import (
    PAGE,
    Secondary,
    checkpoint,
    device,
    pages,
    recorded_devices,
)

FUZZ = settings(
    deadline=None,
    max_examples=120,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

page = st.tuples(
    st.sampled_from(["pc.ram", "pc.bios", "/rom@etc/table-loader", "none"]),
    st.integers(0, 260),
    st.one_of(st.just(b"\0"), st.binary(min_size=1, max_size=1), st.just(b"page")),
)
devices = st.one_of(st.none(), st.binary(max_size=40), st.integers(0, 12858))
checkpoints = st.lists(
    st.tuples(st.lists(page, max_size=6), devices),
    min_size=1,
    max_size=4,
)
edits = st.lists(
    st.tuples(st.integers(0), st.sampled_from("xid"), st.binary(min_size=1, max_size=9)),
    max_size=4,
)


def edited(said: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    """Bytes overwritten, put in or taken out; most of them near a message, not in a page."""
    found = bytearray(said)
    for where, how, data in changes:
        at = where % (len(found) + 1)
        if how == "x":
            found[at : at + len(data)] = data
        elif how == "i":
            found[at:at] = data
        else:
            del found[at : at + len(data)]
    return bytes(found)


Page = tuple[str, int, bytes]
Devices = bytes | int | None


def spoken(content: list[Page], state: Devices) -> bytes:
    """A checkpoint with these pages; of its devices all, the first bytes, or one of them."""
    records = [
        pages((number, data if len(data) == 1 else data * (PAGE // len(data))), block=block)
        for block, number, data in content
    ]
    if isinstance(state, bytes):
        return checkpoint(b"".join(records), device("timer", state) + b"\0")
    return checkpoint(b"".join(records), recorded_devices()[:state])


@FUZZ
@given(checkpoints, edits, st.sampled_from([1 << 20, 4096, 61]))
def test_the_replica_is_always_whole(
    said: list[tuple[list[Page], Devices]], changes: list[tuple[int, str, bytes]], piece: int
) -> None:
    secondary = Secondary()
    try:
        whole = b"".join(spoken(content, state) for content, state in said)
        secondary.follow(edited(whole, changes), piece)
    finally:
        secondary.close()
