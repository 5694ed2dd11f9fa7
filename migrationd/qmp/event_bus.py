"""Events to every monitor that has finished its negotiation."""

from collections.abc import Callable

from migrationd.clock import Clock

Sink = Callable[[dict[str, object]], None]
"""Takes one event object and queues it for a client; must not block."""


class EventBus:
    """Fan-out of events; used on the event loop only.

    Args:
        clock: For the time stamps.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sinks: list[Sink] = []

    def attach(self, sink: Sink) -> None:
        """Begin to deliver events to a monitor."""
        self._sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        """Deliver no more events to a monitor."""
        if sink in self._sinks:
            self._sinks.remove(sink)

    def emit(self, name: str, data: dict[str, object] | None) -> None:
        """Raise an event: it is queued at each monitor before this returns.

        Args:
            name: Event name.
            data: Its members; None leaves ``data`` out.
        """
        now_us = self._clock.wall_ns() // 1000
        event: dict[str, object] = {
            "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        for sink in list(self._sinks):
            sink(event)
