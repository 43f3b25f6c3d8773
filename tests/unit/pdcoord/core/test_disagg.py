"""Never worse than not splitting: what stays together, and what a split must save."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.disagg import MUST_STAY_TOGETHER, weigh, why_together
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import Disaggregation, Model, SplitMode
from pdcoord.core.plan import Candidate, Figures, Why
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
POOL = Pool(
    PoolName("p"),
    M,
    Role.BOTH,
    "v",
    EngineKind.VLLM,
    Side(Connector.PDCOORD, KvLayout(128)),
    SpeedFigures(0.01, 1e-4, 0.01),
    1,
    1e9,
)
MODEL = Model(M, (POOL,), disaggregation=Disaggregation(uncached_tokens_min=256, saving_s_min=0.005))
REQUEST = Request(RequestId("r"), M, prompt_tokens=1_000)


def with_mode(mode: SplitMode) -> Model:
    return replace(MODEL, disaggregation=replace(MODEL.disaggregation, mode=mode))


@pytest.mark.parametrize(
    ("changes", "mode", "expected"),
    [
        ({}, SplitMode.AUTO, None),
        ({}, SplitMode.ALWAYS, None),
        ({}, SplitMode.NEVER, Why.MODE_NEVER),
        ({"is_generative": False}, SplitMode.ALWAYS, Why.NOT_GENERATIVE),
        ({"choice_count": 2}, SplitMode.ALWAYS, Why.MANY_CHOICES),
        ({"is_splittable": False}, SplitMode.ALWAYS, Why.ONE_ENGINE_CALL),
        ({"choice_count": 2, "is_generative": False}, SplitMode.NEVER, Why.NOT_GENERATIVE),
        ({"prompt_tokens": 127}, SplitMode.AUTO, Why.PROMPT_BELOW_BLOCK),
        ({"prompt_tokens": 127}, SplitMode.ALWAYS, Why.PROMPT_BELOW_BLOCK),
        ({"prompt_tokens": 0}, SplitMode.ALWAYS, Why.PROMPT_BELOW_BLOCK),
        ({"prompt_tokens": 128}, SplitMode.AUTO, Why.PROMPT_BELOW_THRESHOLD),
        ({"prompt_tokens": 128}, SplitMode.ALWAYS, None),
        ({"prompt_tokens": 255}, SplitMode.AUTO, Why.PROMPT_BELOW_THRESHOLD),
        ({"prompt_tokens": 256}, SplitMode.AUTO, None),
    ],
)
def test_what_stays_together_whatever_the_load(
    changes: dict[str, object], mode: SplitMode, expected: Why | None
) -> None:
    assert why_together(replace(REQUEST, **changes), with_mode(mode)) is expected


def test_reasons_of_speed_yield_where_nobody_serves_alone_and_the_others_do_not() -> None:
    assert {Why.NOT_GENERATIVE, Why.MANY_CHOICES, Why.ONE_ENGINE_CALL, Why.MODE_NEVER} == MUST_STAY_TOGETHER


def candidate(time_s: float, excess: float = 0.0, step_s: float = 0.0) -> Candidate:
    figures = Figures(time_s - step_s, 0.0, 0.0, step_s, 0.0, excess, 0.0, 0, 0, pace_s=step_s)
    return Candidate(Endpoint(EndpointId("e"), POOL, HostPort("h:1")), None, None, figures)


@pytest.mark.parametrize(
    ("split", "together", "expected"),
    [
        (candidate(0.100), candidate(0.200), Why.SPLIT_FASTER),
        (candidate(0.100), candidate(0.1051), Why.SPLIT_FASTER),
        (candidate(0.100), candidate(0.1049), Why.SAVING_BELOW_NOISE),
        (candidate(0.100), candidate(0.100), Why.COLOCATED_FASTER),
        (candidate(0.200), candidate(0.100), Why.COLOCATED_FASTER),
        (candidate(0.100, 0.5), candidate(0.200, 0.0), Why.COLOCATED_FASTER),
        (candidate(0.200, 0.0, step_s=0.01), candidate(0.100, 0.5, step_s=0.02), Why.SPLIT_FASTER),
        (candidate(0.200, 0.500), candidate(0.100, 0.509), Why.COLOCATED_FASTER),
        # A violation that is less only by what the estimate cannot tell apart is not less.
        (candidate(0.048, 0.20), candidate(0.050, 0.25), Why.SAVING_BELOW_NOISE),
        (candidate(0.200, 0.1, step_s=0.05), candidate(0.201, 0.3, step_s=0.06), Why.SPLIT_FASTER),
    ],
)
def test_a_split_must_save_more_than_the_noise(split: Candidate, together: Candidate, expected: Why) -> None:
    assert weigh(split, together, MODEL.disaggregation) is expected


def test_pools_of_its_priority_outweigh_time_and_no_violation() -> None:
    def unfit(made: Candidate, legs: int) -> Candidate:
        return replace(made, figures=replace(made.figures, unfit=legs))

    rules = MODEL.disaggregation
    fast, slow = candidate(0.1), candidate(0.9)
    assert weigh(slow, unfit(fast, 2), rules) is Why.SPLIT_PREFERRED
    assert weigh(unfit(fast, 1), slow, rules) is Why.COLOCATED_PREFERRED
    assert weigh(unfit(fast, 2), unfit(slow, 2), rules) is Why.SPLIT_FASTER
    assert weigh(candidate(0.9, 0.5), unfit(fast, 2), rules) is Why.COLOCATED_FASTER


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 2), st.floats(0, 2))
def test_always_means_always(one: float, two: float, excess: float, other_excess: float) -> None:
    rules = Disaggregation(mode=SplitMode.ALWAYS)
    assert weigh(candidate(one, excess), candidate(two, other_excess), rules) is Why.SPLIT_ALWAYS


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 2), st.floats(0, 2))
def test_an_automatic_split_is_never_predicted_worse_in_both(
    one: float, two: float, excess: float, other_excess: float
) -> None:
    split, together = candidate(one, excess), candidate(two, other_excess)
    if weigh(split, together, MODEL.disaggregation) is Why.SPLIT_FASTER:
        assert one < two or excess < other_excess
        assert two - one >= MODEL.disaggregation.saving_s_min
