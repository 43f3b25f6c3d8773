"""What a refused request is told."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core import refusals
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, ModelName, Pool, PoolLimits, PoolName, Role
from pdcoord.core.model import Model
from pdcoord.core.plan import DropReason
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RefuseReason
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
DECODE = Pool(
    name=PoolName("d"),
    model=M,
    role=Role.DECODE,
    vendor="v",
    engine=EngineKind.VLLM,
    side=Side(Connector.PDCOORD, KvLayout(16)),
    speed=SpeedFigures(0.01, 1e-4, 0.01),
    kv_bytes_per_token=1_000,
    link_bytes_per_s=1e10,
    limits=PoolLimits(context_tokens_max=1_000),
)
MODEL = Model(M, (DECODE,))
REQUEST = Request(RequestId("r"), M, 10)


@given(st.floats(0.0, 1e9))
def test_a_retry_is_asked_for_within_a_minute(drain_s: float) -> None:
    seconds = refusals.retry_after_s(drain_s)
    assert 1 <= seconds <= 60
    assert seconds >= min(drain_s, 60.0)


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (refusals.saturated(), RefuseReason.SATURATED),
        (refusals.queue_full(3.2), RefuseReason.QUEUE_FULL),
        (refusals.waited_too_long(30.0, 3.2), RefuseReason.WAITED_TOO_LONG),
        (refusals.deadline(2.0, 0.5, 3.2), RefuseReason.DEADLINE),
        (refusals.shed(3.2), RefuseReason.SHED),
    ],
)
def test_want_of_capacity_is_429_with_a_time_to_retry(
    refusal: refusals.Refusal, reason: RefuseReason
) -> None:
    assert (refusal.reason, refusal.status) == (reason, 429)
    assert refusal.retry_after_s in {1, 4}
    assert "Retry-After" in refusal.message


def test_a_missed_deadline_names_both_times() -> None:
    message = refusals.deadline(2.0, 0.5, 0.0).message
    assert "2000 ms" in message
    assert "500 ms" in message


def test_what_no_wait_would_change_comes_first() -> None:
    full = {DropReason.AT_LIMIT: 1}
    long = replace(REQUEST, prompt_tokens=1_000, is_prompt_counted=True)
    assert refusals.why_nobody(long, MODEL, full).reason is RefuseReason.CONTEXT_TOO_LONG
    sglang = replace(DECODE, engine=EngineKind.SGLANG)
    many = replace(REQUEST, choice_count=2)
    assert refusals.why_nobody(many, Model(M, (sglang,)), full).reason is RefuseReason.NOT_SERVED
    assert refusals.why_never(REQUEST, MODEL) is None
    assert refusals.why_nobody(REQUEST, MODEL, full) is refusals.AT_LIMIT
    assert refusals.why_nobody(REQUEST, MODEL, {}).reason is RefuseReason.NO_ENDPOINTS
