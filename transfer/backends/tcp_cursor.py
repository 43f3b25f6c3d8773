"""A place in a row of buffers that a socket empties or fills bit by bit."""

from collections.abc import Sequence

VIEWS_MAX = 256
BYTES_MAX = 8 << 20
"""Most bytes of one system call: what a connection gets before another has its turn."""


class Cursor:
    """Walks the views once; none of them may be empty."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._index = 0
        self._offset = 0

    @property
    def is_at_end(self) -> bool:
        return self._index == len(self._views)

    def window(self) -> list[memoryview]:
        """What comes next, for sendmsg or recvmsg_into; empty at the end."""
        window: list[memoryview] = []
        total_bytes = 0
        offset = self._offset
        for index in range(self._index, min(len(self._views), self._index + VIEWS_MAX)):
            view = self._views[index][offset:]
            window.append(view[: BYTES_MAX - total_bytes])
            total_bytes += len(window[-1])
            if total_bytes >= BYTES_MAX:
                break
            offset = 0
        return window

    def advance(self, byte_count: int) -> None:
        """Go on by so many bytes, at most those of the window."""
        self._offset += byte_count
        while self._index < len(self._views) and self._offset >= len(self._views[self._index]):
            self._offset -= len(self._views[self._index])
            self._index += 1
