"""Load over time, derived from results: what each pool computed and generated at which moment; pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.statistics import PoolOf, pool_of


@dataclass(frozen=True, slots=True)
class PoolLine:
    """One pool, averaged over each of the time line's equal spans.

    Attributes:
        waiting: calls that were sent here for their prompt and have no first token: queue, prefill and
            hand-over together, which results do not tell apart.
        generating: calls whose answer comes from here, from their first token to their last.
        context_tokens: tokens that the generating calls hold in KV, as if each answer grew steadily.
    """

    waiting: tuple[float, ...]
    generating: tuple[float, ...]
    context_tokens: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TimeLine:
    """Load of every pool.

    Attributes:
        middles_s: middle of each span, from the start of the run.
        held: calls that arrived and had no route yet.
        pools: by name, sorted.
    """

    middles_s: tuple[float, ...]
    held: tuple[float, ...]
    pools: dict[str, PoolLine]


@dataclass(frozen=True, slots=True)
class _Stay:
    """Something that was there for a while, growing steadily from one weight to another."""

    from_s: float
    to_s: float
    weight_from: float = 1.0
    weight_to: float = 1.0


def time_line(results: Sequence[CallResult], *, span_count: int = 200, pool: PoolOf = pool_of) -> TimeLine:
    """Derive the time line of a run; empty for no results."""
    if not results:
        return TimeLine((), (), {})
    start_s = min(result.at_s for result in results)
    end_s = max(max(result.ended_s or 0.0, result.first_s or 0.0, result.at_s) for result in results)
    grid = _Grid(start_s, max(end_s - start_s, 1e-9) / span_count, span_count)
    held: list[_Stay] = []
    waiting: defaultdict[str, list[_Stay]] = defaultdict(list)
    generating: defaultdict[str, list[_Stay]] = defaultdict(list)
    context: defaultdict[str, list[_Stay]] = defaultdict(list)
    for result in results:
        routed_s = result.routed_s if result.routed_s is not None else result.ended_s or end_s
        held.append(_Stay(result.at_s, routed_s))
        if result.routed_s is None:
            continue
        first_s = result.first_s if result.first_s is not None else result.ended_s or end_s
        waiting[pool(result.prefill)].append(_Stay(result.routed_s, first_s))
        if result.first_s is None:
            continue
        ended_s = result.ended_s if result.ended_s is not None else end_s
        generating[pool(result.decode)].append(_Stay(result.first_s, ended_s))
        tokens = result.prompt_tokens + result.output_tokens
        context[pool(result.decode)].append(_Stay(result.first_s, ended_s, result.prompt_tokens, tokens))
    names = sorted({*waiting, *generating})
    lines = {
        name: PoolLine(
            grid.average(waiting[name]), grid.average(generating[name]), grid.average(context[name])
        )
        for name in names
    }
    return TimeLine(grid.middles_s(), grid.average(held), lines)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Equal spans of time."""

    start_s: float
    span_s: float
    span_count: int

    def middles_s(self) -> tuple[float, ...]:
        return tuple(self.start_s + (index + 0.5) * self.span_s for index in range(self.span_count))

    def average(self, stays: Iterable[_Stay]) -> tuple[float, ...]:
        """The weight that was there on average, span by span."""
        sums = [0.0] * self.span_count
        for stay in stays:
            self._add(sums, stay)
        return tuple(total / self.span_s for total in sums)

    def _add(self, sums: list[float], stay: _Stay) -> None:
        length_s = stay.to_s - stay.from_s
        if length_s <= 0.0:
            return
        growth = (stay.weight_to - stay.weight_from) / length_s
        first = self._index(stay.from_s)
        for index in range(first, self._index(stay.to_s) + 1):
            begin_s = max(stay.from_s, self.start_s + index * self.span_s)
            end_s = min(stay.to_s, self.start_s + (index + 1) * self.span_s)
            if end_s > begin_s:
                middle_s = (begin_s + end_s) / 2
                sums[index] += (end_s - begin_s) * (stay.weight_from + growth * (middle_s - stay.from_s))

    def _index(self, time_s: float) -> int:
        return min(self.span_count - 1, max(0, int((time_s - self.start_s) / self.span_s)))
