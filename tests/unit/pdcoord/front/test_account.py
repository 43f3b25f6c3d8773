"""What becomes of a call before the core, in the order that the core decides in."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pdcoord.core.events import DecodeFailed, Dispatch, Outcome, Refuse, RequestArrived, RequestEnded, Wait
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.front.account import Account
from pdcoord.front.ports import CallRecord
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason, RungReason

R = RequestId("r")
FULL = Refusal(RefuseReason.SATURATED, "Full.")


class Core:
    """Answers with the next of a script, and keeps what it was told."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.events: list[Any] = []
        self.decided: Callable[[Dispatch | Refuse], None] | None = None

    def handle(self, event: Any) -> list[Any]:
        self.events.append(event)
        return [self.script.pop(0)] if not isinstance(event, RequestEnded) else []

    def expect(self, request_id: RequestId, decided: Callable[[Dispatch | Refuse], None]) -> None:
        self.decided = decided

    def decide(self, action: Dispatch | Refuse) -> None:
        assert self.decided is not None
        self.decided(action)


def opened(core: Any) -> tuple[Account, CallRecord, RequestArrived]:
    record = CallRecord(id=R, path="/v1/completions", began_s=0.0)
    return Account(core, record), record, RequestArrived(Request(R, "m", prompt_tokens=1))  # type: ignore[arg-type]


def test_a_call_that_goes_at_once_is_ended_once(plan: Callable[..., Plan]) -> None:
    core = Core(Dispatch(plan("r")))
    account, record, arrived = opened(core)
    assert (account.is_asked, account.is_live) == (False, False)
    assert account.ask(arrived) is record.plan
    assert (account.is_asked, account.is_live) == (True, True)
    account.end(Outcome.OK, 3)
    account.end(Outcome.CLIENT_GONE, None)
    assert core.events == [arrived, RequestEnded(R, Outcome.OK, 3)]


def test_a_call_that_is_refused_has_ended() -> None:
    core = Core(Refuse(R, FULL))
    account, record, arrived = opened(core)
    with pytest.raises(RefusedError, match="Full"):
        account.ask(arrived)
    account.end(Outcome.REFUSED, None)
    assert (core.events, record.plan, account.is_asked) == ([arrived], None, True)


async def test_a_call_that_waits_is_live_and_hears_what_was_decided(plan: Callable[..., Plan]) -> None:
    core = Core(Wait(R))
    account, _, arrived = opened(core)
    assert account.ask(arrived) is None
    assert account.is_live
    made = plan("r")
    core.decide(Dispatch(made))
    async with asyncio.timeout(5.0):
        assert await account.planned() is made


async def test_what_was_refused_while_it_waited_is_not_ended_again() -> None:
    core = Core(Wait(R))
    account, _, arrived = opened(core)
    account.ask(arrived)
    core.decide(Refuse(R, FULL))
    account.end(Outcome.CLIENT_GONE, None)
    assert core.events == [arrived]
    with pytest.raises(RefusedError):
        await account.planned()


async def test_after_a_failure_a_call_may_wait_once_more(plan: Callable[..., Plan]) -> None:
    core = Core(Wait(R), Wait(R))
    account, _, arrived = opened(core)
    account.ask(arrived)
    core.decide(Dispatch(plan("r")))
    assert account.ask(DecodeFailed(R, RungReason.DECODE_ERROR)) is None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await account.planned()
    other = plan("r", decode="10.0.0.9:8000")
    core.decide(Dispatch(other))
    async with asyncio.timeout(5.0):
        assert await account.planned() is other
