"""Lines of the human monitor give the texts that QEMU 11.1 gave.

``human/11.1.jsonl`` holds the lines, in order, as a QEMU 11.1.2 without a guest
(``-machine pc -nodefaults -S``) answered them; each is a list of line and text.
"""

import json
from datetime import datetime
from pathlib import Path

import pytest

from migrationd.migration.info import MigrationInfo, RamStats
from migrationd.qmp.hmp import layout
from migrationd.store.snapshots import Snapshot
from tests.support.fake_control import FakeControl
from tests.support.monitor import Monitor
from tests.support.results import add_row

RECORDED: list[tuple[str, str]] = [
    tuple(json.loads(line))
    for line in (Path(__file__).parent / "human" / "11.1.jsonl").read_text("utf-8").splitlines()
]
TABLE = "lines of the human monitor beside QEMU 11.1's"

NOT_TAKEN = {
    "migrate_set_parameter tls-creds abc": "TLS is not available in this version",
    'migrate_set_parameter tls-creds ""': "TLS is not available in this version",
    "migrate_set_parameter direct-io true": "not available in this version",
    "migrate_set_parameter direct-io y": "not available in this version",
}
"""Lines that QEMU performs and that are refused here, and why; what shows the values differs."""

UNSTABLE = ("calc_dirty_rate 0x2&3",)


async def test_every_line(request: pytest.FixtureRequest) -> None:
    monitor = Monitor(FakeControl())
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    unknown: set[str] = set()
    same = 0
    for line, expected in RECORDED:
        command = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
        (reply,) = await monitor.feed(json.dumps(command).encode())
        text = str(reply["return"])
        if text.startswith("unknown command") and not expected.startswith("unknown command"):
            unknown.add(line.split()[0] if not line.startswith("info") else line)
        elif line in NOT_TAKEN and "is not supported in this version" in text:
            continue
        elif line == "info migrate_parameters":
            assert _masked(text) == _masked(expected)
            same += 1
        elif line not in UNSTABLE:
            assert text == expected, line
            same += 1
    missing = f"not built: {', '.join(sorted(unknown))}" if unknown else "all built"
    add_row(request.config, TABLE, (f"{same} of {len(RECORDED)} equal", missing))
    assert same > 0.7 * len(RECORDED)


def _masked(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(("tls-", "direct-io"))]


def test_a_source_in_full() -> None:
    """As in a recorded postcopy of QEMU 11.1."""
    info = {
        "status": "postcopy-paused",
        "error-desc": "Postcopy migration is paused by the user",
        "total-time": 902,
        "setup-time": 1,
        "downtime": 1,
        "remaining": 156_500_000,
        "ram": RAM | {"postcopy-requests": 1, "downtime-bytes": 0},
    }
    text = layout.migration(info, show_all=False, only_migratable=False)
    assert text == (
        "Status: \t\tpostcopy-paused (Postcopy migration is paused by the user)\n"
        "Time (ms): \t\ttotal=902, setup=1, down=1\n"
        "Remaining: \t\t149 MiB\n"
        "RAM info:\n"
        "  Throughput (Mbps): \t2.62\n"
        "  Sizes: \t\tpagesize=4 KiB, total=16.5 MiB\n"
        "  Transfers: \t\ttransferred=744 KiB, remain=0 B\n"
        "    Channels: \t\tprecopy=637 KiB, multifd=0 B, postcopy=0 B\n"
        "    Page Types: \tnormal=150, zero=4112\n"
        "  Page Rates (pps): \ttransfer=0\n"
        "  Others: \t\tdirty_syncs=3, postcopy_req=1\n"
    )


RAM = {
    "total": 17309696, "postcopy-requests": 0, "dirty-sync-count": 3, "multifd-bytes": 0,
    "pages-per-second": 0, "downtime-bytes": 1792, "page-size": 4096, "remaining": 0,
    "postcopy-bytes": 0, "mbps": 2.6161, "transferred": 761874,
    "dirty-sync-missed-zero-copy": 0, "precopy-bytes": 652715, "duplicate": 4112,
    "dirty-pages-rate": 0, "normal-bytes": 614400, "normal": 150,
}  # fmt: skip


