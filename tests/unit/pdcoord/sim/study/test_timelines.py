from collections.abc import Callable

import pytest

from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.study.timelines import time_line

MakeResult = Callable[..., CallResult]


def test_a_time_line_says_who_computed_and_who_generated(make_result: MakeResult) -> None:
    result = make_result(0, routed_s=1.0, first_s=3.0, ended_s=4.0, prompt_tokens=100, output_tokens=20)
    line = time_line([result], span_count=4)
    assert line.middles_s == (0.5, 1.5, 2.5, 3.5)
    assert line.held == (1.0, 0.0, 0.0, 0.0)
    assert line.pools["p"].waiting == (0.0, 1.0, 1.0, 0.0)
    assert line.pools["d"].generating == (0.0, 0.0, 0.0, 1.0)
    assert line.pools["d"].context_tokens == (0.0, 0.0, 0.0, 110.0)


def test_time_spent_is_kept_whatever_the_spans(make_result: MakeResult) -> None:
    results = [make_result(number, first_s=number + 0.3, ended_s=number + 2.7) for number in range(9)]
    for span_count in (1, 7, 100):
        line = time_line(results, span_count=span_count)
        span_s = (8 + 2.7) / span_count
        assert sum(line.pools["d"].generating) * span_s == pytest.approx(9 * 2.4)
        assert sum(line.pools["p"].waiting) * span_s == pytest.approx(9 * 0.3)


def test_what_was_shed_waited_and_then_was_gone(make_result: MakeResult) -> None:
    shed = make_result(0, fate=Fate.SHED, routed_s=None, first_s=None, ended_s=2.0, prefill="", decode="")
    line = time_line([shed, make_result(2, prefill="d/0")], span_count=4)
    assert line.held == (1.0, 1.0, 0.0, 0.0)
    assert list(line.pools) == ["d"]


def test_nothing_has_no_time_line() -> None:
    assert time_line([]).middles_s == ()
