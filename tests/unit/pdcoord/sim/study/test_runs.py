from collections.abc import Callable

import pytest

from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.runs import Run, rate_panels, way_bars

MakeResult = Callable[..., CallResult]


def test_a_router_is_one_curve_over_its_rates(make_result: MakeResult) -> None:
    slow = [make_result(number) for number in range(10)]
    fast = [make_result(number, at_s=number / 2, first_s=number / 2 + 1) for number in range(10)]
    panels = rate_panels([Run("a", 2.0, fast), Run("b", 1.0, slow), Run("a", 1.0, slow)])
    goodput = panels[1].curves
    assert [curve.label for curve in goodput] == ["a", "b"]
    assert [point.x for point in goodput[0].points] == [1.0, 2.0]
    assert [(curve.label, curve.is_dashed) for curve in panels[2].curves] == [
        ("a", False),
        ("a", True),
        ("b", False),
        ("b", True),
    ]


def test_bars_are_whole_however_many_ways_there_are(make_result: MakeResult) -> None:
    results = [make_result(number, why=f"w{number % 7}") for number in range(70)]
    for ways_max in (3, 12):
        (bar,) = way_bars([Run("a", 1.0, results)], ways_max=ways_max)
        assert sum(bar.parts.values()) == pytest.approx(1.0)
        assert len(bar.parts) == min(ways_max + 1, 7)
