import numpy as np
import pytest

from migrationd.errors import GuestError, InvalidState
from migrationd.guest.base import GuestIdentity, SeenOnArrival
from migrationd.guest.device import DeviceState
from migrationd.guest.memory import AnonymousMemory, Memory
from migrationd.guest.parked import ParkedGuest
from migrationd.guest.ram_block import RamBlockSpec
from migrationd.guest.run_state import Owner

PAGE = 4096
SPECS = (RamBlockSpec("pc.ram", 64 * PAGE, PAGE), RamBlockSpec("pc.bios", 16 * PAGE, PAGE))


def allocate(_: int, spec: RamBlockSpec) -> Memory:
    return AnonymousMemory(spec.used_length, spec.page_size)


def device(idstr: str, body: bytes = b"body") -> DeviceState:
    return DeviceState(idstr, 0, 1, body, kind=4, section_id=7)


def globalstate(name: str) -> DeviceState:
    raw = name.encode()
    return device("globalstate", (len(raw) + 1).to_bytes(4, "big") + raw.ljust(100, b"\0"))


def make_guest(*devices: DeviceState) -> ParkedGuest:
    guest = ParkedGuest.create(GuestIdentity("pc-i440fx-10.0"), SPECS, allocate)
    guest.complete(devices, b"{}", SeenOnArrival())
    return guest


def test_a_guest_counts_what_it_holds() -> None:
    guest = make_guest()
    guest.ram[0].place_batch(np.arange(5), np.ones((5, PAGE), np.uint8), True)
    assert guest.ram_bytes == 80 * PAGE
    assert guest.present_bytes == 5 * PAGE
    assert guest.page_size == PAGE


def test_the_run_state_of_the_source_is_the_next_one() -> None:
    assert make_guest(device("cpu"), globalstate("paused")).next_run_state == "paused"
    assert make_guest(device("cpu")).next_run_state == "running"


def test_a_chosen_run_state_is_written_where_it_travels() -> None:
    before = (device("cpu"), globalstate("running"), device("rtc"))
    guest = make_guest(*before)
    assert guest.choose_run_state("paused")
    assert guest.next_run_state == "paused"
    assert guest.devices[1] == globalstate("paused")
    assert (guest.devices[0], guest.devices[2]) == (before[0], before[2])
    assert guest.choose_run_state("running")
    assert guest.devices == before


def test_a_guest_without_a_run_state_keeps_none() -> None:
    guest = make_guest(device("cpu"))
    assert not guest.choose_run_state("paused")
    assert guest.next_run_state == "running"


def test_ownership_goes_round_and_only_round() -> None:
    guest = make_guest()
    assert guest.owner is Owner.HELD
    with pytest.raises(InvalidState, match="held cannot be handed-over"):
        guest.owner = Owner.HANDED_OVER
    guest.owner = Owner.HANDING_OVER
    guest.owner = Owner.HANDED_OVER
    with pytest.raises(InvalidState):
        guest.owner = Owner.HANDING_OVER
    guest.owner = Owner.HELD


@pytest.mark.parametrize("owner", list(Owner))
def test_what_is_on_record_is_taken_over_as_it_is(owner: Owner) -> None:
    guest = make_guest()
    guest.restore_owner(owner)
    assert guest.owner is owner


def test_memory_is_released_when_a_later_block_gets_none() -> None:
    made: list[AnonymousMemory] = []

    def scarce(index: int, spec: RamBlockSpec) -> Memory:
        if index:
            raise GuestError("no memory left")
        made.append(AnonymousMemory(spec.used_length, spec.page_size))
        return made[0]

    with pytest.raises(GuestError, match="cannot allocate the guest's memory: no memory left"):
        ParkedGuest.create(GuestIdentity(), SPECS, scarce)
    assert not hasattr(made[0], "view")


def test_a_closed_guest_has_no_memory() -> None:
    guest = make_guest()
    guest.close()
    guest.close()
    assert guest.ram == ()
