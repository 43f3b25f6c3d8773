"""The best pair of endpoints for a request: every pair that could be it, and few that could not."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdcoord.core.costs import PathFigures
from pdcoord.core.fleet import Endpoint, EndpointId, Pool, Role
from pdcoord.core.gates import UNTRIED
from pdcoord.core.ledger import IDLE
from pdcoord.core.legs import Leg, PoolLegs
from pdcoord.core.model import Model, SplitMode
from pdcoord.core.objective import Objective, Rank
from pdcoord.core.paths import BreakerState, PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.ports import SpeedModel
from pdcoord.core.shortlist import Row, ShortList

SHORT_ANYWAY = 12
"""So many legs of a pool are weighed as they are: a short list of them would cost more than it saves."""

DECODE_ROOM = 2
"""How many matches put a decode endpoint out of a short list: one of them may be the pair's other end."""


def worker_room(model: Model) -> int:
    """The same for those that prefill, of whom the ladder names more after the best."""
    return DECODE_ROOM + model.fallback.other_prefill_max


Listed = list[tuple[PoolLegs, list[Leg]]]
"""Pools, each with those of its legs that may be in the best pair."""


@dataclass(slots=True)
class _Field:
    """The pairs of two pools.

    Attributes:
        least_decode: as good in each figure as the best of `decodes`.
        bound: no pair of them has a lower rank; None where there is no other field.
    """

    workers: list[Leg]
    decodes: list[Leg]
    least_decode: Leg
    link: PathFigures
    bound: Rank | None = None


class BestPair:
    """The best pair, and the next best prefill endpoints for its decode endpoint."""

    def __init__(
        self, pairs: "Pairs", worker: Leg, decode: Leg, figures: PathFigures, listed: Listed
    ) -> None:
        self.candidate = pairs.candidate(worker, decode, figures)
        self._pairs = pairs
        self._worker = worker
        self._decode = decode
        self._listed = listed

    @property
    def other_prefills(self) -> tuple[Endpoint, ...]:
        """Whom the pair's ladder may turn to; found when asked for, since few pairs are chosen."""
        return self._pairs.others(self._worker, self._decode, self._listed)


