"""Which dirty bitmaps a guest leaves with."""

import pytest

from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.parked import ParkedGuest
from migrationd.migration.bitmap_mapping import BitmapAlias, BitmapMapping, NodeAlias
from migrationd.migration.dirty_bitmaps import bitmaps_of, has_bitmaps
from migrationd.outgoing.contract import OutgoingSettings
from migrationd.outgoing.departing import departing
from tests.unit.migration.test_dirty_bitmaps import sections

ONE = (NodeAlias("disk", "wire", (BitmapAlias("b", "2"),)),)


@pytest.mark.parametrize(
    ("is_on", "mapping", "expected"),
    [
        (True, None, [("disk", "a"), ("disk", "b")]),
        (True, ONE, [("wire", "2")]),
        (True, (), []),
        (False, None, []),
        (False, ONE, []),
    ],
)
def test_they_go_with_the_capability_alone(
    is_on: bool, mapping: BitmapMapping | None, expected: list[tuple[str, str]]
) -> None:
    def no_memory(*_: object) -> None:
        raise AssertionError("it has no RAM")

    guest = ParkedGuest.create(GuestIdentity(), [], no_memory)  # type: ignore[arg-type]
    guest.complete(sections(), None, SeenOnArrival())
    settings = OutgoingSettings(dirty_bitmaps=is_on, bitmap_mapping=mapping)
    sent = departing(guest, settings.sent_bitmaps)
    assert [(item.node, item.name) for item in bitmaps_of(sent.devices)] == expected
    assert has_bitmaps(sent.devices) is bool(expected)
    assert len(bitmaps_of(guest.devices)) == 2, "they stay with the guest"
