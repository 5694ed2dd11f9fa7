"""Where a workload's threads wait while it is held still."""

import threading
import time

from migrationd.workload.gate import Gate


def test_closing_waits_for_who_is_inside() -> None:
    gate = Gate()
    gate.enter()
    closing = threading.Thread(target=gate.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert not gate.try_enter()
    gate.leave()
    closing.join(10)
    assert not closing.is_alive()


def test_who_comes_to_a_closed_gate_waits_until_it_opens() -> None:
    gate = Gate()
    gate.close()
    entered = threading.Event()

    def come() -> None:
        gate.enter()
        entered.set()
        gate.leave()

    coming = threading.Thread(target=come)
    coming.start()
    assert not entered.wait(0.05)
    gate.open()
    assert entered.wait(10)
    coming.join()
    gate.close()  # nobody is inside any more


def test_a_throttled_gate_lets_in_for_its_share_of_the_time() -> None:
    gate = Gate()
    gate.throttle(75)
    end_s = time.monotonic() + 0.4
    begin_s = time.thread_time()
    while time.monotonic() < end_s:
        gate.enter()
        gate.leave()
    # Whatever else runs here, it is not more than a quarter, and a slice at each end.
    assert time.thread_time() - begin_s < 0.4 / 4 + 0.02


def test_who_never_waits_is_told_how_long_to_rest() -> None:
    gate = Gate()
    assert gate.rest_s == 0
    gate.throttle(99)
    # The gate is shut for 0.99 of each second.
    rests = []
    while not rests:
        rests = [rest_s for rest_s in (gate.rest_s,) if rest_s]
    assert 0 < rests[0] <= 0.99 + 1e-9
    gate.throttle(0)
    assert gate.rest_s == 0
