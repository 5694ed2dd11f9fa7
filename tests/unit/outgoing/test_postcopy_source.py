"""What a postcopy knows before its first connection."""

import numpy as np
import pytest

from migrationd.clock import SystemClock
from migrationd.guest.base import GuestIdentity
from migrationd.guest.memory import AnonymousMemory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.migration.dialect import Dialect
from migrationd.migration.stats import OutgoingStats
from migrationd.outgoing.postcopy_learned import NO_ORDER, Order
from migrationd.outgoing.postcopy_source import PostcopySettings, PostcopySource

PAGE = 4096


@pytest.mark.parametrize(
    ("learned", "limit", "held_s"),
    [
        (NO_ORDER, 0, 3.0),
        (NO_ORDER, 1 << 20, 3.0),
        (np.array([[0, 1]], np.int64), 0, 1.0),
        (None, 0, 1.0),
        (None, 1 << 20, 0.0),
    ],
)
def test_how_long_the_push_leaves_a_guest_alone(
    learned: Order | None, limit: int, held_s: float
) -> None:
    guest = ParkedGuest.create(
        GuestIdentity(),
        [RamBlockSpec("pc.ram", 4 * PAGE, PAGE)],
        lambda _, spec: AnonymousMemory(spec.used_length, spec.page_size),
    )
    source = PostcopySource(
        guest,
        Dialect(),
        PostcopySettings(learned=learned, max_bandwidth_bytes_per_s=limit),
        OutgoingStats(PAGE, 4 * PAGE),
        SystemClock(),
    )
    now_s = 1.0
    for step in range(10000):
        if not (wait_s := source.gives_way.hold_s(2 * step, now_s)):
            break
        now_s += wait_s
    assert now_s - 1.0 == pytest.approx(held_s, abs=0.002)
