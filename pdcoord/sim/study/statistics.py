"""What the results of a simulated run add up to; pure."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pdcoord.sim.study.results import CallResult, Fate


def quantile(ranked: Sequence[float], q: float) -> float:
    """The least of the sorted values that at least a share `q` of them does not exceed (nearest rank).

    Never a value that was not seen. `ranked` is not empty.
    """
    return ranked[max(0, math.ceil(q * len(ranked)) - 1)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds over `count` calls; 0.0 throughout where there were none."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution":
        ranked = sorted(values)
        if not ranked:
            return cls()
        mean = math.fsum(ranked) / len(ranked)
        p50, p90, p99 = (quantile(ranked, q) for q in (0.5, 0.9, 0.99))
        return cls(len(ranked), mean, p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Summary:
    """One run, or one part of it.

    A share of nothing is 0.0.

    Attributes:
        calls: all that arrived; each of them is in exactly one of the four fates.
        offered_per_s: calls over the time from the first arrival to the last.
        duration_s: from the first arrival to the last end.
        requests_per_s: served calls over `duration_s`.
        output_tokens_per_s: tokens of served answers over `duration_s`.
        ttft: of calls whose first token came, whatever became of them then.
        tpot: of served calls with at least two tokens: time per token after the first.
        good_share: share of all calls that were served within their objectives, 0..1.
        goodput_per_s: `good_share` of the offered rate. Not a share of what was served: a router
            that refuses half of the calls has at most half of the rate.
        split_share: of calls that began, those whose prompt was computed elsewhere than they decoded.
        cached_share: prompt tokens of calls that began which the place that prefilled had cached.
        fell_back: routed as split, computed where they decoded.
    """

    calls: int
    ok: int
    shed: int
    failed: int
    unfinished: int
    offered_per_s: float
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft: Distribution
    tpot: Distribution
    good_share: float
    goodput_per_s: float
    split_share: float
    cached_share: float
    fell_back: int


def summarize(results: Sequence[CallResult]) -> Summary:
    """Add up a run; the order of `results` does not matter."""
    fates = Counter(result.fate for result in results)
    served = [result for result in results if result.fate is Fate.OK]
    began = [result for result in results if result.first_s is not None]
    duration_s = _duration_s(results)
    offered_per_s = _offered_per_s(results)
    good_share = _share(sum(result.is_good for result in results), len(results))
    return Summary(
        calls=len(results),
        ok=fates[Fate.OK],
        shed=fates[Fate.SHED],
        failed=fates[Fate.FAILED],
        unfinished=fates[Fate.UNFINISHED],
        offered_per_s=offered_per_s,
        duration_s=duration_s,
        requests_per_s=_share(len(served), duration_s),
        output_tokens_per_s=_share(sum(result.output_tokens for result in served), duration_s),
        ttft=Distribution.of(result.ttft_s for result in began if result.ttft_s is not None),
        tpot=Distribution.of(result.tpot_s for result in served if result.tpot_s is not None),
        good_share=good_share,
        goodput_per_s=good_share * offered_per_s,
        split_share=_share(sum(is_split(result) for result in began), len(began)),
        cached_share=_share(
            sum(result.cached_tokens for result in began), sum(result.prompt_tokens for result in began)
        ),
        fell_back=sum(result.fell_back for result in results),
    )


def by_kind(results: Sequence[CallResult]) -> dict[str, Summary]:
    """A summary for each kind of call, in the order of their names; empty where there is one kind only."""
    kinds = sorted({result.kind for result in results})
    if len(kinds) < 2:
        return {}
    return {kind: summarize([result for result in results if result.kind == kind]) for kind in kinds}


@dataclass(frozen=True, slots=True, order=True)
class Way:
    """Calls that went the same way: from which pool to which, and the router's word for it."""

    prefill: str
    decode: str
    why: str


PoolOf = Callable[[str], str]
"""Pool of an endpoint id."""


def pool_of(endpoint_id: str) -> str:
    """The pool in an id of the form `<pool>/<name>`; the id itself where it is of another form."""
    return endpoint_id.rpartition("/")[0] or endpoint_id


def ways(results: Iterable[CallResult], pool: PoolOf = pool_of) -> dict[Way, int]:
    """How many calls went which way, most first; calls that were never routed go from "" to ""."""
    counted = Counter(Way(pool(result.prefill), pool(result.decode), result.why) for result in results)
    return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def is_split(result: CallResult) -> bool:
    """Whether the prompt was computed elsewhere than the answer."""
    return result.prefill != result.decode


def _duration_s(results: Sequence[CallResult]) -> float:
    if not results:
        return 0.0
    # What is unfinished has no end: it is at least as late as everything that was seen of it.
    ends = [max(t for t in (r.at_s, r.routed_s, r.first_s, r.ended_s) if t is not None) for r in results]
    return max(ends) - min(result.at_s for result in results)


def _offered_per_s(results: Sequence[CallResult]) -> float:
    """Calls per second between the first arrival and the last, which has no second of its own."""
    if len(results) < 2:
        return 0.0
    times = [result.at_s for result in results]
    return _share(len(results) - 1, max(times) - min(times))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
