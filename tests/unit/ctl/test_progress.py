import pytest

from migrationd.ctl.progress import (
    Meter,
    Progress,
    duration_text,
    progress_line,
    rate_text,
    size_text,
)

MIB = 1 << 20


def ram(transferred: int, remaining: int, **more: object) -> dict[str, object]:
    return {
        "transferred": transferred,
        "remaining": remaining,
        "total": 100 * MIB,
        "page-size": 4096,
        **more,
    }


def test_nothing_yet() -> None:
    progress = Meter().add(0, {})
    assert (progress.status, progress.has_ended, progress.fraction) == ("none", False, 0.0)


def test_rate_is_measured_between_looks() -> None:
    meter = Meter()
    meter.add(10.0, {"status": "active", "ram": ram(0, 100 * MIB)})
    progress = meter.add(12.0, {"status": "active", "ram": ram(40 * MIB, 60 * MIB)})
    assert progress.rate_bytes_per_s == 20 * MIB
    assert progress.eta_s == 3.0
    assert progress.fraction == pytest.approx(0.4)


def test_old_looks_are_forgotten() -> None:
    meter = Meter()
    for second, sent in enumerate((0, 10, 20, 60, 100)):
        progress = meter.add(second, {"status": "active", "ram": ram(sent * MIB, 1)})
    assert progress.rate_bytes_per_s == 40 * MIB


def test_first_look_believes_the_peer() -> None:
    info = {"status": "active", "ram": ram(MIB, 99 * MIB, mbps=8.0)}
    assert Meter().add(0, info).rate_bytes_per_s == 1e6


def test_no_eta_when_the_guest_dirties_faster() -> None:
    meter = Meter()
    meter.add(0, {"status": "active", "ram": ram(0, 100 * MIB)})
    look = {"status": "active", "ram": ram(10 * MIB, MIB, **{"dirty-pages-rate": 5000})}
    progress = meter.add(1, look)
    assert progress.eta_s is None
    assert "ETA unknown" in progress_line(progress)


def test_another_migration_begins() -> None:
    meter = Meter()
    meter.add(0, {"status": "active", "ram": ram(50 * MIB, MIB)})
    assert meter.add(1, {"status": "active", "ram": ram(MIB, MIB)}).rate_bytes_per_s == 0


def test_completed_shows_the_mean() -> None:
    info = {
        "status": "completed",
        "ram": ram(50 * MIB, 0),
        "total-time": 2000,
        "downtime": 12,
    }
    progress = Meter().add(0, info)
    assert progress.fraction == 1.0
    assert progress_line(progress) == (
        "completed, 100% of 100.0 MiB, sent 50.0 MiB, 25.0 MiB/s, in 2.0 s, downtime 12 ms"
    )


def test_failed_says_why() -> None:
    progress = Meter().add(0, {"status": "failed", "error-desc": "Connection refused"})
    assert progress.has_ended
    assert progress_line(progress) == "failed, Connection refused"


def test_strange_members_do_no_harm() -> None:
    info = {"status": "active", "ram": {"transferred": "much"}, "downtime": "long"}
    assert Meter().add(0, info) == Progress(status="active")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (MIB, "1.0 MiB"), (1 << 50, "1024.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text
    assert rate_text(count) == text + "/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (3.21, "3.2 s"), (125, "2:05"), (3725, "1:02:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
