"""The best pair of endpoints for a request: every pair that could be it, and few that could not."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pdcoord.core.costs import PathFigures
from pdcoord.core.fleet import Endpoint, EndpointId, Pool, Role
from pdcoord.core.legs import Leg, PoolLegs
from pdcoord.core.model import Model, SplitMode
from pdcoord.core.objective import Objective, Rank
from pdcoord.core.paths import BreakerState, PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.ports import SpeedModel
from pdcoord.core.shortlist import Row, ShortList

DECODE_ROOM = 2
"""How many matches put a decode endpoint out of a short list: one of them may be the pair's other end."""


def worker_room(model: Model) -> int:
    """The same for those that prefill, of whom the ladder names more after the best."""
    return DECODE_ROOM + model.fallback.other_prefill_max


@dataclass(frozen=True, slots=True)
class BestPair:
    """The best pair, and the next best prefill endpoints for its decode endpoint."""

    candidate: Candidate
    other_prefills: tuple[Endpoint, ...]


class Pairs:
    """The open pairs of one request, formed from a short list of each pool."""

    def __init__(
        self,
        model: Model,
        paths: PathTable,
        speed: SpeedModel,
        drops: Counter[DropReason],
        now_s: float,
        *,
        priority: int = 0,
    ) -> None:
        self._model = model
        self._objective = Objective(model, priority)
        self._paths = paths
        self._troubled = paths.troubled
        self._has_probes = paths.has_measured
        self._speed = speed
        self._drops = drops
        self._now_s = now_s
        self._worker_list = ShortList(worker_room(model), paths.troubled)
        self._decode_list = ShortList(DECODE_ROOM, paths.troubled)
        self._cached: set[EndpointId] = set()

    def best(self, workers: Sequence[PoolLegs], decodes: Sequence[PoolLegs]) -> BestPair | None:
        """The best open pair, or None."""
        short_workers = [(pool_legs, self._short_workers(pool_legs)) for pool_legs in workers]
        best: tuple[Rank, Leg] | None = None
        for pool_legs in decodes:
            short_decodes = self._short_decodes(pool_legs)
            for pool_workers, listed in short_workers:
                link = self._link(pool_workers.pool, pool_legs.pool, listed, short_decodes)
                if isinstance(link, DropReason):
                    self._drops[link] += pool_workers.endpoint_count * pool_legs.endpoint_count
                elif link is not None:
                    best = self._better(best, listed, short_decodes, link)
        if best is None:
            return None
        return self._with_others(best[1], short_workers)

    def why_none(self, alone: Candidate, workers: Sequence[PoolLegs]) -> Why:
        """Why a request that might have been split stays together."""
        if alone.decode.id in self._cached:
            return Why.PREFIX_CACHED
        return Why.NO_OPEN_PATH if workers else Why.NO_PREFILL_ENDPOINT

    def _short_workers(self, pool_legs: PoolLegs) -> list[Leg]:
        rows: list[Row[Leg]] = []
        for index, leg in enumerate(pool_legs.legs):
            load = leg.load
            ready_s, price = leg.queue_s + leg.prefill_s, leg.prefill_price
            turn, owner = load.begun_ordinal, leg.endpoint.id
            figures = ready_s, leg.others_s, load.bytes_in_flight, leg.harm, 0.0
            rows.append((figures, price, turn, index, owner, leg))
        return self._worker_list.kept(rows)

    def _short_decodes(self, pool_legs: PoolLegs) -> list[Leg]:
        rules = self._model.disaggregation
        may_stay = rules.mode is SplitMode.AUTO and pool_legs.pool.can_serve_alone
        cached_below = rules.uncached_tokens_min if may_stay else -1
        rows: list[Row[Leg]] = []
        for index, leg in enumerate(pool_legs.legs):
            tokens, load, owner = leg.uncached_tokens, leg.load, leg.endpoint.id
            if tokens < cached_below:
                self._cached.add(owner)
                continue
            moving, price, turn = load.bytes_in_flight, leg.output_price, load.begun_ordinal
            figures = leg.step_s, tokens, moving, max(leg.room_s, leg.queue_s), leg.pace_s
            rows.append((figures, price, turn, index, owner, leg))
        return self._decode_list.kept(rows)

    def _better(
        self, best: tuple[Rank, Leg] | None, workers: list[Leg], decodes: list[Leg], link: PathFigures
    ) -> tuple[Rank, Leg] | None:
        """The best rank so far, with its decode leg, after these pairs."""
        for decode in decodes:
            for worker in workers:
                figures = self._way(worker, decode, link)
                if isinstance(figures, DropReason):
                    self._drops[figures] += 1
                elif worker.endpoint is not decode.endpoint:
                    rank = self._rank(worker, decode, figures)
                    if best is None or rank < best[0]:
                        best = rank, decode
        return best

    def _with_others(self, decode: Leg, workers: list[tuple[PoolLegs, list[Leg]]]) -> BestPair:
        """The best pair with this decode endpoint, and whom its ladder may turn to."""
        ranked: list[tuple[Rank, int, Leg, PathFigures]] = []
        for pool_workers, listed in workers:
            link = self._link(pool_workers.pool, decode.endpoint.pool, listed, [decode])
            if not isinstance(link, PathFigures):
                continue
            for worker in listed:
                figures = self._way(worker, decode, link)
                if worker.endpoint is not decode.endpoint and isinstance(figures, PathFigures):
                    ranked.append((self._rank(worker, decode, figures), len(ranked), worker, figures))
        ranked.sort(key=lambda row: row[:2])
        _, _, best, figures = ranked[0]
        # A rung is there to save the request: it is no place to probe a path.
        others = [leg.endpoint for _, _, leg, _ in ranked[1:] if self._is_closed(leg, decode)]
        return BestPair(
            self._candidate(best, decode, figures), tuple(others[: self._model.fallback.other_prefill_max])
        )

    def _way(self, worker: Leg, decode: Leg, link: PathFigures) -> PathFigures | DropReason:
        """What one path costs, given what the way between its pools does, or why it is not used."""
        prefill_id, decode_id, now_s = worker.endpoint.id, decode.endpoint.id, self._now_s
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
        transfer_s = link.transfer_s(_transfer_bytes(worker, decode), _bytes_ahead(worker, decode))
        # Its KV is there, but it is taken into the batch behind the prompts that wait on the same endpoint.
        ready_s = worker.queue_s + worker.prefill_s + transfer_s
        ttft_s = max(ready_s, decode.room_s, decode.queue_s) + decode.step_s
        objective = self._objective
        unfit = 0
        if objective.has_unfit:
            unfit = objective.unfit(ttft_s, decode.endpoint.pool, worker.endpoint.pool)
        return objective.rank(
            ttft_s,
            decode.pace_s,
            worker.others_s,
            worker.prefill_price + decode.output_price,
            worker.load.begun_ordinal + decode.load.begun_ordinal,
            unfit=unfit,
            harm=worker.harm,
        )

    def _candidate(self, worker: Leg, decode: Leg, link: PathFigures) -> Candidate:
        transfer_bytes = _transfer_bytes(worker, decode)
        transfer_s = link.transfer_s(transfer_bytes, _bytes_ahead(worker, decode))
        ready_s = worker.queue_s + worker.prefill_s + transfer_s
        ttft_s = max(ready_s, decode.room_s, decode.queue_s) + decode.step_s
        figures = Figures(
            queue_s=worker.queue_s,
            prefill_s=worker.prefill_s,
            transfer_s=transfer_s,
            step_s=decode.step_s,
            stall_s=worker.stall_s,
            slo_excess=self._objective.excess(ttft_s, decode.pace_s) + worker.harm,
            cost=worker.prefill_price + decode.output_price,
            uncached_tokens=worker.uncached_tokens,
            cached_tokens=worker.cached_tokens,
            transfer_bytes=transfer_bytes,
            room_s=max(0.0, max(decode.room_s, decode.queue_s) - ready_s),
            landing_tokens=decode.uncached_tokens,
            pace_s=decode.pace_s,
            harm=worker.harm,
            others_s=worker.others_s,
            spread_s=math.hypot(
                self._speed.prefill_spread_s(worker.endpoint, worker.uncached_tokens),
                transfer_s * link.spread_share,
            ),
            unfit=self._objective.unfit(ttft_s, decode.endpoint.pool, worker.endpoint.pool),
        )
        verdict = self._paths.verdict(worker.endpoint.pool, decode.endpoint.pool)
        return Candidate(decode.endpoint, worker.endpoint, verdict, figures)

    def _link(
        self, prefill: Pool, decode: Pool, workers: list[Leg], decodes: list[Leg]
    ) -> PathFigures | DropReason | None:
        """What the way between two pools costs, why it is not used, or None with nobody at an end."""
        if not self._paths.verdict(prefill, decode).is_possible:
            return DropReason.VERDICT_IMPOSSIBLE
        if not workers or not decodes:
            return None
        figures = self._speed.path(workers[0].endpoint, decodes[0].endpoint)
        if figures.bandwidth_bytes_per_s <= 0.0:
            return DropReason.BANDWIDTH_UNKNOWN
        if figures.bandwidth_bytes_per_s < self._model.disaggregation.bandwidth_bytes_per_s_min:
            return DropReason.BANDWIDTH_TOO_LOW
        return figures


def _transfer_bytes(worker: Leg, decode: Leg) -> int:
    return decode.uncached_tokens * worker.endpoint.pool.kv_bytes_per_token


def _bytes_ahead(worker: Leg, decode: Leg) -> int:
    """What is already under way on the fuller of the two links."""
    return max(worker.load.bytes_in_flight, decode.load.bytes_in_flight)


def has_way_to_split(model: Model, paths: PathTable) -> bool:
    """Whether the policy has prefill pods whose KV could reach a decode pod, were all of them well.

    A fleet without such pods, or without a way from them, serves together by design, not by an outage.
    """
    bandwidth_min = max(model.disaggregation.bandwidth_bytes_per_s_min, 1.0)
    return any(
        paths.verdict(prefill, decode).is_possible
        and min(prefill.link_bytes_per_s, decode.link_bytes_per_s) >= bandwidth_min
        for prefill in model.pools
        for decode in model.pools
        if prefill.role is Role.PREFILL and decode.can_decode
    )
