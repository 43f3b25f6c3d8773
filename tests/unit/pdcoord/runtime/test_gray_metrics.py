"""Metrics of gray failures: what is out, what is not believed, and a second attempt in the decision log."""

from collections.abc import Callable
from dataclasses import replace

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.doubts import Doubt
from pdcoord.core.events import Dispatch, HedgeAsked, HedgeOver, ModelsReplaced, RequestArrived
from pdcoord.core.hedging import HedgeEnd, id_of
from pdcoord.core.model import Model
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.core.trouble import Symptom
from pdcoord.protocol.errors import RungReason
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.gray_metrics import DOUBTED, HEDGES, QUARANTINED, QUARANTINES, gray_samples

R = RequestId("r")


def test_every_pool_and_model_has_all_series_from_the_start(model: Model) -> None:
    coordinator = Coordinator()
    coordinator.handle(ModelsReplaced((model,)), 0.0)
    found = {spec: list(samples) for spec, samples in gray_samples(coordinator)}
    pools = {pool.name for pool in model.pools}
    for spec, kinds in ((QUARANTINED, Symptom), (QUARANTINES, Symptom), (DOUBTED, Doubt)):
        assert {key for key, _ in found[spec]} == {(pool, kind) for pool in pools for kind in kinds}
    assert {key for key, _ in found[HEDGES]} == {(model.name, end) for end in HedgeEnd}
    assert all(value == 0.0 for samples in found.values() for _, value in samples)


def log_of_two(plan: Callable[..., Plan], over: HedgeOver) -> list[tuple[bool, bool, str | None]]:
    """Of each attempt: whether it was the second, whether it was outrun, and why it failed."""
    log = DecisionLog(4)
    first = replace(plan(R), request_id=R)
    log.arrived(Request(R, first.decode.pool.model, 10), [Dispatch(first)], now_s=0.0, decision_s=0.0)
    log.hedged(HedgeAsked(R), [])
    log.hedged(HedgeAsked(R), [Dispatch(replace(first, request_id=id_of(R)))])
    log.hedged(over, [])
    log.hedged(HedgeOver(RequestId("unknown"), is_won=True), [])
    view = log.view(R, now_s=1.0)
    assert view is not None
    return [(each.is_second, each.is_outrun, each.failure) for each in view.attempts]


def test_the_attempt_that_goes_on_is_the_last(plan: Callable[..., Plan]) -> None:
    assert log_of_two(plan, HedgeOver(R, is_won=True)) == [(False, True, None), (True, False, None)]
    assert log_of_two(plan, HedgeOver(R, is_won=False)) == [(True, True, None), (False, False, None)]
    failed = HedgeOver(R, is_won=False, reason=RungReason.DECODE_ERROR)
    assert log_of_two(plan, failed) == [(True, False, "decode-error"), (False, False, None)]


def test_a_request_that_arrives_is_no_second_attempt(model: Model) -> None:
    coordinator = Coordinator()
    coordinator.handle(ModelsReplaced((model,)), 0.0)
    coordinator.handle(RequestArrived(Request(R, model.name, 10)), 0.0)
    assert not coordinator.hedges.counts
