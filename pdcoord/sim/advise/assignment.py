"""Who should prefill, who decode, who both: flows of calls between kinds of engines, as a linear program.

Variables are calls per second of each part of the traffic from the group that computes the prompt to the
group that generates. What is maximised is the rate of calls whose first token can come in time, the mix of
parts being what it is. Capacities are those of `capacity`; links are one direction of each engine's card.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.core.speed import PATH_LATENCY_S
from pdcoord.sim.advise.capacity import (
    USE_MAX,
    Capacity,
    capacity,
    crowding,
    in_time_share,
    prefill_use,
)
from pdcoord.sim.advise.demand import Traffic
from pdcoord.sim.advise.kinds import Kind
from pdcoord.sim.advise.program import Program
from transfer.verdict import verdict


class Limit(StrEnum):
    """What can be used up; closed."""

    PREFILL = "prefill"
    TPOT = "decode (time per token)"
    BATCH = "decode (batch and KV)"
    LINK_OUT = "link out"
    LINK_IN = "link in"


_TRIFLES = {Role.PREFILL: -1e-6, Role.DECODE: -1e-6, Role.BOTH: -2e-6}
"""Worth of having a role, in calls per second: nobody is given one that does not help."""

_MOVE_TRIFLE = 1e-6
"""What a transfer counts against a call, so that none is made for nothing."""


@dataclass(frozen=True, slots=True)
class Group:
    """Engines of one kind that do the same.

    Attributes:
        kind: its index.
        lends: whether it computes prompts for other groups.
        borrows: whether prompts that other groups computed are decoded here.
        serves_alone: whether it computes prompts that it decodes itself.
    """

    kind: int
    role: Role
    lends: bool
    borrows: bool
    serves_alone: bool


Way = tuple[Group, Group, int]
"""From the group that prefills to the one that decodes, and the index of the demand."""


@dataclass(frozen=True, slots=True)
class Resource:
    """One thing that one group can run out of."""

    limit: Limit
    group: Group


@dataclass(frozen=True, slots=True)
class Flow:
    """Calls of one part per second from a group to a group; the same group twice is without a transfer."""

    prefill: Group
    decode: Group
    demand: int
    rate_per_s: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """Roles with their counts, and what they can carry.

    Attributes:
        rate_per_s: calls per second that the fleet can take.
        good_per_s: those of them whose first token can come in time.
        worth: share of `good_per_s` that hangs on each resource: the bottleneck has most. Sums to 1.
    """

    counts: Mapping[Group, int]
    rate_per_s: float
    good_per_s: float
    flows: tuple[Flow, ...]
    worth: Mapping[Resource, float]


def group_of(kinds: Sequence[Kind], kind: int, role: Role) -> Group:
    """What engines of a kind do in a role.

    A decode engine of vLLM also serves calls alone; one of SGLang does not, and one without a mode hands
    nothing over.
    """
    is_vllm = kinds[kind].settings.engine is EngineKind.VLLM
    match role:
        case Role.PREFILL:
            return Group(kind, role, lends=True, borrows=False, serves_alone=False)
        case Role.DECODE:
            return Group(kind, role, lends=False, borrows=True, serves_alone=is_vllm)
        case Role.BOTH:
            return Group(kind, role, lends=is_vllm, borrows=is_vllm, serves_alone=True)


def free_groups(kinds: Sequence[Kind]) -> tuple[Group, ...]:
    """Every role that an engine of each kind may be given."""
    return tuple(group_of(kinds, index, role) for index in range(len(kinds)) for role in Role)


def written_counts(kinds: Sequence[Kind]) -> dict[Group, int]:
    """The roles that the fleet file gives."""
    return dict(
        Counter(group_of(kinds, index, role) for index, kind in enumerate(kinds) for role in kind.roles)
    )


def all_both(kinds: Sequence[Kind]) -> dict[Group, int]:
    """No roles: what a fleet is that is not split."""
    return {group_of(kinds, index, Role.BOTH): kind.count for index, kind in enumerate(kinds)}


class Planner:
    """Solves for one traffic on fleets of the same kinds, whatever their counts."""

    def __init__(self, kinds: Sequence[Kind], traffic: Traffic) -> None:
        self.kinds = tuple(kinds)
        self.traffic = traffic

    @cached_property
    def capacities(self) -> tuple[Capacity, ...]:
        return tuple(capacity(kind, self.traffic) for kind in self.kinds)

    @cached_property
    def _wire_bytes(self) -> dict[tuple[int, int], float]:
        """Bytes on the wire for one token from kind to kind; only pairs that can hand over."""
        found: dict[tuple[int, int], float] = {}
        for p, producer in enumerate(self.kinds):
            for d, consumer in enumerate(self.kinds):
                judged = verdict(producer.settings.side, consumer.settings.side)
                if judged.is_possible and judged.cost is not None:
                    found[p, d] = consumer.settings.kv_bytes_per_token * judged.cost.wire_factor
        return found

    @cached_property
    def _in_time(self) -> dict[tuple[int, int, bool, int], float]:
        return {}

    def in_time(self, prefill: Group, decode: Group, demand: int) -> float:
        """Share of a part's calls that can begin in time on this way, 0..1."""
        is_moved = prefill is not decode
        key = (prefill.kind, decode.kind, is_moved, demand)
        if key not in self._in_time:
            step_s = self.kinds[decode.kind].settings.speed.step_base_s
            per_token_s, fixed_s = 0.0, step_s
            if is_moved:
                link = min(self.kinds[each.kind].settings.link_bytes_per_s for each in (prefill, decode))
                per_token_s = self._wire_bytes[prefill.kind, decode.kind] / link
                fixed_s += PATH_LATENCY_S
            self._in_time[key] = in_time_share(
                self.kinds[prefill.kind], self.traffic.demands[demand], per_token_s, fixed_s
            )
        return self._in_time[key]

    def can_flow(self, prefill: Group, decode: Group) -> bool:
        if prefill == decode:
            return prefill.serves_alone
        return prefill.lends and decode.borrows and (prefill.kind, decode.kind) in self._wire_bytes

    def _can_decode(self, kind: int, demand: int) -> bool:
        mine = self.capacities[kind]
        return mine.costs[demand].can_decode and (mine.step_room is None or mine.step_room > 0.0)

    def with_counts(self, counts: Mapping[Group, int], alike: Sequence[int] | None = None) -> Assignment:
        """What given roles can carry.

        Args:
            counts: engines by group.
            alike: by kind, among how many engines chance evens out; None for those of each group.
        """
        groups = tuple(group for group, count in counts.items() if count > 0)
        among = {group: counts[group] if alike is None else alike[group.kind] for group in groups}
        program, total, flows = self._program(groups)
        for group in groups:
            for resource, terms in self._uses(group, flows, among[group]).items():
                program.row(resource, terms, counts[group] * self._room(resource, among[group]))
        solution = program.solve()
        worth = {
            name: value * bound
            for name, value in solution.worth.items()
            if isinstance(name, Resource)
            and (bound := counts[name.group] * self._room(name, among[name.group])) > 0.0
        }
        whole = sum(worth.values())
        return Assignment(
            counts={group: counts[group] for group in groups},
            rate_per_s=solution.values[total],
            good_per_s=sum(self.in_time(*way) * solution.values[index] for way, index in flows.items()),
            flows=tuple(
                Flow(*way, solution.values[index])
                for way, index in flows.items()
                if solution.values[index] > 1e-9
            ),
            worth={name: value / whole for name, value in worth.items()} if whole > 1e-12 else {},
        )

    def best_counts(self, engine_counts: Sequence[int]) -> dict[Group, int]:
        """The roles that carry most, for so many engines of each kind.

        How many share a queue is not known before the roles are; all of a kind are taken to.
        """
        groups = free_groups(self.kinds)
        program, _, flows = self._program(groups)
        numbers = {group: program.variable(_TRIFLES[group.role], is_whole=True) for group in groups}
        for kind, count in enumerate(engine_counts):
            mine = {number: 1.0 for group, number in numbers.items() if group.kind == kind}
            program.row(("engines", kind), mine, float(count))
        for group in groups:
            among = engine_counts[group.kind]
            for resource, terms in self._uses(group, flows, among).items():
                program.row(resource, {**terms, numbers[group]: -self._room(resource, among)}, 0.0)
        values = program.solve().values
        found = {group: round(values[number]) for group, number in numbers.items()}
        return {group: count for group, count in found.items() if count > 0}

    def _program(self, groups: Sequence[Group]) -> tuple[Program, int, dict[Way, int]]:
        """A program without resources, its variable for the total rate, and those for the flows."""
        program = Program()
        total = program.variable(0.0)
        flows = {
            (p, d, k): program.variable(self.in_time(p, d, k) - (_MOVE_TRIFLE if p != d else 0.0))
            for p in groups
            for d in groups
            if self.can_flow(p, d)
            for k, demand in enumerate(self.traffic.demands)
            if self._can_decode(d.kind, k) and (demand.can_split or p == d)
        }
        for k, demand in enumerate(self.traffic.demands):
            terms = {index: 1.0 for way, index in flows.items() if way[2] == k}
            program.row(("mix", k), {**terms, total: -demand.share}, 0.0, is_equal=True)
        return program, total, flows

    def _uses(self, group: Group, flows: Mapping[Way, int], among: int) -> dict[Resource, dict[int, float]]:
        """What each flow takes of what the group has."""
        mine = self.capacities[group.kind]
        crowded = crowding(mine.batch, among)
        uses: dict[Limit, dict[int, float]] = {limit: {} for limit in Limit}
        for (p, d, k), index in flows.items():
            cost = mine.costs[k]
            if p == group:
                uses[Limit.PREFILL][index] = cost.prefill_s
            if d == group:
                uses[Limit.TPOT][index] = cost.step_share / crowded
                uses[Limit.BATCH][index] = cost.batch_share / crowded
            if p == group and group.role is not Role.PREFILL:
                for limit, stall_s in ((Limit.TPOT, cost.felt_stall_s), (Limit.BATCH, cost.stall_s)):
                    uses[limit][index] = uses[limit].get(index, 0.0) + stall_s
            if p != d and group in {p, d}:
                moved_bytes = self._wire_bytes[p.kind, d.kind] * self.traffic.demands[k].uncached_tokens
                link = self.kinds[group.kind].settings.link_bytes_per_s
                uses[Limit.LINK_OUT if p == group else Limit.LINK_IN][index] = moved_bytes / link
        if mine.step_room is None:
            del uses[Limit.TPOT]
        return {Resource(limit, group): terms for limit, terms in uses.items() if terms}

    def _room(self, resource: Resource, among: int) -> float:
        """How much of it one engine of `among` has: seconds of use per second."""
        kind, mine = self.kinds[resource.group.kind], self.capacities[resource.group.kind]
        match resource.limit:
            case Limit.PREFILL:
                return prefill_use(kind, self.traffic, among)
            case Limit.TPOT:
                return max(0.0, mine.step_room or 0.0)
            case Limit.BATCH:
                return 1.0
            case Limit.LINK_OUT | Limit.LINK_IN:
                return USE_MAX
