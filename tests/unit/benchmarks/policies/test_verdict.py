"""The verdict over seeds: ratio of means, its interval, who is compared, and who needs more seeds."""

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.policies.verdict import columns, compare, deciders, undecided, verdicts

goodputs = st.floats(1.0, 1_000.0)


def final(*seeds: float) -> dict[str, Any]:
    stdev = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
    return {"peak": {"rate": 1.0, "mean": statistics.fmean(seeds), "stdev": stdev, "seeds": list(seeds)}}


def test_rivals_that_never_split_stand_in_both_columns() -> None:
    found = columns(["pdcoord", "llm-d", "dynamo", "dynamo+cross", "llm-d"])
    assert found == {
        "one vendor": ["llm-d", "dynamo"],
        "as if they could cross": ["llm-d", "dynamo+cross"],
    }


def test_ratio_and_interval_of_known_seeds() -> None:
    found = compare("llm-d", [12.0, 10.0, 14.0], [10.0, 10.0, 10.0])
    assert found.ratio == pytest.approx(1.2)
    assert found.by_seed == pytest.approx((1.2, 1.0, 1.4))
    assert found.stdev == pytest.approx(0.2)
    # Student's t of 2 degrees is 4.3027 at 97.5 %.
    half = 4.3027 * 0.2 / 3**0.5
    assert (found.low, found.high) == pytest.approx((1.2 - half, 1.2 + half), abs=1e-4)
    assert found.spread == "95% within 0.703 to 1.697; 3 seeds 1.000 to 1.400, stdev 0.200"


def test_the_ratio_is_of_means_and_not_the_mean_of_ratios() -> None:
    found = compare("llm-d", [10.0, 10.0], [5.0, 20.0])
    assert found.ratio == pytest.approx(20 / 25)
    assert statistics.fmean(found.by_seed) == pytest.approx(1.25)


def test_one_seed_has_no_interval() -> None:
    found = compare("llm-d", [3.0], [2.0])
    assert (found.low, found.high, found.spread) == (None, None, "1 seed")


@given(st.lists(st.tuples(goodputs, goodputs), min_size=2, max_size=20))
def test_the_interval_holds_the_ratio_and_the_ratio_lies_within_those_of_seeds(
    pairs: list[tuple[float, float]],
) -> None:
    found = compare("llm-d", [ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    assert min(found.by_seed) - 1e-9 <= found.ratio <= max(found.by_seed) + 1e-9


@given(st.lists(goodputs, min_size=2, max_size=20), st.floats(0.5, 2.0))
def test_seeds_that_move_both_alike_leave_no_doubt(theirs: list[float], factor: float) -> None:
    found = compare("llm-d", [factor * each for each in theirs], theirs)
    assert found.ratio == pytest.approx(factor)
    assert found.low == pytest.approx(found.high, abs=1e-6)


def test_a_rival_with_fewer_seeds_is_not_compared() -> None:
    finals = {"pdcoord": final(10, 11), "llm-d": final(5, 6), "round-robin": final(90)}
    assert deciders(finals) == ["pdcoord", "llm-d"]
    assert {found.best for found in verdicts(finals).values()} == {"llm-d"}


def test_each_column_has_its_own_best() -> None:
    finals = {
        "pdcoord": final(10, 10),
        "llm-d": final(5, 5),
        "dynamo": final(6, 6),
        "dynamo+cross": final(4, 4),
    }
    found = verdicts(finals)
    assert [found[column].best for column in found] == ["dynamo", "llm-d"]
    assert [found[column].ratio for column in found] == pytest.approx([10 / 6, 2.0])


def test_more_seeds_go_to_ours_the_best_and_those_within_its_spread() -> None:
    finals = {
        "pdcoord": final(50, 50, 50),
        "llm-d": final(20, 24, 22),
        "cache-aware": final(19, 21, 20),
        "least-load": final(19, 19, 19),
    }
    assert undecided(finals, seeds=20) == ["pdcoord", "llm-d", "cache-aware"]


def test_no_spread_at_all_still_leaves_those_within_two_percent() -> None:
    finals = {
        "pdcoord": final(1, 1),
        "llm-d": final(100, 100),
        "dynamo-agg": final(99, 99),
        "random": final(97, 97),
    }
    assert undecided(finals, seeds=3) == ["pdcoord", "llm-d", "dynamo-agg"]


def test_nothing_is_undecided_once_all_seeds_are_run() -> None:
    finals = {"pdcoord": final(1, 1), "llm-d": final(9, 9), "random": final(2)}
    assert undecided(finals, seeds=2) == []


def test_who_was_behind_gets_seeds_when_the_best_falls_with_more() -> None:
    finals = {"pdcoord": final(1, 1), "llm-d": final(5, 5), "random": final(6)}
    assert undecided(finals, seeds=2) == ["random"]
