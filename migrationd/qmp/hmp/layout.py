"""Replies of QMP commands as text for people.

Reference: the layout of QEMU 11.1's ``info`` commands.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from migrationd.qmp.context import SavedState

Reply = Mapping[str, Any]

_GLOBALS = (
    ("store-global-state", True),
    ("only-migratable", False),
    ("send-configuration", True),
    ("send-section-footer", True),
    ("send-switchover-start", True),
)
_CLEAR_BITMAP_SHIFT = 18

_UNITS = {
    "announce-initial": " ms",
    "announce-max": " ms",
    "announce-step": " ms",
    "max-bandwidth": " bytes/second",
    "avail-switchover-bandwidth": " bytes/second",
    "max-postcopy-bandwidth": " bytes/second",
    "downtime-limit": " ms",
    "x-checkpoint-delay": " ms",
    "xbzrle-cache-size": " bytes",
    "x-vcpu-dirty-limit-period": " ms",
    "vcpu-dirty-limit": " MB/s",
    "x-rdma-chunk-size": " bytes",
}
_PARAMETERS = (
    "announce-initial", "announce-max", "announce-rounds", "announce-step",
    "throttle-trigger-threshold", "cpu-throttle-initial", "cpu-throttle-increment",
    "cpu-throttle-tailslow", "max-cpu-throttle", "tls-creds", "tls-hostname", "tls-authz",
    "max-bandwidth", "avail-switchover-bandwidth", "max-postcopy-bandwidth", "downtime-limit",
    "x-checkpoint-delay", "multifd-channels", "multifd-compression", "zero-page-detection",
    "xbzrle-cache-size", "block-bitmap-mapping", "x-vcpu-dirty-limit-period",
    "vcpu-dirty-limit", "mode", "direct-io", "x-rdma-chunk-size", "cpr-exec-command",
)  # fmt: skip
_QUOTED = ("tls-creds", "tls-hostname", "tls-authz")


def size(count: int) -> str:
    """Bytes with three digits and a binary unit."""
    # As QEMU rounds: the unit changes before three digits become four.
    power = max(0, (math.frexp(count / (1000 / 1024))[1] - 1) // 10)
    return f"{count / (1 << 10 * power):.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[power]}B"


def migration(info: Reply, *, show_all: bool, only_migratable: bool) -> str:
    """``info migrate``.

    Args:
        info: Return of ``query-migrate``.
        show_all: ``-a``.
        only_migratable: Whether the process was started so.
    """
    lines: list[str] = []
    if reasons := info.get("blocked-reasons"):
        lines.append("Outgoing migration blocked:")
        lines += (f"  {reason}" for reason in reasons)
    if status := info.get("status"):
        error = info.get("error-desc")
        lines.append(f"Status: \t\t{status}" + (f" ({error})" if error else ""))
    if "total-time" in info:
        lines.append("Time (ms): \t\t" + _times(info))
    if "remaining" in info:
        lines.append(f"Remaining: \t\t{size(info['remaining'])}")
    if addresses := info.get("socket-address"):
        lines += ["Sockets: [", *(f"\t{_address(address)}" for address in addresses), "]"]
    if "ram" in info:
        lines += _ram(info["ram"])
    if show_all:
        lines += _details(info, only_migratable)
    return _text(lines)


def _times(info: Reply) -> str:
    times = [f"total={info['total-time']}"]
    for label, name in (
        ("setup", "setup-time"),
        ("exp_down", "expected-downtime"),
        ("down", "downtime"),
    ):
        if name in info:
            times.append(f"{label}={info[name]}")
    return ", ".join(times)


def _address(address: Reply) -> str:
    match address["type"]:
        case "inet":
            return f"tcp:{address['host']}:{address['port']}"
        case "unix":
            return f"unix:{address['path']}"
        case "vsock":
            return f"vsock:{address['cid']}:{address['port']}"
        case _:
            return f"fd:{address['str']}"


def _ram(ram: Reply) -> list[str]:
    rates = f"transfer={ram['pages-per-second']}"
    if ram["dirty-pages-rate"]:
        rates += f", dirty={ram['dirty-pages-rate']}"
    others = f"dirty_syncs={ram['dirty-sync-count']}"
    for label, name in (
        ("zerocopy_fallbacks", "dirty-sync-missed-zero-copy"),
        ("postcopy_req", "postcopy-requests"),
        ("downtime_bytes", "downtime-bytes"),
    ):
        if ram[name]:
            others += f", {label}={ram[name]}"
    return [
        "RAM info:",
        f"  Throughput (Mbps): \t{ram['mbps']:.2f}",
        f"  Sizes: \t\tpagesize={size(ram['page-size'])}, total={size(ram['total'])}",
        f"  Transfers: \t\ttransferred={size(ram['transferred'])}, remain={size(ram['remaining'])}",
        f"    Channels: \t\tprecopy={size(ram['precopy-bytes'])}, "
        f"multifd={size(ram['multifd-bytes'])}, postcopy={size(ram['postcopy-bytes'])}",
        f"    Page Types: \tnormal={ram['normal']}, zero={ram['duplicate']}",
        f"  Page Rates (pps): \t{rates}",
        f"  Others: \t\t{others}",
    ]


def _details(info: Reply, only_migratable: bool) -> list[str]:
    lines = ["Globals:"]
    for name, value in _GLOBALS:
        is_on = only_migratable if name == "only-migratable" else value
        lines.append(f"  {name}: {_on(is_on)}")
    lines.append(f"  clear-bitmap-shift: {_CLEAR_BITMAP_SHIFT}")
    if cache := info.get("xbzrle-cache"):
        lines += [
            f"XBZRLE: size={cache['cache-size']}, transferred={cache['bytes']}, "
            f"pages={cache['pages']}, miss={cache['cache-miss']}",
            f"  miss_rate={cache['cache-miss-rate']:.2f}, "
            f"encode_rate={cache['encoding-rate']:.2f}, overflow={cache['overflow']}",
        ]
    for label, name in (
        ("CPU Throttle (%)", "cpu-throttle-percentage"),
        ("Postcopy Blocktime (ms)", "postcopy-blocktime"),
    ):
        if name in info:
            lines.append(f"{label}: {info[name]}")
    return lines


def capabilities(states: Sequence[Reply]) -> str:
    """``info migrate_capabilities``."""
    return _text([f"{item['capability']}: {_on(item['state'])}" for item in states])


def parameters(values: Reply) -> str:
    """``info migrate_parameters``."""
    lines: list[str] = []
    for name in _PARAMETERS:
        if name not in values:
            continue
        value = values[name]
        if name == "block-bitmap-mapping":
            lines += ["block-bitmap-mapping:", *_bitmap_mapping(value)]
        elif name == "cpr-exec-command":
            lines.append("".join((f"{name}:", *(f" {item}" for item in value))))
        elif isinstance(value, bool):
            lines.append(f"{name}: {_on(value)}")
        elif name in _QUOTED:
            lines.append(f"{name}: '{value}'")
        else:
            lines.append(f"{name}: {value}{_UNITS.get(name, '')}")
    return _text(lines)


def _bitmap_mapping(nodes: Sequence[Reply]) -> list[str]:
    lines = []
    for node in nodes:
        lines.append(f"  '{node['node-name']}' -> '{node['alias']}'")
        lines += (f"    '{item['name']}' -> '{item['alias']}'" for item in node["bitmaps"])
    return lines


def status(info: Reply) -> str:
    """``info status``."""
    text = "running" if info["running"] else "paused"
    if not info["running"] and info["status"] != "paused":
        text += f" ({info['status']})"
    return f"VM status: {text}\n"


def version(info: Reply) -> str:
    """``info version``."""
    number = info["qemu"]
    return f"{number['major']}.{number['minor']}.{number['micro']}{info['package']}\n"


def iothreads(threads: list[Reply]) -> str:
    """``info iothreads``."""
    lines = []
    for thread in threads:
        lines += [f"{thread['id']}:", f"  thread_id={thread['thread-id']}"]
        lines += [
            f"  {name}={thread[name]}"
            for name in ("poll-max-ns", "poll-grow", "poll-shrink", "poll-weight", "aio-max-batch")
        ]
    return "".join(f"{line}\n" for line in lines)


def kvm(info: Reply) -> str:
    """``info kvm``."""
    if not info["present"]:
        return "kvm support: not compiled\n"
    return f"kvm support: {'enabled' if info['enabled'] else 'disabled'}\n"


def dirty_rate(info: Reply) -> str:
    """``info dirty_rate``."""
    lines = [f"Status: {info['status']}", f"Start Time: {info['start-time']} (ms)"]
    if info["mode"] == "page-sampling":
        lines.append(f"Sample Pages: {info['sample-pages']} (per GB)")
    lines += [f"Period: {info['calc-time']} (sec)", f"Mode: {info['mode']}"]
    rate = info.get("dirty-rate")
    lines.append(f"Dirty rate: {'(not ready)' if rate is None else f'{rate} (MB/s)'}")
    return _text(lines)


def vcpu_dirty_limits(limits: Sequence[Reply]) -> str:
    """``info vcpu_dirty_limit``."""
    if not limits:
        return "Dirty page limit not enabled!\n"
    return _text(
        [
            f"vcpu[{item['cpu-index']}], limit rate {item['limit-rate']} (MB/s), "
            f"current rate {item['current-rate']} (MB/s)"
            for item in limits
        ]
    )


def character_devices(devices: Sequence[Reply]) -> str:
    """``info chardev``."""
    return _text([f"{item['label']}: filename={item['filename']}" for item in devices])


def snapshots(states: Sequence[SavedState]) -> str:
    """``info snapshots``; neither clock nor instruction count of the guest is known here."""
    if not states:
        return "There is no snapshot available.\n"
    rows = [("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")]
    for state in states:
        date = f"{datetime.fromtimestamp(state.saved_s):%Y-%m-%d %H:%M:%S}"
        rows.append(("--", state.tag, size(state.size_bytes), date, "0000:00:00.000", "--"))
    table = [f"{a:<7} {b:<16} {c:>8} {d:>19} {e:>15} {f:>10}" for a, b, c, d, e, f in rows]
    return _text(["List of snapshots present on all disks:", *table])


def _on(value: bool) -> str:
    return "on" if value else "off"


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
