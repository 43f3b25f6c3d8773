"""Advice for a fleet and a workload: the best roles, what holds them back, and what one more engine buys."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdcoord.sim.advise.assignment import Assignment, Group, Planner, all_both, free_groups, written_counts
from pdcoord.sim.advise.capacity import Capacity
from pdcoord.sim.advise.demand import Traffic
from pdcoord.sim.advise.kinds import AdviceError, Kind
from pdcoord.sim.advise.program import UnsolvedError

GAIN_MIN = 0.02
"""Roles are not changed for less: the prediction is no better than that."""
MOVES_MAX = 16
"""Changes of one engine's role that are followed after the whole-number search."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What the fleet's tokens cost at some rate, in the currency of the fleet file.

    Attributes:
        per_million_tokens: of prompt and answer together.
    """

    per_hour: float
    per_million_tokens: float
    per_million_output_tokens: float


@dataclass(frozen=True, slots=True)
class OneMore:
    """What one more engine of a kind would do.

    Attributes:
        adds_per_s: to the calls per second that begin in time.
        counts: the best roles then.
        adds_per_cost: the same for each unit of cost per hour; None where costs are unknown or 0.
    """

    kind: Kind
    adds_per_s: float
    counts: Mapping[Group, int]
    adds_per_cost: float | None


@dataclass(frozen=True, slots=True)
class Advice:
    """Everything that `pdcoord plan` says, less what the simulator found.

    Attributes:
        best: with the advised roles.
        written: with those of the fleet file.
        mixed: with no roles at all.
        costs: None if an engine's cost is unknown.
    """

    kinds: tuple[Kind, ...]
    traffic: Traffic
    capacities: tuple[Capacity, ...]
    best: Assignment
    written: Assignment
    mixed: Assignment
    one_more: tuple[OneMore, ...]
    costs: Costs | None

    @property
    def good_share(self) -> float:
        """Of the calls that the fleet can take, those that can begin in time."""
        return self.best.good_per_s / self.best.rate_per_s

    @property
    def good_at_offered_per_s(self) -> float:
        """Calls per second within their objectives at the workload's own rate, the rest shed or late."""
        return min(self.best.good_per_s, self.traffic.rate_per_s * self.good_share)


def advise(kinds: Sequence[Kind], traffic: Traffic) -> Advice:
    """Find the roles that carry most.

    Raises:
        AdviceError: if no engine can serve some part of the traffic.
    """
    planner = Planner(kinds, traffic)
    engine_counts = [kind.count for kind in kinds]
    try:
        _check(planner)
        written = planner.with_counts(written_counts(kinds))
        best = _best(planner, engine_counts)
        if written.good_per_s >= best.good_per_s / (1.0 + GAIN_MIN):
            best = written
        if best.good_per_s <= 0.0:
            raise AdviceError(
                "no call can begin in time with any roles; raise slo.ttft_ms of the workload, "
                "or use faster engines"
            )
        return Advice(
            kinds=tuple(kinds),
            traffic=traffic,
            capacities=planner.capacities,
            best=best,
            written=written,
            mixed=planner.with_counts(all_both(kinds)),
            one_more=tuple(_one_more(planner, best, engine_counts)),
            costs=costs_at(kinds, traffic, best.rate_per_s),
        )
    except UnsolvedError as error:
        raise AdviceError(f"the solver found no answer: {error}") from error


def _check(planner: Planner) -> None:
    """Say which part of the traffic no engine can decode, and why."""
    for index, demand in enumerate(planner.traffic.demands):
        if not any(mine.costs[index].can_decode for mine in planner.capacities):
            raise AdviceError(
                f'part "{demand.name}" needs {demand.kv_tokens:.0f} tokens of KV for one call, more than any '
                "engine's pool; give engines more kv_blocks or the workload a smaller context_tokens_max"
            )
    rooms = [mine.step_room for mine in planner.capacities]
    if all(room is not None and room <= 0.0 for room in rooms):
        fastest_s = min(kind.settings.speed.step_base_s for kind in planner.kinds)
        raise AdviceError(
            f"slo.tpot_ms is {(planner.traffic.tpot_s_max or 0.0) * 1e3:g}, no more than the "
            f"{fastest_s * 1e3:g} ms of the fastest engine's step; raise it"
        )


def _best(planner: Planner, engine_counts: Sequence[int]) -> Assignment:
    """The whole-number optimum, then single changes for as long as they help.

    The search reckons with queues as short as if all engines of a kind shared one; how short they are
    with the roles found is only known then.
    """
    best = planner.with_counts(planner.best_counts(engine_counts))
    for _ in range(MOVES_MAX):
        tried = [planner.with_counts(counts) for counts in _changes(planner, best.counts, engine_counts)]
        better = max(tried, key=lambda each: each.good_per_s, default=best)
        if better.good_per_s <= best.good_per_s * (1.0 + 1e-6):
            break
        best = better
    return best


def _changes(
    planner: Planner, counts: Mapping[Group, int], engine_counts: Sequence[int]
) -> Iterator[dict[Group, int]]:
    """One engine in another role, or one that has none in one."""
    for kind, total in enumerate(engine_counts):
        groups = [group for group in free_groups(planner.kinds) if group.kind == kind]
        is_spare = sum(counts.get(group, 0) for group in groups) < total
        for giver in [None] if is_spare else [group for group in groups if counts.get(group, 0)]:
            for taker in groups:
                if taker != giver:
                    yield _moved(counts, giver, taker)


def _moved(counts: Mapping[Group, int], giver: Group | None, taker: Group) -> dict[Group, int]:
    moved = {**counts, taker: counts.get(taker, 0) + 1}
    if giver is not None:
        moved[giver] -= 1
    return {group: count for group, count in moved.items() if count > 0}


def _one_more(planner: Planner, best: Assignment, engine_counts: Sequence[int]) -> Iterator[OneMore]:
    for index, kind in enumerate(planner.kinds):
        more = [count + (other == index) for other, count in enumerate(engine_counts)]
        groups = [group for group in free_groups(planner.kinds) if group.kind == index]
        tried = [_best(planner, more)]
        tried += [planner.with_counts(_moved(best.counts, None, group)) for group in groups]
        found = max(tried, key=lambda each: each.good_per_s)
        adds = max(0.0, found.good_per_s - best.good_per_s)
        yield OneMore(kind, adds, found.counts, adds / kind.cost_per_hour if kind.cost_per_hour else None)


def costs_at(kinds: Sequence[Kind], traffic: Traffic, rate_per_s: float) -> Costs | None:
    """What tokens cost at so many calls per second; None if that is 0, or an engine's cost is unknown."""
    if rate_per_s <= 0.0 or any(kind.cost_per_hour is None for kind in kinds):
        return None
    per_hour = sum((kind.cost_per_hour or 0.0) * kind.count for kind in kinds)
    calls_per_hour = rate_per_s * 3_600.0
    return Costs(
        per_hour=per_hour,
        per_million_tokens=per_hour / (calls_per_hour * traffic.tokens_per_call) * 1e6,
        per_million_output_tokens=per_hour / (calls_per_hour * traffic.output_tokens_per_call) * 1e6,
    )
