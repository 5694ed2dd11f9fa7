"""What an outgoing migration is given, and what it tells the daemon."""

from dataclasses import dataclass
from typing import Protocol

from migrationd.guest.ram_block import IGNORE_SHARED
from migrationd.guest.run_state import LazyHandOver
from migrationd.migration.bitmap_mapping import BitmapMapping
from migrationd.migration.convergence import ThrottleSettings
from migrationd.outgoing.file_save import FileSettings
from migrationd.outgoing.multifd_send import MultifdSettings
from migrationd.outgoing.postcopy_learned import Order
from migrationd.outgoing.postcopy_source import PostcopySettings


@dataclass(frozen=True, slots=True)
class OutgoingSettings:
    """Capabilities and parameters as they were when ``migrate`` was accepted."""

    return_path: bool = False
    pause_before_switchover: bool = False
    uuid: bytes | None = None
    max_bandwidth_bytes_per_s: int = 0
    downtime_limit_ms: int = 300
    avail_switchover_bytes_per_s: int = 0
    throttle: ThrottleSettings | None = None
    throttle_trigger_threshold: int = 50
    dirty_limit_bytes_per_s: int | None = None
    """``vcpu-dirty-limit``; None without ``dirty-limit``."""
    switchover_ack: bool = False
    postcopy: PostcopySettings | None = None
    postcopy_blocktime: bool = False
    """Show how long requests took; QEMU shows at its destination how long the guest waited."""
    xbzrle_cache_bytes: int | None = None
    """None without the capability."""
    file: FileSettings | None = None
    """How a mapped-ram file is written; None without the capability."""
    multifd: MultifdSettings | None = None
    detects_zero_pages: bool = True
    compress_level: int | None = None
    """How pages are deflated one by one, of a guest that does not execute."""
    dirty_bitmaps: bool = False
    """Whether the guest's dirty bitmaps go with it."""
    bitmap_mapping: BitmapMapping | None = None
    background_snapshot: bool = False
    """The guest stays: only its state at one instant is written."""
    checkpoint_delay_ms: int | None = None
    """``x-checkpoint-delay``; None without ``x-colo``."""
    mode: str = "normal"
    """Parameter ``mode``."""

    ignores_shared: bool = False
    """Capability ``x-ignore-shared``: what is in a file that both ends share is not sent."""

    @property
    def validated_capabilities(self) -> tuple[str, ...] | None:
        """Capabilities that a stream tells, for both ends must have them on."""
        return (IGNORE_SHARED,) if self.ignores_shared else None

    @property
    def sent_bitmaps(self) -> BitmapMapping | None:
        """Which dirty bitmaps go, and under which names; None: all under their own."""
        return self.bitmap_mapping if self.dirty_bitmaps else ()

    @property
    def hands_memory_over(self) -> bool:
        """Whether memory goes by its descriptors, before the stream: none of it is in there."""
        return self.mode == "cpr-transfer"

    @property
    def stops_first(self) -> bool:
        """Whether the guest stands still before it counts as active, and dirties nothing."""
        return self.mode != "normal"


class Observer(Protocol):
    """What the daemon wants to know, called on the event loop."""

    def on_status(self, status: str) -> None:
        """The status changed."""

    def on_pass(self, number: int) -> None:
        """A pass over the dirty bitmap began."""

    async def hold_still(self) -> None:
        """The guest is to stand still, or does: nobody but the migration starts it from here on."""

    def let_go(self) -> None:
        """It goes on after all, or may: it does not leave yet."""

    def on_stopped(self) -> None:
        """The guest was stopped, for the switchover or a snapshot's instant."""

    def on_resumed(self) -> None:
        """The guest runs again after a snapshot's instant."""

    def on_colo_exit(self, reason: str) -> None:
        """The guest has no replica any more that follows it."""

    async def before_switchover(self, lazy: LazyHandOver | None) -> None:
        """Put on record that the guest is being handed over (before status ``device``).

        Args:
            lazy: How, if it goes by postcopy.

        Raises:
            StoreError: It cannot be put on record; the migration fails.
        """

    def running_there(self) -> None:
        """The destination runs the guest, whose memory is still here."""

    def on_learned(self, order: Order) -> None:
        """A postcopy is complete: the order in which the guest asks for its pages."""

    async def handed_over(self) -> None:
        """The destination holds the guest (before status ``completed``); never raises."""

    async def kept(self, *, may_be_elsewhere: bool) -> None:
        """The guest stays here (before status ``failed`` or ``cancelled``); never raises.

        Args:
            may_be_elsewhere: Whether the destination has all that it needs to run it.
        """
