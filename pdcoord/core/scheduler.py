"""The joint choice: the best pair of endpoints, or the best one alone, by predicted time."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pdcoord.core.disagg import MUST_STAY_TOGETHER, weigh, why_together
from pdcoord.core.filters import eligible
from pdcoord.core.fleet import Endpoint, EndpointId, Fleet
from pdcoord.core.ledger import Ledger
from pdcoord.core.legs import Conditions, Leg, LegMaker, PoolLegs
from pdcoord.core.model import Model, Slo
from pdcoord.core.objective import Objective, Rank
from pdcoord.core.pairs import Pairs, has_way_to_split, worker_room
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.pruning import pruned
from pdcoord.core.request import Request

_NO_SLO = Slo()
_NOBODY: frozenset[EndpointId] = frozenset()
_SPLIT = frozenset({Why.SPLIT_FASTER, Why.SPLIT_PREFERRED, Why.SPLIT_ALWAYS})


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
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
        self, fleet: Fleet, ledger: Ledger, prefixes: Prefixes, paths: PathTable, speed: SpeedModel
    ) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._prefixes = prefixes
        self._paths = paths
        self._speed = speed

    def choose(
        self,
        request: Request,
        model: Model,
        excluded: frozenset[EndpointId],
        now_s: float,
        shunned: frozenset[EndpointId] = _NOBODY,
    ) -> Choice | NoChoice:
        """Least SLO violation, then least time, then least price, over all open pairs and all alone.

        Args:
            shunned: endpoints that serve badly; they are among the rest where nobody else can serve it. That
                others have as many requests as they may is no such case.
        """
        choice = self._choose(request, model, excluded, shunned, now_s)
        if isinstance(choice, NoChoice) and shunned:
            drops = choice.drops
            if drops.get(DropReason.QUARANTINED) and not drops.get(DropReason.AT_LIMIT):
                return self._choose(request, model, excluded, _NOBODY, now_s)
            return self.choose_with_shunned_prefills(request, model, excluded, now_s, shunned) or choice
        return choice

    def choose_with_shunned_prefills(
        self,
        request: Request,
        model: Model,
        excluded: frozenset[EndpointId],
        now_s: float,
        shunned: frozenset[EndpointId],
    ) -> Choice | None:
        """The same with shunned endpoints that only prefill among the rest; None where that changes nothing.

        As long as one that serves well has merely as many requests as it may, they stay away.
        """
        groups = [each for each in self._fleet.groups(model.name) if not each.pool.can_decode]
        drops = eligible(groups, request, self._ledger, excluded, shunned).drops
        if not drops.get(DropReason.QUARANTINED) or drops.get(DropReason.AT_LIMIT):
            return None
        let_in = {state.endpoint.id for group in groups for state in group.states()}
        choice = self._choose(request, model, excluded, shunned - let_in, now_s)
        return choice if isinstance(choice, Choice) else None

    def _choose(
        self,
        request: Request,
        model: Model,
        excluded: frozenset[EndpointId],
        shunned: frozenset[EndpointId],
        now_s: float,
    ) -> Choice | NoChoice:
        if request.slo != _NO_SLO:
            own = Slo(request.slo.ttft_s or model.slo.ttft_s, request.slo.tpot_s or model.slo.tpot_s)
            model = replace(model, slo=own)
        objective = Objective(model, request.priority)
        found = eligible(self._fleet.groups(model.name), request, self._ledger, excluded, shunned)
        drops = found.drops
        cached = self._prefixes.cached_tokens(request, model, now_s)
        troubled = self._paths.troubled
        room = worker_room(model)
        conditions = Conditions(now_s, model.slo, self._ledger.typical_prefill_s)
        maker = LegMaker(
            request,
            cached,
            self._speed,
            room=room,
            troubled=troubled,
            conditions=conditions,
            in_use=self._prefixes.in_use,
        )
        apart = {*troubled, *self._speed.unlike}
        legs = [maker.legs(pruned(fit, cached, apart)) for fit in found.pools]
        decodes = [pool_legs for pool_legs in legs if pool_legs.pool.can_decode]
        alone = best_alone(decodes, model, self._speed, drops, objective)
        together_why = why_together(request, model)
        if together_why is not None and alone is not None:
            return Choice(alone, together_why, None, (), drops, is_outage=False)
        if together_why in MUST_STAY_TOGETHER:
            return NoChoice(drops)
        workers = [pool_legs for pool_legs in legs if pool_legs.pool.can_prefill]
        pairs = Pairs(model, self._paths, self._speed, drops, now_s, objective=objective)
        pair = pairs.best(workers, decodes)
        if pair is None:
            if alone is None:
                return NoChoice(drops)
            why = pairs.why_none(alone, workers)
            is_outage = why is not Why.PREFIX_CACHED and has_way_to_split(model, self._paths)
            if is_outage:
                alone = self._best_with_headroom(decodes, model, objective) or alone
            return Choice(alone, why, None, (), drops, is_outage)
        split = pair.candidate
        if alone is None:
            return Choice(split, Why.SPLIT_ONLY_WAY, None, pair.other_prefills, drops, is_outage=False)
        why = weigh(split, alone, model.disaggregation)
        if why in _SPLIT:
            return Choice(split, why, alone, pair.other_prefills, drops, is_outage=False)
        return Choice(alone, why, split, (), drops, is_outage=False)

    def _best_with_headroom(
        self, decodes: Iterable[PoolLegs], model: Model, objective: Objective
    ) -> Candidate | None:
        roomy = self._with_headroom(decodes, model)
        return best_alone(roomy, model, self._speed, Counter(), objective)

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


def best_alone(
    decodes: Iterable[PoolLegs],
    model: Model,
    speed: SpeedModel,
    drops: Counter[DropReason],
    objective: Objective | None = None,
) -> Candidate | None:
    """The best endpoint to serve the whole request, or None.

    Args:
        objective: the request's; without it that of a usual request for the model.
    """
    objective = objective or Objective(model)
    best: tuple[Rank, Leg] | None = None
    for pool_legs in decodes:
        if not pool_legs.pool.can_serve_alone:
            drops[DropReason.CANNOT_SERVE_ALONE] += pool_legs.endpoint_count
            continue
        for leg in pool_legs.legs:
            ttft_s = leg.wait_s + leg.prefill_s + leg.step_s
            cost = leg.prefill_price + leg.output_price
            unfit = objective.unfit(ttft_s, pool_legs.pool) if objective.has_unfit else 0
            turn = leg.load.begun_ordinal
            rank = objective.rank(ttft_s, leg.pace_s, leg.others_s, cost, turn, unfit=unfit, harm=leg.harm)
            if best is None or rank < best[0]:
                best = rank, leg
    return _alone(best[1], objective, speed) if best is not None else None


def _alone(leg: Leg, objective: Objective, speed: SpeedModel) -> Candidate:
    ttft_s = leg.wait_s + leg.prefill_s + leg.step_s
    figures = Figures(
        queue_s=leg.queue_s,
        prefill_s=leg.prefill_s,
        transfer_s=0.0,
        step_s=leg.step_s,
        stall_s=leg.stall_s,
        slo_excess=objective.excess(ttft_s, leg.pace_s) + leg.harm,
        cost=leg.prefill_price + leg.output_price,
        uncached_tokens=leg.uncached_tokens,
        cached_tokens=leg.cached_tokens,
        room_s=max(0.0, leg.room_s - leg.queue_s),
        landing_tokens=leg.uncached_tokens,
        pace_s=leg.pace_s,
        harm=leg.harm,
        others_s=leg.others_s,
        spread_s=speed.prefill_spread_s(leg.endpoint, leg.uncached_tokens),
        unfit=objective.unfit(ttft_s, leg.endpoint.pool),
    )
    return Candidate(leg.endpoint, None, None, figures)
