"""Virtual time: a heap of due calls, run in order; equal times run in the order they were asked for."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

CALLS_MAX = 50_000_000
"""Calls of one run; past it the simulated system is taken to be stuck in a loop."""


@dataclass(order=True, slots=True)
class Timer:
    """A call that is due; `cancel` forgets it."""

    at_s: float
    order: int
    call: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        self.call = None


class VirtualLoop:
    """The clock of a simulation. Time passes only by running what is due."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[Timer] = []
        self._order = 0

    def at(self, at_s: float, call: Callable[[], None]) -> Timer:
        """Run `call` at `at_s`, or now if that is past."""
        self._order += 1
        timer = Timer(max(at_s, self.now_s), self._order, call)
        heapq.heappush(self._heap, timer)
        return timer

    def after(self, delay_s: float, call: Callable[[], None]) -> Timer:
        return self.at(self.now_s + delay_s, call)

    def run(self, *, until_s: float | None = None) -> None:
        """Run until nothing is due, or nothing up to `until_s`.

        Raises:
            RuntimeError: after CALLS_MAX calls.
        """
        for _ in range(CALLS_MAX):
            if not self._heap or (until_s is not None and self._heap[0].at_s > until_s):
                self.now_s = max(self.now_s, until_s or 0.0)
                return
            timer = heapq.heappop(self._heap)
            if timer.call is not None:
                self.now_s = timer.at_s
                timer.call()
        raise RuntimeError(f"the simulation made {CALLS_MAX} calls and did not end at {self.now_s} s")
