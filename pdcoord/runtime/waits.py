"""Calls that wait for their turn: who hears of it, what is counted, and the clock that ends a wait."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    Event,
    HedgeAsked,
    Refuse,
    RequestArrived,
    StreamBroke,
    TimePassed,
    Wait,
)
from pdcoord.core.hedging import id_of
from pdcoord.core.request import Request, RequestId
from pdcoord.front.ports import Decided
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.observe import Metrics

_TOO_MANY_REQUESTS = 429
TICK_S_MIN = 0.001
"""The core is asked no more often than this because of time alone."""


@dataclass(slots=True)
class _Wait:
    model: str
    priority: str
    since_s: float
    decided: Decided | None = None


class Waits:
    """Keeps an entry for each call that was told to wait, until it is dispatched, refused or ended."""

    def __init__(self, decisions: DecisionLog, metrics: Metrics) -> None:
        self._decisions = decisions
        self._metrics = metrics
        self._waits: dict[RequestId, _Wait] = {}

    def __len__(self) -> int:
        return len(self._waits)

    def expect(self, request_id: RequestId, decided: Decided) -> None:
        """Have `decided` called, once, with what becomes of a call that waits."""
        self._waits[request_id].decided = decided

    def end(self, request_id: RequestId) -> None:
        """The call is over; nobody wants to hear more of it."""
        self._waits.pop(request_id, None)

    def sort(self, event: Event, actions: list[Action], now_s: float) -> list[Action]:
        """The actions of the event's own request; those of calls that wait are delivered."""
        request = event.request if isinstance(event, RequestArrived) else None
        own = request.id if request is not None else None
        if isinstance(event, DecodeFailed | StreamBroke):
            own = event.id
        elif isinstance(event, HedgeAsked):
            own = id_of(event.id)
        kept: list[Action] = []
        for action in actions:
            if action.id == own:
                kept.append(action)
                if request is not None:
                    self._note_own(request, action, now_s)
            elif not isinstance(action, Wait):
                self._deliver(action, now_s)
        return kept

    def _note_own(self, request: Request, action: Action, now_s: float) -> None:
        if isinstance(action, Wait):
            self._waits[request.id] = _Wait(request.model, str(request.priority), now_s)
        elif isinstance(action, Refuse):
            self._count_refusal(request.model, str(request.priority), action)

    def _deliver(self, action: Dispatch | Refuse, now_s: float) -> None:
        wait = self._waits.pop(action.id)
        self._decisions.waited(action, now_s=now_s)
        self._metrics.wait_seconds.labels(wait.model, wait.priority).observe(now_s - wait.since_s)
        if isinstance(action, Refuse):
            self._count_refusal(wait.model, wait.priority, action)
        if wait.decided is not None:
            wait.decided(action)

    def _count_refusal(self, model: str, priority: str, action: Refuse) -> None:
        if action.refusal.status == _TOO_MANY_REQUESTS:
            self._metrics.shed.labels(model, priority, action.refusal.reason).inc()


class Alarm:
    """Tells of the time that the core asked for.

    Args:
        next_s: when that is, by `clock`; None for no time at all.
    """

    def __init__(
        self,
        tell: Callable[[TimePassed], object],
        next_s: Callable[[], float | None],
        clock: Callable[[], float],
    ) -> None:
        self._tell = tell
        self._next_s = next_s
        self._clock = clock
        self._set_for_s: float | None = None
        self._is_moved = asyncio.Event()

    def look(self) -> None:
        """Something happened: the core may want to hear of an earlier time now."""
        at_s = self._next_s()
        if at_s is not None and (self._set_for_s is None or at_s < self._set_for_s):
            self._is_moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._is_moved.clear()
            self._set_for_s = self._next_s()
            wait_s = None if self._set_for_s is None else max(self._set_for_s - self._clock(), TICK_S_MIN)
            try:
                async with asyncio.timeout(wait_s):
                    await self._is_moved.wait()
            except TimeoutError:
                self._tell(TimePassed())
