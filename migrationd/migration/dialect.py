"""The wire dialect: one frozen value, computed in one place.

What a machine type of an older version switches on the wire is not negotiated:
both sides derive it from the machine type. For a machine type without a version
(``microvm``, ``none``) the stream that the guest came with decides.

Reference: compatibility properties of QEMU's machine types, stream format 1.6.
"""

import re
from dataclasses import dataclass

from migrationd.guest.base import SeenOnArrival

_VERSION = re.compile(r"-(\d{1,3})\.(\d{1,3})$")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one guest's stream is written."""

    send_configuration: bool = True
    send_section_footers: bool = True
    send_vmdescription: bool = True
    send_switchover_start: bool = True
    preempt_at_setup: bool = False
    """The preempt channel is opened behind the main one, not at the switch to postcopy."""
    preempt_eos: bool = False
    """The preempt channel ends with an EOS record behind the stream's end."""
    multifd_flush_after_each_section: bool = False
    """The channels are synchronised at the end of each RAM section, not of each round."""
    zero_pages_on_main: bool = False
    """Zero pages are never listed in multifd packets: the destination may not know that."""
    switchover_ack_at_once: bool = False
    """A destination acknowledges the switchover as soon as the return path opens."""


def machine_version(machine: str) -> tuple[int, int] | None:
    """Version at the end of a versioned machine type's name.

    >>> machine_version("pc-i440fx-7.2")
    (7, 2)
    >>> machine_version("microvm") is None
    True
    """
    match = _VERSION.search(machine)
    return (int(match[1]), int(match[2])) if match else None


def describes_devices(machine: str | None) -> bool:
    """Whether a machine type sends a VMDESCRIPTION, where the stream could not show it."""
    version = machine_version(machine) if machine else None
    return version is None or version > (2, 2)


def dialect_of(machine: str | None, seen: SeenOnArrival | None = None) -> Dialect:
    """Compute the dialect of a guest.

    Args:
        machine: Machine type from the configuration; None if the stream had none.
        seen: What the arriving stream contained; decides where the name has no version,
            and for the parts that a machine type can also switch off by property.

    Returns:
        The dialect for sending the guest and for acknowledging its arrival.
    """
    seen = seen or SeenOnArrival()
    version = machine_version(machine) if machine else None
    switchover_start = seen.switchover_start if version is None else version >= (10, 0)
    return Dialect(
        send_configuration=seen.configuration and machine is not None,
        send_section_footers=seen.section_footers,
        send_vmdescription=seen.vmdescription,
        send_switchover_start=switchover_start,
        # Where the name says nothing the old way is right: every program takes it.
        preempt_at_setup=version is None or version <= (7, 2),
        preempt_eos=version is None or version <= (7, 2),
        multifd_flush_after_each_section=(
            not seen.switchover_start if version is None else version <= (8, 0)
        ),
        zero_pages_on_main=not seen.switchover_start if version is None else version <= (8, 2),
        switchover_ack_at_once=version is not None and version <= (11, 0),
    )
