"""What is due when in a coarse run: a heap of calls, equal times in the order they were asked for."""

import heapq
from collections.abc import Callable
from typing import Any

Do = Callable[[Any], None]


class Agenda:
    """Virtual time. It passes only as what is due is taken out.

    Attributes:
        now_s: the time of what was taken last.
    """

    __slots__ = ("_heap", "_order", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Do, Any]] = []
        self._order = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, at_s: float, do: Do, subject: Any = None) -> None:
        """Have `do(subject)` called at `at_s`."""
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, do, subject))

    def after(self, delay_s: float, do: Do, subject: Any = None) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._order, do, subject))

    def next_s(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def take(self) -> tuple[Do, Any]:
        """What is due next; the clock goes there, and never back."""
        at_s, _, do, subject = heapq.heappop(self._heap)
        self.now_s = max(self.now_s, at_s)
        return do, subject
