"""Two attempts at one call: who serves it, what the core is told, and that nothing is left open."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.front.account import Account
from pdcoord.gateway.attempts import Failure, Opened
from pdcoord.gateway.hedging import Race
from pdcoord.gateway.held import Held
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason, RungReason
from pdcoord.wire.response import Response

ANSWER = Held(500, [], b"own words")


class Head:
    """An upstream's answer, of which only headers are read."""

    def __init__(self, **headers: bytes) -> None:
        self._headers = {b"content-type": b"text/event-stream; charset=utf-8"} | {
            name.replace("_", "-").encode(): value for name, value in headers.items()
        }

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)


class Told:
    """In place of the call's account: lets a second attempt be made from the ask numbered `from_ask` on."""

    def __init__(self, second: Plan, from_ask: int = 1) -> None:
        self.second = second
        self.from_ask = from_ask
        self.asks = 0
        self.said: list[tuple[str, RungReason | None]] = []

    def ask_second(self) -> Plan | None:
        self.asks += 1
        return self.second if self.asks >= self.from_ask else None

    def take_second(self, reason: RungReason | None = None, served: object = None) -> None:
        assert served is None
        self.said.append(("take", reason))

    def leave_second(self, reason: RungReason | None = None, served: object = None) -> None:
        assert served is None
        self.said.append(("leave", reason))


class Attempts:
    """Attempts that end when the test says so.

    Attributes:
        ended: of each plan's id, how its attempt ended: opened, failed, cancelled, closed.
    """

    def __init__(self) -> None:
        self.ends: dict[str, asyncio.Future[Opened | Failure]] = {}
        self.ended: dict[str, str] = {}

    async def __call__(self, plan: Plan) -> Opened | Failure:
        name = plan.request_id
        end = self.ends[name] = asyncio.get_running_loop().create_future()
        try:
            found = await end
        except asyncio.CancelledError:
            self.ended[name] = "cancelled"
            raise
        self.ended[name] = "opened" if isinstance(found, Opened) else "failed"
        if isinstance(found, Opened):
            found.stack.callback(self.ended.__setitem__, name, "closed")
        return found

    async def began(self, name: str) -> asyncio.Future[Opened | Failure]:
        async with asyncio.timeout(10.0):
            while name not in self.ends:
                await asyncio.sleep(0.001)
        return self.ends[name]


class Stage:
    def __init__(self, plan: Plan, from_ask: int = 1) -> None:
        self.plan = replace(plan, request_id=RequestId("one"), hedge_after_s=0.01)
        self.told = Told(replace(plan, request_id=RequestId("two")), from_ask)
        self.attempts = Attempts()

    def opened(self, name: str) -> Opened:
        return Opened(
            replace(self.plan, request_id=RequestId(name)), cast("Response", Head()), None, b"data: 1\n\n"
        )

    async def run(self, direct: Callable[["Stage"], Any]) -> Opened | Failure:
        """The race's end, with `direct` running beside it."""
        async with asyncio.timeout(20.0), asyncio.TaskGroup() as group:
            directing = group.create_task(direct(self))
            race = Race(cast("Account", self.told), self.attempts, group)
            found = await race.run(self.plan)
            await directing
        return found


@pytest.fixture
def first(plan: Callable[..., Plan]) -> Plan:
    return plan(RequestId("one"))


@pytest.mark.parametrize(
    ("headers", "first_part", "held", "has_output"),
    [
        ({}, b"data: 1\n\n", None, True),
        ({}, b"", None, False),
        ({}, b"data: 1\n\n", ANSWER, False),
        ({}, b"event: response.created\ndata: {}\n\n", None, False),
        ({"content_encoding": b"gzip"}, b"data: 1\n\n", None, False),
        ({"content_type": b"application/json"}, b'{"choices":[]}', None, False),
        ({"content_type": b"application/json"}, b"data: 1\n\n", None, False),
    ],
)
def test_only_a_plain_stream_that_shows_a_token_has_output(
    first: Plan, headers: dict[str, bytes], first_part: bytes, held: Held | None, *, has_output: bool
) -> None:
    opened = Opened(first, cast("Response", Head(**headers)), None, first_part, held)
    assert opened.has_output is has_output


