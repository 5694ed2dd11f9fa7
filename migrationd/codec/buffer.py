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
        position: Stream position of the first byte.

    Attributes:
        data: The storage; what is not decoded is ``data[start:end]``.
        start: Index of the cursor.
        end: Index behind the last byte that arrived.
        is_ended: Whether no more input comes.
    """

    def __init__(self, capacity: int, limit: int, position: int = 0) -> None:
        self._capacity = max(capacity, 2 * MINIMUM_FREE_BYTES)
        self._limit = max(limit, self._capacity)
        self.data = bytearray(self._capacity)
        self.start = 0
        self.end = 0
        self.is_ended = False
        self._base = position

    @property
    def position(self) -> int:
        """Stream position of the next undecoded byte."""
        return self._base + self.start

    def __len__(self) -> int:
        return self.end - self.start

    def free_view(self) -> memoryview:
        """Space for the next bytes, at least 64 KiB.

        Raises:
            StreamLimit: If one element would exceed the limit.
        """
        if self.start == self.end:
            self._base += self.start
            self.start = self.end = 0
            if len(self.data) > self._capacity:
                self.data = bytearray(self._capacity)
        elif len(self.data) - self.end < MINIMUM_FREE_BYTES:
            self._compact()
        return memoryview(self.data)[self.end :]

    def added(self, count: int) -> None:
        """Account for bytes written into :meth:`free_view`."""
        self.end += count

    def feed(self, data: bytes | memoryview) -> None:
        """Append a copy of ``data``.

        Raises:
            StreamLimit: If one element would exceed the limit.
        """
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

    def pass_over(self, count: int) -> None:
        """Drop what is here; go on ``count`` bytes behind the cursor, which were read elsewhere."""
        self._base += self.start + count
        self.start = self.end = 0

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
        if pending + MINIMUM_FREE_BYTES > len(self.data):
            if pending >= self._limit:
                raise StreamLimit(
                    f"an element of more than {self._limit} bytes", position=self.position
                )
            data = bytearray(max(2 * len(self.data), pending + MINIMUM_FREE_BYTES))
        else:
            data = self.data
        memoryview(data)[:pending] = memoryview(self.data)[self.start : self.end]
        self.data = data
        self._base += self.start
        self.start = 0
        self.end = pending
