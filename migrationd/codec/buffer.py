"""The decoder's input: one linear buffer that is compacted, never copied per record."""

from migrationd.errors import StreamLimit

MINIMUM_FREE_BYTES = 64 << 10


class NeedData(Exception):
    """The element at the cursor is not complete yet; the cursor has not moved."""


class ReadBuffer:
    """Bytes that arrived and were not decoded yet.

    Args:
        capacity: Initial size; grows up to ``limit`` when one element needs more.
        limit: Most bytes that one element may need at once.
    """

    def __init__(self, capacity: int, limit: int) -> None:
        self._limit = max(limit, capacity)
        self.data = bytearray(capacity)
        self.start = 0
        self.end = 0
        self.base = 0
        self.is_ended = False

    @property
    def position(self) -> int:
        """Stream position of the next undecoded byte."""
        return self.base + self.start

    def __len__(self) -> int:
        return self.end - self.start

    def free_view(self) -> memoryview:
        """Space for the next bytes, at least 64 KiB.

        Raises:
            StreamLimit: If one element would exceed the limit.
        """
        if self.start == self.end:
            self.base += self.start
            self.start = self.end = 0
        elif len(self.data) - self.end < MINIMUM_FREE_BYTES:
            self._compact()
        return memoryview(self.data)[self.end :]

    def added(self, count: int) -> None:
        """Account for bytes written into :meth:`free_view`."""
        self.end += count

    def feed(self, data: bytes | memoryview) -> None:
        """Append a copy of ``data``."""
        view = memoryview(data)
        while view:
            free = self.free_view()
            count = min(len(free), len(view))
            free[:count] = view[:count]
            free.release()
            self.added(count)
            view = view[count:]

    def skip(self, count: int) -> None:
        """Move the cursor over decoded bytes."""
        self.start += count

    def require(self, count: int, offset: int = 0) -> int:
        """Index in ``data`` of the byte ``offset`` after the cursor.

        Raises:
            NeedData: If fewer than ``count`` bytes follow it.
        """
        if self.end - self.start < offset + count:
            raise NeedData
        return self.start + offset

    def peek(self, count: int, offset: int = 0) -> bytes:
        """A copy of ``count`` bytes, ``offset`` after the cursor.

        Raises:
            NeedData: If they are not there yet.
        """
        at = self.require(count, offset)
        return bytes(memoryview(self.data)[at : at + count])

    def uint(self, count: int, offset: int = 0) -> int:
        """A big-endian unsigned number of ``count`` bytes.

        Raises:
            NeedData: If it is not there yet.
        """
        return int.from_bytes(self.peek(count, offset), "big")

    def _compact(self) -> None:
        pending = self.end - self.start
        size = len(self.data)
        if pending + MINIMUM_FREE_BYTES > size:
            if pending >= self._limit:
                raise StreamLimit(
                    f"an element of more than {self._limit} bytes", position=self.position
                )
            data = bytearray(min(max(2 * size, pending + MINIMUM_FREE_BYTES), 2 * self._limit))
        else:
            data = self.data
        memoryview(data)[:pending] = memoryview(self.data)[self.start : self.end]
        self.data = data
        self.base += self.start
        self.start = 0
        self.end = pending
