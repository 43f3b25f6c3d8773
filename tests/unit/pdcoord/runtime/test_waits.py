"""Calls that wait: who hears of it, what is counted and shown, and the clock that ends a wait."""

import asyncio
from typing import Any

import pytest

from pdcoord.core.events import Dispatch, Outcome, Refuse, RequestEnded, ResponseBegan, TimePassed
from pdcoord.protocol.errors import RefuseReason
from pdcoord.runtime.explain import _turn
from pdcoord.runtime.waits import Alarm


@pytest.fixture
def busy(bench: Any) -> Any:
    """A loop in which the next request must wait."""
    bench.fill()
    return bench


def test_who_waits_hears_of_its_turn_and_nobody_else_does(busy: Any) -> None:
    assert busy.arrive("a", 50_000) is None
    assert busy.arrive("b", 50_000) is None
    busy.now_s += 1.0
    assert busy.loop.handle(ResponseBegan("fill-0", None)) == []
    (turn,) = busy.decided
    assert isinstance(turn, Dispatch)
    assert turn.id == "a"
    assert busy.metric('pdcoord_gateway_wait_seconds_sum{model="m",priority="0"}') == pytest.approx(1.0)
    assert busy.metric('pdcoord_gateway_waiting{model="m",priority="0"}') == 1.0
    assert busy.metric('pdcoord_gateway_waiting_work_seconds{model="m",priority="0"}') > 0.0


def test_a_wait_is_shown_while_it_lasts_and_after(busy: Any) -> None:
    busy.arrive("a", 50_000)
    view = busy.loop.decision_view("a")
    assert (view.is_waiting, view.waited_ms, view.attempts, view.outcome) == (True, None, [], None)
    assert _turn(view) == "no tenant, priority 0, waits for its turn"
    busy.now_s += 1.0
    busy.loop.handle(ResponseBegan("fill-0", None))
    view = busy.loop.decision_view("a")
    assert (view.is_waiting, view.waited_ms, len(view.attempts)) == (False, pytest.approx(1_000.0), 1)
    assert _turn(view) == "no tenant, priority 0, waited 1,000.0 ms for its turn"


def test_a_wait_in_vain_is_a_refusal_with_its_reason_and_is_counted(busy: Any) -> None:
    busy.arrive("a", tokens=200_000)
    busy.now_s += 5.0
    busy.loop.handle(TimePassed())
    (end,) = busy.decided
    assert isinstance(end, Refuse)
    assert end.refusal.reason is RefuseReason.WAITED_TOO_LONG
    view = busy.loop.decision_view("a")
    assert (view.outcome, view.waited_ms) == ("refused", pytest.approx(5_000.0))
    assert view.refusal.startswith("waited-too-long: ")
    series = 'pdcoord_gateway_shed_total{model="m",priority="0",reason="waited-too-long"}'
    assert busy.metric(series) == 1.0


def test_the_sheddable_is_refused_at_once_and_counted_by_its_priority(busy: Any) -> None:
    assert busy.arrive("low", 50_000, priority=-1).reason is RefuseReason.SHED
    assert busy.metric('pdcoord_gateway_shed_total{model="m",priority="-1",reason="shed"}') == 1.0


def test_after_its_end_nobody_hears_of_a_wait(busy: Any) -> None:
    busy.arrive("a", 50_000)
    busy.now_s += 1.0
    busy.loop.handle(RequestEnded("a", Outcome.CLIENT_GONE))
    busy.loop.handle(ResponseBegan("fill-0", None))
    assert busy.decided == []
    view = busy.loop.decision_view("a")
    assert (view.outcome, view.is_waiting, view.waited_ms) == ("client-gone", False, pytest.approx(1_000.0))


def test_an_endpoint_of_a_requests_name_takes_nothing_for_its_own(busy: Any) -> None:
    """Ids of requests are the clients' to choose."""
    busy.arrive("wide/d0", 50_000)
    busy.now_s += 1.0
    busy.ready("wide/d0")
    assert busy.decided == []
    busy.now_s += 0.1
    busy.loop.handle(ResponseBegan("fill-0", None))
    (turn,) = busy.decided
    assert turn.id == "wide/d0"


async def test_the_alarm_goes_off_when_the_core_wants_and_not_before() -> None:
    clock = asyncio.get_running_loop().time
    wanted: list[float | None] = [None]
    heard: list[float] = []

    def tell(event: TimePassed) -> None:
        assert event == TimePassed()
        heard.append(clock())
        wanted[0] = None

    alarm = Alarm(tell, lambda: wanted[0], clock)
    async with asyncio.timeout(10.0), asyncio.TaskGroup() as group:
        task = group.create_task(alarm.run())
        await asyncio.sleep(0)
        for later_s in (60.0, 0.01):  # The second is earlier, and only it comes about.
            wanted[0] = at_s = clock() + later_s
            alarm.look()
            await asyncio.sleep(0)
        while not heard:
            await asyncio.sleep(0.001)
        task.cancel()
    assert len(heard) == 1
    assert heard[0] >= at_s - 0.001
