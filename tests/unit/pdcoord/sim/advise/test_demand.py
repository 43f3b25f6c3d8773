"""What is measured of a workload: its mix, lengths, what caches save, its rate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from pdcoord.sim.advise.demand import measure, steady_rate_per_s
from pdcoord.sim.advise.kinds import AdviceError
from pdcoord.sim.workload.call import Call, CallId


@dataclass
class Listed:
    """Calls as they are listed; `following` by id."""

    listed: Sequence[Call]
    following: dict[int, Call] = field(default_factory=dict)
    key_tokens: int = 10

    @property
    def call_count(self) -> int:
        return len(self.listed) + len(self.following)

    def calls(self) -> Iterator[Call]:
        return iter(self.listed)

    def after(self, call: Call, ended_s: float) -> Call | None:
        return self.following.get(call.id)


def call(number: int, kind: str, keys: tuple[int, ...], **fields: float) -> Call:
    return Call(
        CallId(number),
        at_s=number * 0.5,
        prompt_tokens=len(keys) * 10,
        output_tokens=20,
        keys=keys,
        kind=kind,
        ttft_s_max=fields.get("ttft_s_max"),
    )


def test_parts_are_measured_apart() -> None:
    shared = tuple(range(40))
    calls = [
        call(n, "a", (*shared, 1_000 + n)) if n % 4 else call(n, "b", tuple(range(n * 100, n * 100 + 30)))
        for n in range(1, 101)
    ]
    traffic = measure(Listed(calls), 1_000_000, ttft_s_max=3.0, tpot_s_max=0.05)
    assert traffic.rate_per_s == pytest.approx(2.0)
    assert traffic.is_whole
    found = {(each.name, each.can_split): each for each in traffic.demands}
    short, long = found["a", False], found["b", True]
    assert short.share == pytest.approx(0.75, abs=0.02)
    assert (short.prompt_tokens, short.uncached_tokens) == (410.0, 10.0)
    assert (long.prompt_tokens, long.uncached_tokens) == (300.0, 300.0)
    assert long.context_steps == 20 * (300 + 10)
    assert long.kv_tokens == 310.0
    assert (short.ttft_s_max, short.tpot_s_max) == (3.0, 0.05)
    assert traffic.output_tokens_per_call == pytest.approx(20.0)


def test_a_small_cache_saves_less() -> None:
    calls = [call(n, "a", tuple(range(n % 5 * 100, n % 5 * 100 + 30))) for n in range(100)]
    large, small = (measure(Listed(calls), tokens) for tokens in (10_000, 600))
    assert [each.uncached_tokens for each in large.demands if not each.can_split] == [1.0]
    assert [each.uncached_tokens for each in small.demands if each.can_split] == [300.0]


def test_the_strictest_objective_counts() -> None:
    calls = [call(n, "a", (n,), ttft_s_max=float(1 + n % 3)) for n in range(20)]
    assert measure(Listed(calls), 10_000, ttft_s_max=9.0).demands[0].ttft_s_max == 1.0


def test_calls_that_follow_count_too() -> None:
    calls = [call(n, "a", (n,)) for n in range(10)]
    following = {n: call(n + 1000, "later", (n, n + 1000)) for n in range(10)}
    assert measure(Listed(calls, following), 10_000).sampled_count == 20


@pytest.mark.parametrize("times", [[], [1.0] * 30, [float(n) for n in range(9)]])
def test_too_few_arrivals_have_no_rate(times: list[float]) -> None:
    assert steady_rate_per_s(times) is None
    listed = [Call(CallId(n), at_s, 10, 5, (n,)) for n, at_s in enumerate(times)]
    with pytest.raises(AdviceError, match=f"has {len(times)} calls, expected ten or more at different times"):
        measure(Listed(listed), 100)
