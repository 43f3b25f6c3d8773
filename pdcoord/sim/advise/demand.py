"""What a workload asks of a fleet, measured on a sample: lengths, what caches save, objectives."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pdcoord.core.model import Disaggregation
from pdcoord.sim.advise.kinds import AdviceError
from pdcoord.sim.workload.call import Call, Workload

SAMPLE_CALLS = 10_000
SPLIT_TOKENS_MIN = Disaggregation().uncached_tokens_min
STEADY = (0.2, 0.8)
"""Which calls of the sample are counted, as shares of it in the order of time: sessions begin before, and
caches fill; behind, no new ones come."""
PROMPTS_KEPT = 2_000
"""Prompts of one part whose lengths are kept one by one."""
# How long answers are taken to last, so that sessions go on; only the order of calls hangs on it.
_FIRST_S = 1.0
_TOKEN_S = 0.03


@dataclass(frozen=True, slots=True)
class Demand:
    """Calls of one part of a workload, those worth splitting or the others; figures are means over calls.

    Attributes:
        name: the part's.
        can_split: whether they have enough to compute for a coordinator to split them.
        share: of all calls, 0..1.
        uncached: prompt tokens to compute, of some of the calls one by one.
        context_steps: tokens of context that an answer's steps read, summed over the steps of one call.
        kv_tokens: what one call holds while it is decoded, averaged over its steps.
        ttft_s_max: the strictest of its calls; None if none has one. tpot_s_max alike.
    """

    name: str
    can_split: bool
    share: float
    prompt_tokens: float
    output_tokens: float
    uncached: tuple[int, ...]
    context_steps: float
    ttft_s_max: float | None
    tpot_s_max: float | None

    @property
    def kv_tokens(self) -> float:
        return self.context_steps / self.output_tokens

    @property
    def uncached_tokens(self) -> float:
        return sum(self.uncached) / len(self.uncached)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A workload's calls by part.

    Attributes:
        rate_per_s: calls per second over the sample.
        sampled_count: calls that were looked at.
        is_whole: whether those are all of the workload.
    """

    rate_per_s: float
    demands: tuple[Demand, ...]
    sampled_count: int
    is_whole: bool

    @property
    def tokens_per_call(self) -> float:
        """Prompt and answer."""
        return sum(each.share * (each.prompt_tokens + each.output_tokens) for each in self.demands)

    @property
    def output_tokens_per_call(self) -> float:
        return sum(each.share * each.output_tokens for each in self.demands)

    @property
    def tpot_s_max(self) -> float | None:
        """The strictest objective of all: one batch serves calls of every part."""
        return min((each.tpot_s_max for each in self.demands if each.tpot_s_max is not None), default=None)


def in_order(workload: Workload) -> Iterator[Call]:
    """A workload's calls in the order of time, as if each answer took as long as a quiet fleet's."""
    waiting: list[tuple[float, int, Call]] = []
    calls = workload.calls()
    known = next(calls, None)
    while known is not None or waiting:
        if known is not None and (not waiting or known.at_s <= waiting[0][0]):
            call, known = known, next(calls, None)
        else:
            call = heapq.heappop(waiting)[2]
        yield call
        following = workload.after(call, call.at_s + _FIRST_S + _TOKEN_S * call.output_tokens)
        if following is not None:
            heapq.heappush(waiting, (following.at_s, following.id, following))


