"""Second attempts: when one may be made, under which id, and beside whom."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pdcoord.core.events import HedgeOver
from pdcoord.core.fleet import EndpointId, ModelName
from pdcoord.core.hedging import HedgeEnd, after_s, end_of, exclusions, id_of, may_have_second
from pdcoord.core.model import Fallback, Model, Slo
from pdcoord.core.plan import Figures, Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import REQUEST_ID_BYTES_MAX
from pdcoord.protocol.plans import RungKind

M = ModelName("m")
R = RequestId("r")
REQUEST = Request(R, M, prompt_tokens=400)
MODEL = Model(M, (), slo=Slo(ttft_s=1.0))


def figures(ttft_s: float, spread_s: float = 0.0) -> Figures:
    return Figures(0.0, ttft_s, 0.0, 0.0, 0.0, 0.0, 0.0, 100, 0, spread_s=spread_s)


def test_the_time_is_as_late_as_the_objective_allows_and_never_usual() -> None:
    assert after_s(REQUEST, MODEL, figures(0.1)) == pytest.approx(0.85)
    # The first one may well need so long.
    assert after_s(REQUEST, MODEL, figures(0.6)) == pytest.approx(1.2)
    assert after_s(REQUEST, MODEL, figures(0.4, spread_s=0.3)) == pytest.approx(1.7)
    # Without an objective, when it is late.
    assert after_s(REQUEST, replace(MODEL, slo=Slo()), figures(0.6)) == pytest.approx(2.4)
    own = replace(REQUEST, slo=Slo(ttft_s=0.5))
    assert after_s(own, MODEL, figures(0.1)) == pytest.approx(0.35)
    assert after_s(own, MODEL, figures(0.01)) == pytest.approx(0.485)
    assert after_s(replace(REQUEST, slo=Slo(ttft_s=0.01)), MODEL, figures(0.01)) == 0.25
    # An answer in one piece comes with its last token.
    whole = replace(REQUEST, is_streamed=False, output_tokens_max=10)
    assert after_s(whole, MODEL, figures(0.6)) == pytest.approx(2.4)


def test_no_client_has_the_id_of_a_second_attempt() -> None:
    assert not may_have_second(id_of(R))
    assert may_have_second(R)


def test_a_second_attempts_id_is_one_that_sidecars_take_over() -> None:
    lengths = [length for length in range(1, 140) if may_have_second("r" * length)]
    assert len(id_of(RequestId("r" * max(lengths)))) == REQUEST_ID_BYTES_MAX


def test_there_may_be_none_at_all() -> None:
    for fallback in (Fallback(hedge_share_max=0.0), Fallback(rungs=(RungKind.COLOCATED,))):
        assert after_s(REQUEST, replace(MODEL, fallback=fallback), figures(0.1)) is None
    assert after_s(replace(REQUEST, is_generative=False), MODEL, figures(0.1)) is None
    assert after_s(replace(REQUEST, is_resumed=True), MODEL, figures(0.1)) is None


def test_the_best_second_shares_no_leg_with_the_first_and_nobody_shunned(plan: Callable[..., Plan]) -> None:
    failed, barred = frozenset({EndpointId("failed")}), [EndpointId("out")]
    alone = plan("r")
    assert list(exclusions(alone, failed, barred)) == [{alone.decode.id, "failed", "out"}]
    split = plan("r", is_split=True)
    assert split.prefill is not None
    assert list(exclusions(split, failed, barred)) == [
        {split.decode.id, split.prefill.id, "failed", "out"},
        {split.decode.id, "failed", "out"},
    ]


@pytest.mark.parametrize(
    ("is_won", "reason", "end"),
    [
        (True, None, HedgeEnd.WON),
        (True, RungReason.DECODE_ERROR, HedgeEnd.WON),
        (False, None, HedgeEnd.LOST),
        (False, RungReason.DECODE_ERROR, HedgeEnd.FAILED),
    ],
)
def test_an_end_is_named_by_what_became_of_the_second(
    *, is_won: bool, reason: RungReason | None, end: HedgeEnd
) -> None:
    assert end_of(HedgeOver(R, is_won, reason)) is end
