import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.study.statistics import Distribution, Way, by_kind, pool_of, quantile, summarize, ways

MakeResult = Callable[..., CallResult]
values = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(values, st.floats(0.01, 1.0))
def test_a_quantile_is_the_least_value_that_the_share_does_not_exceed(seen: list[float], q: float) -> None:
    ranked = sorted(seen)
    found = quantile(ranked, q)
    assert found in ranked
    assert sum(value <= found for value in ranked) >= q * len(ranked)
    assert sum(value < found for value in ranked) < q * len(ranked)


@given(values)
def test_moments_are_ordered_and_do_not_depend_on_the_order(seen: list[float]) -> None:
    found = Distribution.of(seen)
    assert found == Distribution.of(reversed(seen))
    assert found.count == len(seen)
    assert min(seen) <= found.p50 <= found.p90 <= found.p99 <= max(seen)
    assert min(seen) * (1 - 1e-12) <= found.mean <= max(seen) * (1 + 1e-12)


def test_a_run_adds_up(make_result: MakeResult) -> None:
    results = [
        make_result(0),
        make_result(1, first_s=4.0, ended_s=5.0, ttft_s_max=2.0),
        make_result(2, prefill="d/0", decode="d/0", cached_tokens=600, fell_back=True, tpot_s_max=0.05),
        make_result(3, fate=Fate.SHED, first_s=None, ended_s=3.0, prefill="", decode="", why="full"),
        make_result(4, fate=Fate.FAILED, ended_s=10.0),
    ]
    found = summarize(results)
    assert (found.calls, found.ok, found.shed, found.failed, found.unfinished) == (5, 3, 1, 1, 0)
    assert found.duration_s == 10.0
    assert found.offered_per_s == 1.0, "four gaps of a second"
    assert found.requests_per_s == pytest.approx(0.3)
    assert found.output_tokens_per_s == pytest.approx(3.3)
    assert found.ttft.count == 4
    assert found.tpot.count == 3
    assert found.tpot.p50 == pytest.approx(0.1), "one second over ten tokens after the first"
    # The second came too late, the third was too slow, and what was not served is never good.
    assert found.good_share == pytest.approx(0.2)
    assert found.goodput_per_s == pytest.approx(0.2)
    assert found.split_share == pytest.approx(3 / 4)
    assert found.cached_share == pytest.approx(600 / 4_000)
    assert found.fell_back == 1


def test_refusing_half_of_the_calls_never_doubles_goodput(make_result: MakeResult) -> None:
    good = [make_result(number) for number in range(10)]
    shed = [make_result(r.id, fate=Fate.SHED, first_s=None, ended_s=r.at_s) if r.id % 2 else r for r in good]
    assert summarize(shed).goodput_per_s == pytest.approx(summarize(good).goodput_per_s / 2)


def test_nothing_adds_up_to_nothing() -> None:
    found = summarize([])
    assert found.calls == 0
    assert all(math.isfinite(value) for value in (found.good_share, found.requests_per_s, found.ttft.p99))


def test_kinds_are_told_apart_where_there_are_several(make_result: MakeResult) -> None:
    assert by_kind([make_result(0), make_result(1)]) == {}
    found = by_kind([make_result(0), make_result(1, kind="agent"), make_result(2)])
    assert list(found) == ["agent", "chat"]
    assert found["chat"].calls == 2


def test_ways_are_counted_most_first(make_result: MakeResult) -> None:
    results = [
        make_result(0),
        make_result(1, prefill="d/1", decode="d/1", why="colocated-faster"),
        make_result(2, prefill="d/0", decode="d/0", why="colocated-faster"),
        make_result(3, fate=Fate.SHED, prefill="", decode="", why="full"),
    ]
    assert list(ways(results).items()) == [
        (Way("d", "d", "colocated-faster"), 2),
        (Way("", "", "full"), 1),
        (Way("p", "d", "split-faster"), 1),
    ]
    assert pool_of("plain") == "plain"
