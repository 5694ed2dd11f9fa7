"""``iothread``: a thread that devices would be served by.

There are no devices, so it waits, as it does in a QEMU until a device is given to it.

Reference: object type ``iothread`` of QEMU 11.1, order of checks and texts.
"""

import threading

from migrationd.errors import ObjectError
from migrationd.objects.base import Properties, UserObject

_INT64_MAX = (1 << 63) - 1
_LIMITS = {
    "poll-max-ns": _INT64_MAX,
    "poll-grow": _INT64_MAX,
    "poll-shrink": _INT64_MAX,
    "poll-weight": 63,
    "aio-max-batch": _INT64_MAX,
    "thread-pool-min": _INT64_MAX,
    "thread-pool-max": _INT64_MAX,
}
_POOL_LIMIT = (1 << 31) - 1
_POOL_MAX = 64


class IoThread(UserObject):
    """A thread; it ends when the object is deleted.

    Args:
        object_id: Its id, which names the thread.
        properties: As the user gave them.

    Raises:
        ObjectError: A property is out of range.
    """

    qom_type = "iothread"

    def __init__(self, object_id: str, properties: Properties) -> None:
        super().__init__(properties)
        for name, value in properties.items():
            if isinstance(value, int) and not 0 <= value <= _LIMITS[name]:
                raise ObjectError(f"{name} value must be in range [0, {_LIMITS[name]}]")
        least, most = (
            self.number(name, initial)
            for name, initial in (("thread-pool-min", 0), ("thread-pool-max", _POOL_MAX))
        )
        if least > most or most > _POOL_LIMIT:
            raise ObjectError("bad thread-pool-min/thread-pool-max values")
        self._end = threading.Event()
        self._thread = threading.Thread(
            target=self._end.wait, name=f"IO {object_id}"[:15], daemon=True
        )
        self._thread.start()

    @property
    def thread_id(self) -> int:
        """What the kernel calls the thread."""
        return self._thread.native_id or 0

    def number(self, name: str, initial: int) -> int:
        """A property, or what it is when it was not given."""
        value = self.properties.get(name)
        return value if isinstance(value, int) else initial

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()
