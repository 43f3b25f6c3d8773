"""Named points in time, kept in order; the caller brings the clock."""

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """At most one timer for each key; equal times run in the order they were set."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._live: dict[K, int] = {}
        self._count = 0

    def __contains__(self, key: K) -> bool:
        return key in self._live

    def __len__(self) -> int:
        return len(self._live)

    def set(self, key: K, at_s: float) -> None:
        """Start a timer, in place of the one the key had."""
        self._count += 1
        self._live[key] = self._count
        heapq.heappush(self._heap, (at_s, self._count, key))
        # Replaced timers stay in the heap until their time; a timer that is moved often would grow it.
        if len(self._heap) > 64 + 2 * len(self._live):
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def clear(self, key: K) -> None:
        self._live.pop(key, None)

    def next_s(self) -> float | None:
        """When the first timer is due; None without one."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> tuple[float, K] | None:
        """The first timer due by now, with its own time; None if none is."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now_s:
            return None
        at_s, _, key = heapq.heappop(self._heap)
        del self._live[key]
        return at_s, key

    def _drop_stale(self) -> None:
        while self._heap and self._live.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
