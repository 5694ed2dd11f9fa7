import os
import sys
import threading

import pytest

from migrationd.linux.priority import urgent_thread


def nice() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_a_thread_is_urgent_inside_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "setpriority", lambda _which, _who, value: asked.append(value))
    before = nice()
    with urgent_thread():
        assert asked == [min(before, -10)]
    assert asked == [min(before, -10), before]


def test_without_the_privilege_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with urgent_thread():
        assert nice() == os.getpriority(os.PRIO_PROCESS, 0)


def test_others_give_way_sooner_while_one_is_urgent() -> None:
    before = sys.getswitchinterval()
    with urgent_thread():
        with urgent_thread():
            assert sys.getswitchinterval() <= 0.0001 < before
        assert sys.getswitchinterval() <= 0.0001
    assert sys.getswitchinterval() == before
