"""The bars of the suite, and what they say."""

from typing import Any

import pytest

from benchmarks.policies.bars import bars


def suite(workload: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    finals = {
        label: {"peak": {"mean": sum(seeds) / len(seeds), "seeds": seeds}}
        for label, seeds in (("pdcoord", ours), ("llm-d", theirs), ("round-robin", theirs[:1]))
    }
    return {"suite": {workload: {"finals": finals}}}


@pytest.mark.parametrize(("ours", "is_met"), [(98.0, True), (97.9, False), (120.0, True)])
def test_the_mean_decides_whether_a_workload_is_within_two_percent(ours: float, *, is_met: bool) -> None:
    found = bars(suite("chat", [ours - 10, ours + 10], [100.0, 100.0]))
    assert [bar["name"] for bar in found] == [
        "chat, rivals one vendor: not below by more than 2 %",
        "chat, rivals as if they could cross: not below by more than 2 %",
    ]
    assert [bar["is_met"] for bar in found] == [is_met, is_met]


def test_a_bar_says_how_many_seeds_and_their_spread() -> None:
    why = bars(suite("chat", [110.0, 90.0], [100.0, 100.0]))[0]["why"]
    assert why.startswith("1.000 of llm-d's goodput (95% within ")
    assert "2 seeds 0.900 to 1.100, stdev 0.141" in why


def test_mixed_traffic_has_a_bar_of_its_own() -> None:
    found = {bar["name"]: bar["is_met"] for bar in bars(suite("mix", [129.0], [100.0]))}
    assert found["mix, rivals one vendor: at least 1.3"] is False
    assert found["mix, rivals one vendor: not below by more than 2 %"] is True
