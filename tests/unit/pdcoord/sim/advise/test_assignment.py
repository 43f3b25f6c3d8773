"""Assignments: the optimum is that of brute force, more engines never carry less, bottlenecks are named."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.sim.advise.assignment import (
    Assignment,
    Limit,
    Planner,
    all_both,
    group_of,
    written_counts,
)
from pdcoord.sim.advise.kinds import Kind
from transfer.layout import KvLayout
from transfer.verdict import Connector

Make = Callable[..., Any]
Makers = tuple[Make, Make, Make]


def worst(assignment: Assignment) -> tuple[Limit, int, Role]:
    resource = max(assignment.worth, key=lambda each: assignment.worth[each])
    return resource.limit, resource.group.kind, resource.group.role


def split(kinds: list[Kind]) -> dict[Any, int]:
    """The first kind prefills, the second decodes and does nothing alone."""
    return {
        group_of(kinds, 0, Role.PREFILL): kinds[0].count,
        group_of(kinds, 1, Role.DECODE): kinds[1].count,
    }


def sglang(make: Make, name: str, count: int, **given: Any) -> Kind:
    made: Kind = make(name, count, engine=EngineKind.SGLANG, connector=Connector.SGLANG, **given)
    return made


def test_a_split_pair_carries_what_its_slower_half_does(kind: Make, traffic: Make, demand: Make) -> None:
    calls = traffic(demand(tpot_s_max=0.05))
    kinds = [sglang(kind, "p", 2), sglang(kind, "d", 3)]
    found = Planner(kinds, calls).with_counts(split(kinds))
    # Two engines at 95 % of ten prompts a second; three of a batch of 40, less what crowding costs.
    decode_per_s = 3 * 40 / (100 * 0.05) * (1 - 1.3 / (40 * 3) ** 0.5)
    assert decode_per_s > 2 * 10 * 0.95
    assert found.rate_per_s == pytest.approx(2 * 10 * 0.95)
    assert worst(found) == (Limit.PREFILL, 0, Role.PREFILL)
    assert sum(found.worth.values()) == pytest.approx(1.0)
    alone = [sglang(kind, "p", 2), sglang(kind, "d", 1)]
    found = Planner(alone, calls).with_counts(split(alone))
    assert found.rate_per_s == pytest.approx(40 / 5 * (1 - 1.3 / 40**0.5))
    assert worst(found) == (Limit.TPOT, 1, Role.DECODE)


@pytest.mark.parametrize(("slow", "limit"), [(0, Limit.LINK_OUT), (1, Limit.LINK_IN)])
def test_a_slow_link_is_the_bottleneck_where_it_is(
    kind: Make, traffic: Make, demand: Make, slow: int, limit: Limit
) -> None:
    links = [1e15, 1e15]
    links[slow] = 2e8  # Two prompts of 1,000 tokens at 100,000 bytes each.
    kinds = [sglang(kind, name, 2, link_bytes_per_s=link) for name, link in zip("pd", links, strict=True)]
    found = Planner(kinds, traffic(demand(tpot_s_max=0.05))).with_counts(split(kinds))
    assert found.rate_per_s == pytest.approx(2 * 2 * 0.95)
    assert worst(found)[:2] == (limit, slow)


def test_kv_that_holds_few_calls_is_the_bottleneck(kind: Make, traffic: Make, demand: Make) -> None:
    kinds = [sglang(kind, "p", 4), sglang(kind, "d", 1, kv_tokens=5_264)]
    found = Planner(kinds, traffic(demand(tpot_s_max=0.05))).with_counts(split(kinds))
    assert worst(found)[0] is Limit.BATCH


def test_without_a_prefill_nothing_is_carried(kind: Make, traffic: Make) -> None:
    kinds = [sglang(kind, "d", 2, roles=(Role.DECODE, Role.DECODE))]
    planner = Planner(kinds, traffic())
    assert planner.with_counts(written_counts(kinds)).rate_per_s == pytest.approx(0.0)
    # vLLM's decode engines compute prompts themselves.
    kinds = [kind("d", 2, roles=(Role.DECODE, Role.DECODE))]
    assert Planner(kinds, traffic()).with_counts(written_counts(kinds)).rate_per_s > 0.0


def test_what_cannot_hand_over_is_not_split(kind: Make, traffic: Make) -> None:
    kinds = [
        sglang(kind, "p", 1, layout=KvLayout(16)),
        sglang(kind, "d", 1, layout=KvLayout(64), kv_tokens=1_600_000),
    ]
    assert Planner(kinds, traffic()).with_counts(split(kinds)).rate_per_s == pytest.approx(0.0)


def test_short_prompts_are_served_where_they_decode(kind: Make, traffic: Make, demand: Make) -> None:
    kinds = [kind("p", 2), kind("d", 2)]
    calls = traffic(demand(name="long", share=0.5), demand(name="short", share=0.5, can_split=False))
    found = Planner(kinds, calls).with_counts(split(kinds))
    short = [flow for flow in found.flows if flow.demand == 1]
    assert short
    assert all(flow.prefill == flow.decode for flow in short)
    assert sum(flow.rate_per_s for flow in short) == pytest.approx(found.rate_per_s / 2)


def test_a_fast_prefiller_prefills_for_a_fast_decoder(kind: Make, traffic: Make, demand: Make) -> None:
    kinds = [
        kind("compute", 2, prefill_s_per_token=5e-5, step_s_per_sequence=4e-3),
        kind("bandwidth", 2, prefill_s_per_token=1e-3, step_s_per_sequence=2e-4),
    ]
    planner = Planner(kinds, traffic(demand(tpot_s_max=0.05)))
    best = planner.with_counts(planner.best_counts([2, 2]))
    roles = {(group.kind, group.role): count for group, count in best.counts.items()}
    assert roles == {(0, Role.PREFILL): 2, (1, Role.DECODE): 2}
    assert best.good_per_s > 1.1 * planner.with_counts(all_both(kinds)).good_per_s


figures = st.fixed_dictionaries(
    {
        "prefill_s_per_token": st.sampled_from([5e-5, 2e-4, 1e-3]),
        "step_s_per_sequence": st.sampled_from([2e-4, 1e-3, 4e-3]),
        "link_bytes_per_s": st.sampled_from([1e8, 1e9, 1e12]),
        "engine": st.sampled_from(list(EngineKind)),
    }
)


def fleet(makers: Makers, described: list[tuple[dict[str, Any], int]]) -> list[Kind]:
    kinds = []
    for index, (speeds, count) in enumerate(described):
        is_vllm = speeds["engine"] is EngineKind.VLLM
        connector = Connector.PDCOORD if is_vllm else Connector.SGLANG
        kinds.append(makers[0](f"k{index}", count, connector=connector, **speeds))
    return kinds


def by_force(planner: Planner, counts: list[int]) -> float:
    """The best of all ways to give roles, each solved by itself, with the queues that the search assumes."""
    ways = []
    for index, count in enumerate(counts):
        groups = [group_of(planner.kinds, index, role) for role in Role]
        ways.append(
            [
                dict(zip(groups, numbers, strict=True))
                for numbers in product(range(count + 1), repeat=3)
                if sum(numbers) <= count
            ]
        )
    return max(
        planner.with_counts({group: n for way in chosen for group, n in way.items() if n}, counts).good_per_s
        for chosen in product(*ways)
    )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(figures, st.integers(1, 2)), min_size=1, max_size=2), st.booleans())
def test_the_optimum_is_that_of_brute_force(
    makers: Makers, described: list[tuple[dict[str, Any], int]], has_short: bool
) -> None:
    _, traffic, demand = makers
    parts = [demand(tpot_s_max=0.05, share=0.5 if has_short else 1.0)]
    if has_short:
        parts.append(demand(name="s", uncached=(100,), share=0.5, can_split=False, tpot_s_max=0.1))
    planner = Planner(fleet(makers, described), traffic(*parts))
    counts = [count for _, count in described]
    found = planner.with_counts(planner.best_counts(counts), counts).good_per_s
    assert found == pytest.approx(by_force(planner, counts), rel=1e-3, abs=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(figures, st.integers(1, 3)), min_size=1, max_size=2), st.data())
def test_one_more_engine_never_carries_less(
    makers: Makers, described: list[tuple[dict[str, Any], int]], data: st.DataObject
) -> None:
    _, traffic, demand = makers
    planner = Planner(fleet(makers, described), traffic(demand(tpot_s_max=0.05, ttft_s_max=2.0)))
    counts = planner.best_counts([count for _, count in described])
    before = planner.with_counts(counts)
    index = data.draw(st.integers(0, len(described) - 1))
    group = group_of(planner.kinds, index, data.draw(st.sampled_from(list(Role))))
    after = planner.with_counts({**counts, group: counts.get(group, 0) + 1})
    assert after.good_per_s >= before.good_per_s * (1 - 1e-6) - 1e-6
