"""One pair's results: whom a failure blames, how long the pauses are, whom to try with whom."""

import math
from dataclasses import replace

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.gates import UNTRIED
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import CanaryRules, Model
from pdcoord.core.trials import (
    NEW,
    NOT_NEEDED,
    REPEAT,
    RETRY,
    CanaryOrder,
    End,
    PairState,
    Side,
    UnlikePair,
    least_tried,
    neediest,
    pause_s,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName
from transfer.verdict import Connector
from transfer.verdict import Side as LayoutSide

M = ModelName("m")
FAST = Pool(
    PoolName("fast"),
    M,
    Role.PREFILL,
    "v",
    EngineKind.VLLM,
    LayoutSide(Connector.PDCOORD, None),
    SpeedFigures(0.01, 1e-4, 0.01),
    1_000,
    1e10,
)
WIDE = replace(FAST, name=PoolName("wide"), role=Role.DECODE)
PASSED = Finding(CanaryOutcome.PASSED)
WRONG = Finding(CanaryOutcome.TOKENS)
UNPROVEN = Finding(CanaryOutcome.UNPROVEN)


def endpoint(of: Pool, index: int) -> Endpoint:
    return Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))


def order(prefill: int, decode: int) -> CanaryOrder:
    ends = endpoint(FAST, prefill), endpoint(WIDE, decode)
    return CanaryOrder(0, M, *ends, ends[1], CanaryRules(), DialectName.NIXLV2, 320, 4.0)


def pair() -> UnlikePair:
    return UnlikePair(Model(M, (FAST, WIDE)), FAST, WIDE, PairState.UNTRIED, due_s=-math.inf)


def open_pair() -> UnlikePair:
    made = pair()
    for index in range(3):
        made.judge(order(index, index), PASSED, 1.0)
    return made


def suspects(made: UnlikePair) -> set[str]:
    return {str(endpoint_id) for endpoint_id, end in made.ends() if end.fault}


def test_a_pair_is_shut_before_it_passed_and_after_it_failed() -> None:
    made = pair()
    assert (made.fault, made.is_borne_out) == (UNTRIED, False)
    made.judge(order(0, 0), PASSED, 1.0)
    assert (made.fault, made.is_borne_out, made.is_repeat(order(0, 0))) == ("", True, True)
    assert not made.is_repeat(order(1, 0))
    failed = pair()
    failed.judge(order(0, 0), WRONG, 1.0)
    assert (failed.fault, failed.state) == ("canary-tokens", PairState.FAILED)


def test_a_right_answer_that_nobody_vouches_for_opens_a_pair_and_proves_nothing() -> None:
    made = pair()
    made.judge(order(0, 0), UNPROVEN, 1.0)
    assert (made.fault, made.state, made.is_open) == ("", PairState.UNPROVEN, True)
    made.judge(order(0, 0), WRONG, 2.0)
    assert (made.fault, made.state) == ("canary-tokens", PairState.FAILED)
    made.judge(order(0, 0), UNPROVEN, 9.0)
    assert made.is_open
    made.judge(order(1, 1), PASSED, 10.0)
    assert made.state is PairState.PASSED
    made.judge(order(0, 0), UNPROVEN, 11.0)
    assert made.state is PairState.PASSED


def test_a_failure_blames_both_ends_until_others_tell_which() -> None:
    made = open_pair()
    made.judge(order(0, 0), WRONG, 2.0)
    assert suspects(made) == {"fast/0", "wide/0"}
    made.judge(order(0, 1), WRONG, 3.0)
    assert suspects(made) == {"fast/0", "wide/0"}  # not the one that was none before
    made.judge(order(1, 0), PASSED, 4.0)
    assert suspects(made) == {"fast/0"}
    assert made.state is PairState.PASSED


def test_three_failures_in_a_row_are_the_pair_s() -> None:
    made = open_pair()
    for prefill, decode in ((0, 0), (0, 1), (1, 0)):
        assert made.state is PairState.PASSED
        made.judge(order(prefill, decode), WRONG, 2.0)
    assert made.state is PairState.FAILED


def test_a_pair_is_shut_at_once_where_nobody_who_passed_is_left() -> None:
    made = pair()
    made.judge(order(0, 0), PASSED, 1.0)
    made.judge(order(0, 0), WRONG, 2.0)
    assert made.state is PairState.FAILED


def test_what_says_nothing_changes_no_state_and_is_held_back() -> None:
    made = open_pair()
    made.judge(order(0, 0), Finding(CanaryOutcome.INCONCLUSIVE), 2.0)
    assert (made.state, made.judged_s, suspects(made)) == (PairState.PASSED, 1.0, set())
    assert made.prefills[EndpointId("fast/0")].need(0.0, 2.0) == NOT_NEEDED


@pytest.mark.parametrize(
    ("end", "now_s", "need"),
    [
        (End(0.0), 0.0, NEW),
        (End(0.0, held_s=5.0), 4.0, NOT_NEEDED),
        (End(0.0, is_passed=True), 99.0, NOT_NEEDED),
        (End(0.0, is_passed=True), 100.0, REPEAT),
        (End(0.0, fault="canary-tokens", failure_count=1), 0.0, RETRY),
        (End(0.0, fault="canary-tokens", failure_count=2), 4.9, NOT_NEEDED),
        (End(0.0, fault="canary-tokens", failure_count=2), 5.0, RETRY),
    ],
)
def test_who_needs_a_canary(end: End, now_s: float, need: int) -> None:
    assert end.need(100.0, now_s) == need


def test_a_suspect_is_tried_with_one_that_is_none() -> None:
    prefills: Side = [
        ((RETRY, 1, 1.0, 0, 0), endpoint(FAST, 0)),
        ((NOT_NEEDED, 0, 9.0, 0, 1), endpoint(FAST, 1)),
    ]
    decodes: Side = [
        ((RETRY, 1, 2.0, 0, 2), endpoint(WIDE, 0)),
        ((NOT_NEEDED, 0, 9.0, 0, 3), endpoint(WIDE, 1)),
    ]
    assert [each.id for each in neediest(prefills, decodes)] == ["fast/0", "wide/1"]
    assert [each.id for each in neediest(prefills[1:], decodes)] == ["fast/1", "wide/0"]
    assert [each.id for each in neediest(prefills[:1], decodes[:1])] == ["fast/0", "wide/0"]
    assert least_tried(prefills).id == "fast/1"


def test_pauses_are_doubled_up_to_a_bound() -> None:
    assert [pause_s(count, 5.0, 30.0) for count in range(6)] == [0.0, 5.0, 10.0, 20.0, 30.0, 30.0]
    assert pause_s(10_000, 5.0, 30.0) == 30.0
