"""The ladder keeps the policy's order and bounds; the budget bounds the share of local prefills."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointState,
    EngineKind,
    Health,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
)
from pdcoord.core.ladder import BUDGET_SAMPLE_MIN, FallbackBudget, may_try_other, replaced_budgets, rungs
from pdcoord.core.model import Fallback, Model
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import RungKind
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side


def endpoint(name: str, role: Role = Role.DECODE, engine: EngineKind = EngineKind.VLLM) -> Endpoint:
    side = Side(Connector.PDCOORD, KvLayout(16))
    speed = SpeedFigures(0.01, 1e-4, 0.01)
    pool = Pool(PoolName("p"), ModelName("m"), role, "v", engine, side, speed, 1, 1e9)
    return Endpoint(EndpointId(name), pool, HostPort(f"{name}:1"))


def state(kv_usage: float | None = 0.5, engine: EngineKind = EngineKind.VLLM) -> EndpointState:
    sample = Sample(0, 0, kv_usage, 0.0) if kv_usage is not None else None
    return EndpointState(endpoint("d", engine=engine), 0, Health.READY, sample)


def model(fallback: Fallback) -> Model:
    return Model(ModelName("m"), (), fallback=fallback)


PREFILLS = tuple(endpoint(name, Role.PREFILL) for name in ("p1", "p2"))
ladders = st.lists(st.sampled_from(RungKind), unique=True).map(tuple)


def full(share: float) -> FallbackBudget:
    budget = FallbackBudget(100)
    for index in range(100):
        budget.note(is_fallback=index < share * 100)
    return budget


@given(ladder=ladders, prefill_count=st.integers(0, 2), is_full=st.booleans())
def test_rungs_are_the_policys_kinds_in_its_order_with_the_prefills_it_was_given(
    ladder: tuple[RungKind, ...], prefill_count: int, *, is_full: bool
) -> None:
    rules = model(Fallback(rungs=ladder, colocated_share_max=0.5))
    budget = full(0.6) if is_full else FallbackBudget(100)
    steps = rungs(rules, state(), PREFILLS[:prefill_count], budget)
    assert [s.prefill for s in steps if s.kind is RungKind.OTHER_PREFILL] == (
        list(PREFILLS[:prefill_count]) if RungKind.OTHER_PREFILL in ladder else []
    )
    assert (RungKind.COLOCATED in {s.kind for s in steps}) == (RungKind.COLOCATED in ladder and not is_full)
    positions = [ladder.index(s.kind) for s in steps]
    assert positions == sorted(positions)
    assert {s.kind for s in steps} <= {RungKind.OTHER_PREFILL, RungKind.COLOCATED}


def test_nobody_is_sent_to_prefill_where_it_cannot() -> None:
    rules = model(Fallback())
    assert RungKind.COLOCATED not in {
        s.kind for s in rungs(rules, state(engine=EngineKind.SGLANG), PREFILLS, FallbackBudget(100))
    }


@pytest.mark.parametrize(
    ("kv_usage", "expected"), [(None, True), (0.0, True), (0.9, True), (0.91, False), (1.0, False)]
)
def test_a_full_kv_pool_takes_no_local_prefill(kv_usage: float | None, *, expected: bool) -> None:
    assert FallbackBudget(100).allows(Fallback(decode_kv_usage_max=0.9), state(kv_usage)) is expected


def test_a_ladder_without_the_rung_never_allows_it() -> None:
    assert not FallbackBudget(100).allows(Fallback(rungs=(RungKind.OTHER_PREFILL,)), state())


@pytest.mark.parametrize(
    ("share", "share_max", "expected"),
    [
        (0.0, 0.5, True),
        (0.49, 0.5, True),
        (0.5, 0.5, False),
        (1.0, 0.5, False),
        (1.0, 1.0, True),
        (0.0, 0.0, False),
    ],
)
def test_the_share_is_kept_below_its_bound(share: float, share_max: float, *, expected: bool) -> None:
    assert full(share).allows(Fallback(colocated_share_max=share_max), state()) is expected


@given(st.integers(1, 50), st.lists(st.booleans(), max_size=120))
def test_the_share_is_that_of_the_last_window(window: int, notes: list[bool]) -> None:
    budget = FallbackBudget(window)
    recent: deque[bool] = deque(maxlen=window)
    for is_fallback in notes:
        budget.note(is_fallback=is_fallback)
        recent.append(is_fallback)
        expected = sum(recent) / len(recent) if len(recent) >= min(window, BUDGET_SAMPLE_MIN) else 0.0
        assert budget.share == expected
    assert budget.window == window


def test_one_early_fallback_is_no_share_yet() -> None:
    budget = FallbackBudget(200)
    for _ in range(BUDGET_SAMPLE_MIN - 1):
        budget.note(is_fallback=True)
    assert budget.share == 0.0
    budget.note(is_fallback=True)
    assert budget.share == 1.0


@pytest.mark.parametrize("share_max", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("before", [0, 19, 500])
def test_in_a_lasting_outage_the_share_served_tends_to_the_bound(share_max: float, before: int) -> None:
    budget, rules = FallbackBudget(200), Fallback(colocated_share_max=share_max)
    for _ in range(before):
        budget.note(is_fallback=False)
    served = 0
    for index in range(800):
        is_allowed = budget.allows(rules, state())
        budget.note(is_fallback=is_allowed)
        served += is_allowed and index >= 600
    assert share_max - 0.01 <= served / 200 <= share_max + 0.01


def test_another_decode_endpoint_is_tried_as_often_as_the_policy_says() -> None:
    rules = Fallback(other_decode_max=2)
    assert [may_try_other(model(rules), attempt) for attempt in (1, 2, 3)] == [True, True, False]
    assert not may_try_other(model(Fallback(rungs=(RungKind.COLOCATED,))), 1)


def test_budgets_go_on_with_their_models_where_the_window_is_as_it_was() -> None:
    before = replaced_budgets({}, [model(Fallback(window=7))])
    assert replaced_budgets(before, [model(Fallback(window=7))])["m"] is before["m"]
    other = replaced_budgets(before, [model(Fallback(window=8))])
    assert (other["m"].window, other["m"] is before["m"]) == (8, False)
    assert replaced_budgets(before, []) == {}