class Pairs:
    """The open pairs of one request, formed from a short list of each pool.

    Only those that may be better than the best so far are looked at. So of the pairs whose path is no use
    those are counted that stood before it; of pools between which nothing goes, all.
    """

    def __init__(
        self,
        model: Model,
        paths: PathTable,
        speed: SpeedModel,
        drops: Counter[DropReason],
        now_s: float,
        *,
        objective: Objective | None = None,
    ) -> None:
        self._model = model
        self._objective = objective or Objective(model)
        self._paths = paths
        self._troubled = paths.troubled
        self._has_probes = paths.has_measured
        self._is_calm = not paths.troubled and not paths.has_measured
        self._speed = speed
        self._drops = drops
        self._now_s = now_s
        self._cached: set[EndpointId] = set()

    def best(self, workers: Sequence[PoolLegs], decodes: Sequence[PoolLegs]) -> BestPair | None:
        """The best open pair, or None."""
        listed = [(pool_legs, self._short_workers(pool_legs)) for pool_legs in workers]
        best: _Found | None = None
        for field in self._fields(listed, decodes):
            if best is not None and field.bound is not None and field.bound >= best[0]:
                break
            best = self._better(best, field)
        if best is None:
            return None
        _, worker, decode, figures = best
        return BestPair(self, worker, decode, figures, listed)

    def _fields(self, listed: Listed, decodes: Sequence[PoolLegs]) -> list[_Field]:
        """The pairs of pools that can hand over, least bound first."""
        fields: list[_Field] = []
        for pool_legs in decodes:
            own = self._short_decodes(pool_legs)
            least_decode = _least_decode(own) if own else None
            for pool_workers, workers in listed:
                worker = workers[0] if workers else None
                link = self._link(pool_workers.pool, pool_legs.pool, worker, least_decode)
                if isinstance(link, DropReason):
                    self._drops[link] += pool_workers.endpoint_count * pool_legs.endpoint_count
                elif link is not None and least_decode is not None:
                    fields.append(_Field(workers, own, least_decode, link))
        if len(fields) < 2:  # nothing to sort
            return fields
        least_workers = {id(workers): _least_worker(workers) for _, workers in listed if workers}
        bounds = []
        for index, field in enumerate(fields):
            least_worker = least_workers[id(field.workers)]
            field.bound = self._rank(least_worker, field.least_decode, field.link)
            bounds.append((field.bound, index))
        return [fields[index] for _, index in sorted(bounds)]

    def why_none(self, alone: Candidate, workers: Sequence[PoolLegs]) -> Why:
        """Why a request that might have been split stays together."""
        if alone.decode.id in self._cached:
            return Why.PREFIX_CACHED
        return Why.NO_OPEN_PATH if workers else Why.NO_PREFILL_ENDPOINT

    def _short_workers(self, pool_legs: PoolLegs) -> list[Leg]:
        if len(pool_legs.legs) <= SHORT_ANYWAY:
            return pool_legs.legs
        rows: list[Row[Leg]] = []
        for index, leg in enumerate(pool_legs.legs):
            load = leg.load
            ready_s, price = leg.wait_s + leg.prefill_s, leg.prefill_price
            turn, owner = load.begun_ordinal, leg.endpoint.id
            figures = ready_s, leg.prefill_others_s, load.bytes_in_flight, leg.harm, 0.0, 0.0
            rows.append((figures, price, turn, index, owner, leg))
        return ShortList(worker_room(self._model), self._troubled).kept(rows)

    def _short_decodes(self, pool_legs: PoolLegs) -> list[Leg]:
        rules = self._model.disaggregation
        may_stay = rules.mode is SplitMode.AUTO and pool_legs.pool.can_serve_alone
        cached_below = rules.uncached_tokens_min if may_stay else -1
        legs: list[Leg] = []
        for leg in pool_legs.legs:
            if leg.uncached_tokens < cached_below:
                self._cached.add(leg.endpoint.id)
            else:
                legs.append(leg)
        if len(legs) <= SHORT_ANYWAY:
            return legs
        rows: list[Row[Leg]] = []
        for index, leg in enumerate(legs):
            tokens, load, owner = leg.uncached_tokens, leg.load, leg.endpoint.id
            moving, price, turn = load.bytes_in_flight, leg.output_price, load.begun_ordinal
            figures = leg.step_s, tokens, moving, leg.wait_s, leg.pace_s, leg.answer_others_s
            rows.append((figures, price, turn, index, owner, leg))
        return ShortList(DECODE_ROOM, self._troubled).kept(rows)

    def _better(self, best: "_Found | None", field: _Field) -> "_Found | None":
        """The best so far after these pairs. A path is looked at only where its links would be better."""
        least, link = field.least_decode, field.link
        bounds = [(self._rank(worker, least, link), index) for index, worker in enumerate(field.workers)]
        bounds.sort()
        for bound, index in bounds:
            if best is not None and bound >= best[0]:
                break
            worker = field.workers[index]
            for decode in field.decodes:
                if worker.endpoint is decode.endpoint:
                    continue
                rank = self._rank(worker, decode, link)
                if best is not None and rank >= best[0]:
                    continue
                figures = link if self._is_calm else self._way(worker, decode, link)
                if isinstance(figures, DropReason):
                    self._drops[figures] += 1
                    continue
                if figures is not link:
                    rank = self._rank(worker, decode, figures)
                if best is None or rank < best[0]:
                    best = rank, worker, decode, figures
        return best

    def others(self, best: Leg, decode: Leg, listed: Listed) -> tuple[Endpoint, ...]:
        """The next best prefill endpoints for a decode endpoint, as many as the policy's ladder has."""
        most = self._model.fallback.other_prefill_max
        ranked: list[tuple[Rank, int, Leg]] = []
        for pool_workers, workers in listed if most else ():
            link = self._link(
                pool_workers.pool, decode.endpoint.pool, workers[0] if workers else None, decode
            )
            if not isinstance(link, PathFigures):
                continue
            for worker in workers:
                if worker is best or worker.endpoint is decode.endpoint:
                    continue
                figures = link if self._is_calm else self._way(worker, decode, link)
                # A rung is there to save the request: it is no place to probe a path.
                if isinstance(figures, PathFigures) and (self._is_calm or self._is_closed(worker, decode)):
                    ranked.append((self._rank(worker, decode, figures), len(ranked), worker))
        ranked.sort(key=_rank_and_order)
        return tuple(leg.endpoint for _, _, leg in ranked[:most])

    def _way(self, worker: Leg, decode: Leg, link: PathFigures) -> PathFigures | DropReason:
        """What one path costs, given what the way between its pools does, or why it is not used."""
        prefill_id, decode_id, now_s = worker.endpoint.id, decode.endpoint.id, self._now_s
        if self._paths.gates.end_fault(worker.endpoint, decode.endpoint):
            return DropReason.CANARY_FAILED
        if prefill_id in self._troubled and not self._paths.lets_pass(prefill_id, decode_id, now_s):
            is_shut = self._paths.fault(prefill_id, decode_id, now_s)
            return DropReason.PROBE_FAILED if is_shut else DropReason.BREAKER_OPEN
        if not self._has_probes:
            return link
        figures = self._paths.figures(prefill_id, decode_id, link, now_s)
        bandwidth = figures.bandwidth_bytes_per_s
        if bandwidth <= 0.0 or bandwidth < self._model.disaggregation.bandwidth_bytes_per_s_min:
            return DropReason.BANDWIDTH_TOO_LOW
        return figures

    def _is_closed(self, worker: Leg, decode: Leg) -> bool:
        state = self._paths.state(worker.endpoint.id, decode.endpoint.id, self._now_s)
        return state is BreakerState.CLOSED

    def _rank(self, worker: Leg, decode: Leg, link: PathFigures) -> Rank:
        """Must grow with every figure of both legs, or the bounds and the short lists lose what is best."""
        # As `PathFigures.transfer_s` and `candidate` have it, without their calls: this is asked the most.
        moved = decode.uncached_tokens * worker.endpoint.pool.kv_bytes_per_token
        ahead, other = worker.load.bytes_in_flight, decode.load.bytes_in_flight
        moved += ahead if ahead > other else other  # noqa: FURB136  # the call costs more than the rest
        # The prompt is computed into its own pool: where that is full, a prefill waits there as well.
        ready_s = worker.wait_s + worker.prefill_s + (link.latency_s + moved / link.bandwidth_bytes_per_s)
        # Its KV is there, but it is taken into the batch behind the prompts that wait on the same endpoint.
        behind_s = decode.wait_s
        ttft_s = ready_s if ready_s > behind_s else behind_s  # noqa: FURB136  # likewise
        ttft_s += decode.step_s
        objective = self._objective
        unfit = 0
        if objective.has_unfit:
            unfit = objective.unfit(ttft_s, decode.endpoint.pool, worker.endpoint.pool)
        return objective.rank(
            ttft_s,
            decode.pace_s,
            worker.prefill_others_s + decode.answer_others_s,
            worker.prefill_price + decode.output_price,
            worker.load.begun_ordinal + decode.load.begun_ordinal,
            unfit=unfit,
            harm=worker.harm,
        )

    def candidate(self, worker: Leg, decode: Leg, link: PathFigures) -> Candidate:
        transfer_bytes = _transfer_bytes(worker, decode)
        transfer_s = link.transfer_s(transfer_bytes, _bytes_ahead(worker, decode))
        ready_s = worker.wait_s + worker.prefill_s + transfer_s
        ttft_s = max(ready_s, decode.wait_s) + decode.step_s
        figures = Figures(
            queue_s=worker.wait_s,
            prefill_s=worker.prefill_s,
            transfer_s=transfer_s,
            step_s=decode.step_s,
            stall_s=worker.stall_s,
            slo_excess=self._objective.excess(ttft_s, decode.pace_s) + worker.harm,
            cost=worker.prefill_price + decode.output_price,
            uncached_tokens=worker.uncached_tokens,
            cached_tokens=worker.cached_tokens,
            transfer_bytes=transfer_bytes,
            room_s=max(0.0, decode.wait_s - ready_s),
            landing_tokens=decode.uncached_tokens,
            pace_s=decode.pace_s,
            harm=worker.harm,
            others_s=worker.prefill_others_s + decode.answer_others_s,
            spread_s=math.hypot(
                self._speed.prefill_spread_s(worker.endpoint, worker.uncached_tokens),
                transfer_s * link.spread_share,
            ),
            unfit=self._objective.unfit(ttft_s, decode.endpoint.pool, worker.endpoint.pool),
        )
        verdict = self._paths.verdict(worker.endpoint.pool, decode.endpoint.pool)
        return Candidate(decode.endpoint, worker.endpoint, verdict, figures)

    def _link(
        self, prefill: Pool, decode: Pool, worker_leg: Leg | None, decode_leg: Leg | None
    ) -> PathFigures | DropReason | None:
        """What the way between two pools costs, why it is not used, or None with nobody at an end.

        Args:
            worker_leg, decode_leg: any of the one pool and any of the other.
        """
        if not self._paths.verdict(prefill, decode).is_possible:
            return DropReason.VERDICT_IMPOSSIBLE
        gate = self._paths.gates.pair_fault(prefill, decode)
        if gate:
            return DropReason.CANARY_UNTRIED if gate == UNTRIED else DropReason.CANARY_FAILED
        if worker_leg is None or decode_leg is None:
            return None
        figures = self._speed.path(worker_leg.endpoint, decode_leg.endpoint)
        if figures.bandwidth_bytes_per_s <= 0.0:
            return DropReason.BANDWIDTH_UNKNOWN
        if figures.bandwidth_bytes_per_s < self._model.disaggregation.bandwidth_bytes_per_s_min:
            return DropReason.BANDWIDTH_TOO_LOW
        return figures