def measure(
    workload: Workload,
    cache_tokens: int,
    *,
    ttft_s_max: float | None = None,
    tpot_s_max: float | None = None,
    split_tokens_min: int = SPLIT_TOKENS_MIN,
) -> Traffic:
    """Look at a sample of a workload.

    Prefixes are taken to be found wherever they are in a cache of `cache_tokens` that the whole fleet
    shares, least recently used out first: what routing by prefix comes near to, and never passes.

    Args:
        workload: the traffic.
        cache_tokens: KV that the fleet can keep for later calls.
        ttft_s_max: objective of calls that have none; tpot_s_max alike.
        split_tokens_min: calls with fewer tokens to compute are not split.

    Raises:
        AdviceError: if the workload has fewer than ten calls, or all at one time.
    """
    cache = _Cache(max(1, cache_tokens // workload.key_tokens))
    total = min(SAMPLE_CALLS, workload.call_count)
    begin, end = (int(total * share) for share in STEADY)
    tallies: dict[tuple[str, bool], _Tally] = {}
    others: dict[tuple[str, bool], _Tally] = {}
    times: list[float] = []
    for call in islice(in_order(workload), SAMPLE_CALLS):
        times.append(call.at_s)
        uncached = max(1, call.prompt_tokens - cache.hit(call.keys) * workload.key_tokens)
        cache.store(call.keys_after or call.keys)
        # Calls outside of the steady part stand for a part that has none in it.
        found = tallies if begin <= len(times) <= end else others
        place = (call.kind, uncached >= split_tokens_min)
        found.setdefault(place, _Tally(ttft_s_max, tpot_s_max)).add(call, uncached)
    names = {name for name, _ in tallies}
    tallies |= {place: tally for place, tally in others.items() if place[0] not in names}
    rate_per_s = steady_rate_per_s(times)
    if rate_per_s is None:
        message = (
            f"the workload has {len(times)} calls, expected ten or more at different times; make it longer"
        )
        raise AdviceError(message)
    counted = sum(tally.count for tally in tallies.values())
    return Traffic(
        rate_per_s=rate_per_s,
        demands=tuple(tally.demand(*place, counted) for place, tally in tallies.items()),
        sampled_count=len(times),
        is_whole=len(times) >= workload.call_count,
    )


def steady_rate_per_s(times: Sequence[float]) -> float | None:
    """Arrivals per second in the steady part of a run's arrivals, which are in order; None for too few."""
    begin, end = (int(len(times) * share) for share in STEADY)
    if len(times) < 10 or times[end] <= times[begin]:
        return None
    return (end - begin) / (times[end] - times[begin])


class _Cache:
    """Keys in the order of their last use."""

    def __init__(self, key_count_max: int) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()
        self._key_count_max = key_count_max

    def hit(self, keys: tuple[int, ...]) -> int:
        """How many keys are there from the first on."""
        for count, key in enumerate(keys):
            if key not in self._keys:
                return count
        return len(keys)

    def store(self, keys: tuple[int, ...]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._key_count_max:
            self._keys.popitem(last=False)


class _Tally:
    """Sums over the calls of one part."""

    def __init__(self, ttft_s_max: float | None, tpot_s_max: float | None) -> None:
        self.count = 0
        self._prompt_tokens = 0
        self._output_tokens = 0
        self._context_steps = 0.0
        self._uncached: list[int] = []
        self._own = (ttft_s_max, tpot_s_max)
        self._ttft_s_max: float | None = None
        self._tpot_s_max: float | None = None

    def add(self, call: Call, uncached: int) -> None:
        self.count += 1
        self._prompt_tokens += call.prompt_tokens
        self._output_tokens += call.output_tokens
        self._context_steps += call.output_tokens * (call.prompt_tokens + call.output_tokens / 2)
        if len(self._uncached) < PROMPTS_KEPT:
            self._uncached.append(uncached)
        ttft_s, tpot_s = self._own
        self._ttft_s_max = _least(
            self._ttft_s_max, call.ttft_s_max if call.ttft_s_max is not None else ttft_s
        )
        self._tpot_s_max = _least(
            self._tpot_s_max, call.tpot_s_max if call.tpot_s_max is not None else tpot_s
        )

    def demand(self, name: str, can_split: bool, counted: int) -> Demand:  # noqa: FBT001  # a key's second half
        return Demand(
            name=name,
            can_split=can_split,
            share=self.count / counted,
            prompt_tokens=self._prompt_tokens / self.count,
            output_tokens=self._output_tokens / self.count,
            uncached=tuple(self._uncached),
            context_steps=self._context_steps / self.count,
            ttft_s_max=self._ttft_s_max,
            tpot_s_max=self._tpot_s_max,
        )


def _least(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
