"""One call before the core: asked for, waited for, and ended exactly once."""

import asyncio
from dataclasses import replace

from pdcoord.core.events import (
    DecodeFailed,
    Dispatch,
    HedgeAsked,
    HedgeOver,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    StreamBroke,
    Wait,
)
from pdcoord.core.plan import Plan
from pdcoord.front.ports import CallRecord, Coordination
from pdcoord.protocol.errors import Refusal, RefusedError, RungReason
from pdcoord.protocol.plans import ServedHeader


class Account:
    """What the core keeps of one call, as far as the front must know.

    Args:
        record: told each plan; its id is the core's.

    Attributes:
        is_asked: the core has heard of the call.
        is_live: the core keeps an account of it and must hear of its end.
    """

    __slots__ = ("_coordination", "_decided", "_record", "_refusal", "_second", "is_asked", "is_live")

    def __init__(self, coordination: Coordination, record: CallRecord) -> None:
        self._coordination = coordination
        self._record = record
        self._decided: asyncio.Event | None = None
        self._refusal: Refusal | None = None
        self._second: Plan | None = None
        self.is_asked = False
        self.is_live = False

    def ask(self, event: RequestArrived | DecodeFailed | StreamBroke) -> Plan | None:
        """Have the call planned, first or anew; None if it must wait, and then `planned`.

        Raises:
            RefusedError: if the core refuses, and then the call has ended for it.
        """
        self.is_asked = True
        (action,) = self._coordination.handle(event)
        if isinstance(action, Wait):
            self.is_live = True
            self._decided = asyncio.Event()
            self._coordination.expect(self._record.id, self._take)
            return None
        self._take(action)
        return self._plan()

    async def planned(self) -> Plan:
        """The plan of a call that waits; the core bounds how long that is.

        Raises:
            RefusedError: as of `ask`.
        """
        assert self._decided is not None, "asked for the plan of a call that does not wait"
        await self._decided.wait()
        return self._plan()

    def ask_second(self) -> Plan | None:
        """Ask for a second attempt beside the one that shows no output; None if there may be none now."""
        if not self.is_live:
            return None
        for action in self._coordination.handle(HedgeAsked(self._record.id)):
            if isinstance(action, Dispatch):
                self._second = action.plan
                return action.plan
        return None

    def take_second(self, reason: RungReason | None = None, served: ServedHeader | None = None) -> None:
        """The call goes on with its second attempt.

        Args:
            reason: why the first failed; None where it was merely slower.
        """
        assert self._second is not None, "there is no second attempt"
        self._record.plan = replace(self._second, request_id=self._record.id)
        self._second = None
        self._coordination.handle(HedgeOver(self._record.id, is_won=True, reason=reason, served=served))

    def leave_second(self, reason: RungReason | None = None, served: ServedHeader | None = None) -> None:
        """The call goes on with its first attempt alone."""
        self._second = None
        self._coordination.handle(HedgeOver(self._record.id, is_won=False, reason=reason, served=served))

    def end(self, outcome: Outcome, output_tokens: int | None) -> None:
        """Tell the core that the call has ended, unless it knows."""
        if self.is_live:
            self.is_live = False
            self._coordination.handle(RequestEnded(self._record.id, outcome, output_tokens))

    def _take(self, action: Dispatch | Refuse) -> None:
        """Note what the core decided, at that moment: the call may be cancelled before it runs again."""
        match action:
            case Dispatch(plan):
                self.is_live = True
                self._record.plan = plan
            case Refuse(_, refusal):
                self.is_live = False
                self._refusal = refusal
        if self._decided is not None:
            self._decided.set()

    def _plan(self) -> Plan:
        if self._refusal is not None:
            raise RefusedError(self._refusal)
        assert self._record.plan is not None, "neither dispatched nor refused"
        return self._record.plan