def test_the_rare_members() -> None:
    info = {
        "blocked-reasons": ["The first", "The second"],
        "status": "active",
        "total-time": 504,
        "setup-time": 5,
        "expected-downtime": 2,
        "ram": RAM | {"dirty-pages-rate": 7, "dirty-sync-missed-zero-copy": 2},
        "xbzrle-cache": {
            "cache-size": 67108864, "bytes": 0, "pages": 0, "cache-miss": 4,
            "cache-miss-rate": 0.0, "encoding-rate": 0.0, "overflow": 0,
        },
        "cpu-throttle-percentage": 20,
    }  # fmt: skip
    text = layout.migration(info, show_all=True, only_migratable=True)
    lines = text.splitlines()
    assert lines[:5] == [
        "Outgoing migration blocked:",
        "  The first",
        "  The second",
        "Status: \t\tactive",
        "Time (ms): \t\ttotal=504, setup=5, exp_down=2",
    ]
    assert "  Page Rates (pps): \ttransfer=0, dirty=7" in lines
    assert "  Others: \t\tdirty_syncs=3, zerocopy_fallbacks=2, downtime_bytes=1792" in lines
    assert lines[lines.index("Globals:") :] == [
        "Globals:",
        "  store-global-state: on",
        "  only-migratable: on",
        "  send-configuration: on",
        "  send-section-footer: on",
        "  send-switchover-start: on",
        "  clear-bitmap-shift: 18",
        "XBZRLE: size=67108864, transferred=0, pages=0, miss=4",
        "  miss_rate=0.00, encode_rate=0.00, overflow=0",
        "CPU Throttle (%): 20",
    ]


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ({"type": "inet", "host": "::1", "port": "46717"}, "tcp:::1:46717"),
        ({"type": "unix", "path": "/a"}, "unix:/a"),
        ({"type": "vsock", "cid": "5", "port": "4"}, "vsock:5:4"),
        ({"type": "fd", "str": "7"}, "fd:7"),
    ],
)
def test_a_destination(address: dict[str, str], text: str) -> None:
    info = {"status": "setup", "socket-address": [address]}
    shown = layout.migration(info, show_all=False, only_migratable=False)
    assert shown == f"Status: \t\tsetup\nSockets: [\n\t{text}\n]\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1023, "0.999 KiB"), (1024, "1 KiB"),
        (652715, "637 KiB"), (761874, "744 KiB"), (17309696, "16.5 MiB"), (1 << 62, "4 EiB"),
    ],
)  # fmt: skip
def test_sizes(count: int, text: str) -> None:
    assert layout.size(count) == text


async def test_a_running_migration_through_the_monitor() -> None:
    control = FakeControl(guest_name="g", run_state="postmigrate")
    control.outgoing.migration = MigrationInfo(
        status="active", total_time_ms=1, setup_time_ms=2, expected_downtime_ms=3,
        remaining_bytes=5, ram=RamStats(mbps=1.0),
    )  # fmt: skip
    monitor = Monitor(control)
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    lines = ("info migrate", "info name", "info status", "c", "migrate -d tcp:h:1", "help migrate")
    texts = []
    for line in lines:
        command = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
        (reply,) = await monitor.feed(json.dumps(command).encode())
        texts.append(str(reply["return"]))
    assert texts[0].startswith(
        "Status: \t\tactive\r\nTime (ms): \t\ttotal=1, setup=2, exp_down=3\r\n"
        "Remaining: \t\t5 B\r\nRAM info:\r\n"
    )
    assert texts[1:5] == ["g\r\n", "VM status: paused (postmigrate)\r\n", "", ""]
    assert texts[5] == (
        "migrate [-d] [-r] uri -- migrate to URI (using -d to not wait for completion)\r\n"
        "\t\t\t -r to resume a paused postcopy migration\r\n"
    )
    assert [call[0] for call in control.calls] == ["cont", "migrate"]


async def test_only_the_first_cpu_is_there() -> None:
    monitor = Monitor(FakeControl())
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    for index, key in ((0, "return"), (7, "error")):
        arguments = {"command-line": "info version", "cpu-index": index}
        command = {"execute": "human-monitor-command", "arguments": arguments}
        (reply,) = await monitor.feed(json.dumps(command).encode())
        assert key in reply
    assert reply["error"]["desc"] == "Parameter 'cpu-index' expects a CPU number"  # type: ignore[index]


def test_saved_states() -> None:
    """Columns as QEMU 11.1's."""
    saved_s = datetime(2026, 11, 20, 21, 16, 6).timestamp()
    states = [Snapshot("one", 516 << 10, saved_s), Snapshot("vm-20261120211606", 1, saved_s)]
    assert layout.snapshots(states).splitlines() == [
        "List of snapshots present on all disks:",
        "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT",
        "--      one               516 KiB 2026-11-20 21:16:06  0000:00:00.000         --",
        "--      vm-20261120211606      1 B 2026-11-20 21:16:06  0000:00:00.000         --",
    ]
    assert layout.snapshots([]) == "There is no snapshot available.\n"


async def test_objects() -> None:
    """Lines and answers of QEMU 11.1 with ``-machine none``."""
    monitor = Monitor(FakeControl())
    await monitor.feed(b'{"execute": "qmp_capabilities"}')
    for line, expected in (
        (
            "object_add",
            'object_add: string expected\r\nTry "help object_add" for more information\r\n',
        ),
        ("object_add iothread,id=i0,poll-grow=4", ""),
        (
            "object_add iothread,id=i0",
            "Error: attempt to add duplicate property 'i0' to object (type 'container')\r\n",
        ),
        (
            "object_add nosuch,id=x",
            "Error: Parameter 'qom-type' does not accept value 'nosuch'\r\n",
        ),
        ("object_add secret,id=s0,data=abc", ""),
        ("object_add secret,id=s1,nope=1", "Error: Parameter 'nope' is unexpected\r\n"),
        ("object_add secret", "Error: Parameter 'id' is missing\r\n"),
        (
            "object_add iothread,id=i9,poll-max-ns=abc",
            "Error: Parameter 'poll-max-ns' expects integer\r\n",
        ),
        ('object_add {"qom-type":"secret","id":"j0","data":"x"}', ""),
        ("object_del i0", ""),
        ("object_del i0", "Error: object 'i0' not found\r\n"),
        ("info iothreads", ""),
    ):
        command = {"execute": "human-monitor-command", "arguments": {"command-line": line}}
        (reply,) = await monitor.feed(json.dumps(command).encode())
        assert reply["return"] == expected, line