async def test_who_answers_in_time_has_no_second(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        (await stage.attempts.began("one")).set_result(stage.opened("one"))

    stage = Stage(first)
    stage.plan = replace(stage.plan, hedge_after_s=30.0)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    assert (found.plan.request_id, stage.told.asks, stage.told.said) == ("one", 0, [])


async def test_the_second_that_is_first_serves_and_the_other_is_cancelled(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        (await stage.attempts.began("two")).set_result(stage.opened("two"))

    stage = Stage(first)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    assert (found.plan.request_id, stage.told.said) == ("two", [("take", None)])
    assert stage.attempts.ended == {"one": "cancelled", "two": "opened"}


async def test_the_first_that_answers_after_all_serves_and_the_other_is_cancelled(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        await stage.attempts.began("two")
        (await stage.attempts.began("one")).set_result(stage.opened("one"))

    stage = Stage(first)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    assert (found.plan.request_id, stage.told.said) == ("one", [("leave", None)])
    assert stage.attempts.ended == {"one": "opened", "two": "cancelled"}


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
async def test_of_two_that_answer_at_one_moment_one_is_closed(first: Plan, order: tuple[str, str]) -> None:
    async def direct(stage: Stage) -> None:
        await stage.attempts.began("two")
        for name in order:
            stage.attempts.ends[name].set_result(stage.opened(name))

    stage = Stage(first)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    served = found.plan.request_id
    assert stage.attempts.ended[served] == "opened"
    other = "two" if served == "one" else "one"
    assert stage.attempts.ended[other] in {"closed", "cancelled"}
    assert stage.told.said == [("take" if served == "two" else "leave", None)]


async def test_the_first_fails_and_the_second_is_waited_for(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        second = await stage.attempts.began("two")
        (await stage.attempts.began("one")).set_result(Failure(RungReason.DECODE_ERROR))
        await asyncio.sleep(0)
        second.set_result(stage.opened("two"))

    stage = Stage(first)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    assert (found.plan.request_id, stage.told.said) == ("two", [("take", RungReason.DECODE_ERROR)])
    assert stage.attempts.ended == {"one": "failed", "two": "opened"}


async def test_both_fail_and_what_an_engine_said_is_kept(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        second = await stage.attempts.began("two")
        second.set_result(Failure(RungReason.DECODE_ERROR, answer=ANSWER))
        while not stage.told.said:
            await asyncio.sleep(0)
        (await stage.attempts.began("one")).set_result(Failure(RungReason.DECODE_TIMEOUT))

    stage = Stage(first)
    found = await stage.run(direct)
    assert found == Failure(RungReason.DECODE_TIMEOUT, answer=ANSWER)
    assert stage.told.said == [("leave", RungReason.DECODE_ERROR)]


async def test_both_fail_the_other_way_round(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        second = await stage.attempts.began("two")
        (await stage.attempts.began("one")).set_result(Failure(RungReason.DECODE_ERROR, answer=ANSWER))
        while not stage.told.said:
            await asyncio.sleep(0)
        second.set_result(Failure(RungReason.DECODE_OVERLOADED))

    stage = Stage(first)
    found = await stage.run(direct)
    assert found == Failure(RungReason.DECODE_OVERLOADED, answer=ANSWER)
    assert stage.told.said == [("take", RungReason.DECODE_ERROR)]


async def test_a_second_that_cannot_be_sent_is_one_that_failed(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        refusal = Refusal(RefuseReason.INVALID_FIELD, "no")
        (await stage.attempts.began("two")).set_exception(RefusedError(refusal))
        while not stage.told.said:
            await asyncio.sleep(0)
        (await stage.attempts.began("one")).set_result(stage.opened("one"))

    stage = Stage(first)
    found = await stage.run(direct)
    assert isinstance(found, Opened)
    assert stage.told.said == [("leave", RungReason.DECODE_ERROR)]


async def test_the_core_is_asked_again_until_it_allows_one(first: Plan) -> None:
    async def direct(stage: Stage) -> None:
        (await stage.attempts.began("two")).set_result(stage.opened("two"))

    stage = Stage(first, from_ask=4)
    await stage.run(direct)
    assert stage.told.asks == 4


async def test_a_call_that_is_cancelled_leaves_neither(first: Plan) -> None:
    stage = Stage(first)

    async def direct(stage: Stage) -> None:
        await stage.attempts.began("two")
        raise ConnectionError("the client left")

    with pytest.raises(ExceptionGroup):
        await stage.run(direct)
    assert stage.attempts.ended == {"one": "cancelled", "two": "cancelled"}
