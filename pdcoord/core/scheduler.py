"""The joint choice: the best pair of endpoints, or the best one alone, by predicted time."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pdcoord.core.disagg import MUST_STAY_TOGETHER, weigh, why_together
from pdcoord.core.filters import eligible
from pdcoord.core.fleet import Endpoint, EndpointId, Fleet
from pdcoord.core.ledger import Ledger
from pdcoord.core.legs import Leg, LegMaker, PoolLegs
from pdcoord.core.model import Model
from pdcoord.core.objective import Objective, Rank
from pdcoord.core.pairs import Pairs, has_way_to_split, worker_room
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefix import PrefixIndex
from pdcoord.core.request import Request


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and what it was chosen from.

    Attributes:
        other_prefills: prefill endpoints for the same decode endpoint, best first, for the ladder.
        is_outage: the request would have been considered for splitting, and the policy has pods for
            it, but no pair was open.
    """

    best: Candidate
    why: Why
    runner_up: Candidate | None
    other_prefills: tuple[Endpoint, ...]
    drops: Mapping[DropReason, int]
    is_outage: bool


@dataclass(frozen=True, slots=True)
class NoChoice:
    """No endpoint can serve the request now."""

    drops: Mapping[DropReason, int]


class Scheduler:
    """Chooses legs for one request from the state it is given; changes nothing."""

    def __init__(
        self, fleet: Fleet, ledger: Ledger, prefix: PrefixIndex, paths: PathTable, speed: SpeedModel
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._prefix = prefix
        self._paths = paths
        self._speed = speed

    def choose(
        self, request: Request, model: Model, excluded: frozenset[EndpointId], now_s: float
    ) -> Choice | NoChoice:
        """Least SLO violation, then least time, then least price, over all open pairs and all alone."""
        found = eligible(self._fleet.groups(model.name), request, self._ledger, excluded)
        drops = found.drops
        cached = self._cached_tokens(request)
        troubled = self._paths.troubled
        room = worker_room(model)
        maker = LegMaker(request, cached, self._speed, room=room, troubled=troubled, now_s=now_s)
        legs = [maker.legs(fit) for fit in found.pools]
        decodes = [pool_legs for pool_legs in legs if pool_legs.pool.can_decode]
        alone = best_alone(decodes, model, drops)
        together_why = why_together(request, model)
        if together_why is not None and alone is not None:
            return Choice(alone, together_why, None, (), drops, is_outage=False)
        if together_why in MUST_STAY_TOGETHER:
            return NoChoice(drops)
        workers = [pool_legs for pool_legs in legs if pool_legs.pool.can_prefill]
        pairs = Pairs(model, self._paths, self._speed, drops, now_s)
        pair = pairs.best(workers, decodes)
        if pair is None:
            if alone is None:
                return NoChoice(drops)
            why = pairs.why_none(alone, workers)
            is_outage = why is not Why.PREFIX_CACHED and has_way_to_split(model, self._paths)
            if is_outage:
                alone = best_alone(self._with_headroom(decodes, model), model, Counter()) or alone
            return Choice(alone, why, None, (), drops, is_outage)
        split, others = pair.candidate, pair.other_prefills
        if alone is None:
            return Choice(split, Why.SPLIT_ONLY_WAY, None, others, drops, is_outage=False)
        why = weigh(split, alone, model.disaggregation)
        if why in {Why.SPLIT_FASTER, Why.SPLIT_ALWAYS}:
            return Choice(split, why, alone, others, drops, is_outage=False)
        return Choice(alone, why, split, (), drops, is_outage=False)

    def _cached_tokens(self, request: Request) -> dict[int, int]:
        # The last token is always computed, to get the logits of the next.
        most = max(0, request.prompt_tokens - 1)
        matched = self._prefix.match(request.block_keys)
        return {o: min(blocks * request.block_tokens, most) for o, blocks in matched.items()}

    def _with_headroom(self, decodes: Iterable[PoolLegs], model: Model) -> Iterator[PoolLegs]:
        """The legs on endpoints whose KV pool has room for a prefill that others were to do."""
        usage_max = model.fallback.decode_kv_usage_max
        for pool_legs in decodes:
            roomy = []
            for leg in pool_legs.legs:
                state = self._fleet.get(leg.endpoint.id)
                if state is not None and state.sample is not None and state.sample.kv_usage <= usage_max:
                    roomy.append(leg)
            yield replace(pool_legs, legs=roomy)


def best_alone(decodes: Iterable[PoolLegs], model: Model, drops: Counter[DropReason]) -> Candidate | None:
    """The best endpoint to serve the whole request, or None."""
    objective = Objective(model)
    best: tuple[Rank, Leg] | None = None
    for pool_legs in decodes:
        if not pool_legs.pool.can_serve_alone:
            drops[DropReason.CANNOT_SERVE_ALONE] += pool_legs.endpoint_count
            continue
        for leg in pool_legs.legs:
            ttft_s = leg.queue_s + leg.prefill_s + leg.step_s
            cost = leg.prefill_price + leg.output_price
            rank = objective.rank(ttft_s, leg.step_s, leg.stall_s, cost, leg.load.begun_ordinal)
            if best is None or rank < best[0]:
                best = rank, leg
    return _alone(best[1], objective) if best is not None else None


def _alone(leg: Leg, objective: Objective) -> Candidate:
    figures = Figures(
        queue_s=leg.queue_s,
        prefill_s=leg.prefill_s,
        transfer_s=0.0,
        step_s=leg.step_s,
        stall_s=leg.stall_s,
        slo_excess=objective.excess(leg.queue_s + leg.prefill_s + leg.step_s, leg.step_s),
        cost=leg.prefill_price + leg.output_price,
        uncached_tokens=leg.uncached_tokens,
        cached_tokens=leg.cached_tokens,
    )
    return Candidate(leg.endpoint, None, None, figures)