_Found = tuple[Rank, Leg, Leg, PathFigures]
"""A pair with its rank: worker, decode leg, and what its path costs."""


def _rank_and_order(row: tuple[Rank, int, Leg]) -> tuple[Rank, int]:
    return row[0], row[1]


def _least_worker(legs: list[Leg]) -> Leg:
    """One that no pair with any of these can be better than; what is not named here is 0, which is least."""
    return Leg(
        endpoint=legs[0].endpoint,
        load=IDLE,
        cached_tokens=0,
        uncached_tokens=0,
        queue_s=0.0,
        wait_s=min([leg.wait_s + leg.prefill_s for leg in legs]),
        prefill_s=0.0,
        stall_s=0.0,
        prefill_others_s=min([leg.prefill_others_s for leg in legs]),
        step_s=0.0,
        prefill_price=min([leg.prefill_price for leg in legs]),
        output_price=0.0,
        harm=min([leg.harm for leg in legs]),
    )


def _least_decode(legs: list[Leg]) -> Leg:
    """The same at the other end of a pair."""
    return Leg(
        endpoint=legs[0].endpoint,
        load=IDLE,
        cached_tokens=0,
        uncached_tokens=min([leg.uncached_tokens for leg in legs]),
        queue_s=0.0,
        prefill_s=0.0,
        stall_s=0.0,
        step_s=min([leg.step_s for leg in legs]),
        prefill_price=0.0,
        output_price=min([leg.output_price for leg in legs]),
        wait_s=min([leg.wait_s for leg in legs]),
        pace_s=min([leg.pace_s for leg in legs]),
        answer_others_s=min([leg.answer_others_s for leg in legs]),
    )


def _transfer_bytes(worker: Leg, decode: Leg) -> int:
    return decode.uncached_tokens * worker.endpoint.pool.kv_bytes_per_token


def _bytes_ahead(worker: Leg, decode: Leg) -> int:
    """What is already under way on the fuller of the two links."""
    return max(worker.load.bytes_in_flight, decode.load.bytes_in_flight)


def has_way_to_split(model: Model, paths: PathTable) -> bool:
    """Whether the policy has prefill pods whose KV could reach a decode pod, were all of them well.

    A fleet without such pods, or without a way from them, serves together by design, not by an outage. So
    does one whose ways still wait for their first canary: none has carried a request that is missed now.
    """
    bandwidth_min = max(model.disaggregation.bandwidth_bytes_per_s_min, 1.0)
    return any(
        paths.verdict(prefill, decode).is_possible
        and paths.gates.pair_fault(prefill, decode) != UNTRIED
        and min(prefill.link_bytes_per_s, decode.link_bytes_per_s) >= bandwidth_min
        for prefill in model.pools
        for decode in model.pools
        if prefill.role is Role.PREFILL and decode.can_decode
    )
