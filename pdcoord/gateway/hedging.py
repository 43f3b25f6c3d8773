"""An attempt that shows no output for too long gets a second one beside it; whichever is first serves."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from pdcoord.core.plan import Plan
from pdcoord.front.account import Account
from pdcoord.gateway.attempts import Failure, Opened
from pdcoord.gateway.held import Held
from pdcoord.protocol.errors import RefusedError, RungReason

ASK_S_MAX = 16.0
"""Longest wait before the core is asked again for a second attempt that it did not allow."""


class Race:
    """One attempt, and the second that may be made beside it.

    Args:
        attempt: sends the call where a plan says, until it has something for the client or has failed.
        group: where the second attempt runs; ends no later than the call.
    """

    def __init__(
        self,
        account: Account,
        attempt: Callable[[Plan], Awaitable[Opened | Failure]],
        group: asyncio.TaskGroup,
    ) -> None:
        self._account = account
        self._attempt = attempt
        self._group = group
        self._timer: asyncio.TimerHandle | None = None
        self._patience = asyncio.timeout(None)
        self._second: asyncio.Task[Opened | Failure] | None = None
        self._spare: Opened | None = None
        self._held: Held | None = None

    async def run(self, plan: Plan) -> Opened | Failure:
        """What the call goes on with; the core has been told."""
        if plan.hedge_after_s is None:
            return await self._attempt(plan)
        self._ask_after(plan.hedge_after_s)
        first: Opened | Failure | None = None
        try:
            async with self._patience:
                first = await self._attempt(plan)
        except TimeoutError:
            if not self._patience.expired():
                raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
        try:
            return await self._choose(first)
        finally:
            if self._spare is not None:
                await self._spare.close()

    async def _choose(self, first: Opened | Failure | None) -> Opened | Failure:
        """Of the first attempt's end, or None where the second had its output before, and of the second."""
        second = self._second
        if first is None:
            assert self._spare is not None, "the first attempt was given up for nothing"
            self._account.take_second()
            won, self._spare = self._spare, None
            return won
        if second is None:
            return self._with_held(first)
        if isinstance(first, Opened):
            second.cancel()
            await asyncio.wait({second})
            self._account.leave_second()
            return first
        self._account.take_second(first.reason, first.served)
        self._held = first.answer
        self._second = None
        found = await second
        if isinstance(found, Opened):
            self._spare = None
        return self._with_held(found)

    def _with_held(self, found: Opened | Failure) -> Opened | Failure:
        """A failure with the other attempt's answer, if it has none of its own."""
        if isinstance(found, Failure) and found.answer is None:
            return replace(found, answer=self._held)
        return found

    def _ask_after(self, wait_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._ask, wait_s)

    def _ask(self, waited_s: float) -> None:
        plan = self._account.ask_second()
        if plan is None:
            self._ask_after(min(2.0 * waited_s, ASK_S_MAX))
        else:
            self._second = self._group.create_task(self._run_second(plan))

    async def _run_second(self, plan: Plan) -> Opened | Failure:
        try:
            found = await self._attempt(plan)
        except RefusedError:
            found = Failure(RungReason.DECODE_ERROR)
        if isinstance(found, Opened):
            self._spare = found
            if self._second is not None:
                # Whoever waits for the first need not any more.
                self._patience.reschedule(asyncio.get_running_loop().time())
        elif self._second is not None:
            self._second, self._held = None, found.answer
            self._account.leave_second(found.reason, found.served)
        return found
