"""The best pair of endpoints for a request: every pair that could be it, and few that could not."""

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

ROOM_MIN = 4
LISTED_MAX = 32
TROUBLED_MAX = 16
"""Endpoints with a tripped path that a short list keeps besides; they may be open to some only."""

_Row = tuple[float, float, float, float, int, int, Leg]
"""The three figures that decide, price, turn, index (so that legs never compare)."""


def room(model: Model) -> int:
    """How many matches put an endpoint out of a short list: the best, itself, and the ladder's."""
    return max(ROOM_MIN, model.fallback.other_prefill_max + 2)


@dataclass(frozen=True, slots=True)
class BestPair:
    """The best pair, and the next best prefill endpoints for its decode endpoint."""

    candidate: Candidate
    other_prefills: tuple[Endpoint, ...]


class Pairs:
    """The open pairs of one request, formed from a short list of each pool.

    Within a pool speed, verdict and link are equal. An endpoint that several others match or beat in
    every figure that a pair's violation and time are made of is in no better pair than they are, so
    it is left out; what is left is a few endpoints whatever the size of the pool. Those with a
    tripped path put nobody out, since they may not be open to the same endpoints. Lossless but for
    price among pairs equal within the noise, and past LISTED_MAX endpoints that all differ.
    """

    def __init__(
        self, model: Model, paths: PathTable, speed: SpeedModel, drops: Counter[DropReason], now_s: float
    ) -> None:
        self._model = model
        self._objective = Objective(model)
        self._paths = paths
        self._troubled = paths.troubled
        self._speed = speed
        self._drops = drops
        self._now_s = now_s
        self._room = room(model)
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
        rows: list[_Row] = []
        for index, leg in enumerate(pool_legs.legs):
            load = leg.load
            ready_s = leg.queue_s + leg.prefill_s
            row = (
                ready_s,
                leg.stall_s,
                load.bytes_in_flight,
                leg.prefill_price,
                load.begun_ordinal,
                index,
                leg,
            )
            rows.append(row)
        return self._shortened(rows)

    def _short_decodes(self, pool_legs: PoolLegs) -> list[Leg]:
        rules = self._model.disaggregation
        may_stay = rules.mode is SplitMode.AUTO and pool_legs.pool.can_serve_alone
        cached_below = rules.uncached_tokens_min if may_stay else -1
        rows: list[_Row] = []
        for index, leg in enumerate(pool_legs.legs):
            tokens, load = leg.uncached_tokens, leg.load
            if tokens < cached_below:
                self._cached.add(leg.endpoint.id)
                continue
            row = (leg.step_s, tokens, load.bytes_in_flight, leg.output_price, load.begun_ordinal, index, leg)
            rows.append(row)
        return self._shortened(rows)

    def _shortened(self, rows: list[_Row]) -> list[Leg]:
        """The legs that fewer than `room` others match in every figure, least first figure first."""
        rows.sort()
        least = min((row[1] for row in rows), default=0.0), min((row[2] for row in rows), default=0.0)
        kept: list[Leg] = []
        clear: list[tuple[float, float, float]] = []
        perfect_left, troubled_left = self._room, TROUBLED_MAX
        for first, second, third, _, _, _, leg in rows:
            if self._is_matched(clear, first, second, third):
                continue
            if leg.endpoint.id not in self._troubled:
                clear.append((first, second, third))
                perfect_left -= (second, third) == least
            elif troubled_left:
                troubled_left -= 1
            else:
                continue
            kept.append(leg)
            # Whatever follows is no less in the first figure, and cannot be in the others.
            if not perfect_left or len(clear) == LISTED_MAX:
                break
        return kept

    def _is_matched(
        self, clear: list[tuple[float, float, float]], first: float, second: float, third: float
    ) -> bool:
        matched = 0
        for figures in clear:
            if figures[0] <= first and figures[1] <= second and figures[2] <= third:
                matched += 1
                if matched == self._room:
                    return True
        return False

    def _better(
        self, best: tuple[Rank, Leg] | None, workers: list[Leg], decodes: list[Leg], link: PathFigures
    ) -> tuple[Rank, Leg] | None:
        """The best rank so far, with its decode leg, after these pairs."""
        for decode in decodes:
            for worker in workers:
                if not self._is_open(worker, decode):
                    self._drops[DropReason.BREAKER_OPEN] += 1
                elif worker.endpoint is not decode.endpoint:
                    rank = self._rank(worker, decode, link)
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
                if worker.endpoint is not decode.endpoint and self._is_open(worker, decode):
                    ranked.append((self._rank(worker, decode, link), len(ranked), worker, link))
        ranked.sort(key=lambda row: row[:2])
        _, _, best, link = ranked[0]
        # A rung is there to save the request: it is no place to probe a path.
        others = [leg.endpoint for _, _, leg, _ in ranked[1:] if self._is_closed(leg, decode)]
        return BestPair(
            self._candidate(best, decode, link), tuple(others[: self._model.fallback.other_prefill_max])
        )

    def _is_open(self, worker: Leg, decode: Leg) -> bool:
        prefill_id = worker.endpoint.id
        return prefill_id not in self._troubled or self._paths.lets_pass(
            prefill_id, decode.endpoint.id, self._now_s
        )

    def _is_closed(self, worker: Leg, decode: Leg) -> bool:
        state = self._paths.state(worker.endpoint.id, decode.endpoint.id, self._now_s)
        return state is BreakerState.CLOSED

    def _transfer(self, worker: Leg, decode: Leg, link: PathFigures) -> tuple[int, float]:
        transfer_bytes = decode.uncached_tokens * worker.endpoint.pool.kv_bytes_per_token
        in_flight = max(worker.load.bytes_in_flight, decode.load.bytes_in_flight)
        return transfer_bytes, link.transfer_s(transfer_bytes, in_flight)

    def _rank(self, worker: Leg, decode: Leg, link: PathFigures) -> Rank:
        _, transfer_s = self._transfer(worker, decode, link)
        return self._objective.rank(
            worker.queue_s + worker.prefill_s + transfer_s + decode.step_s,
            decode.step_s,
            worker.stall_s,
            worker.prefill_price + decode.output_price,
            worker.load.begun_ordinal + decode.load.begun_ordinal,
        )

    def _candidate(self, worker: Leg, decode: Leg, link: PathFigures) -> Candidate:
        transfer_bytes, transfer_s = self._transfer(worker, decode, link)
        ttft_s = worker.queue_s + worker.prefill_s + transfer_s + decode.step_s
        figures = Figures(
            queue_s=worker.queue_s,
            prefill_s=worker.prefill_s,
            transfer_s=transfer_s,
            step_s=decode.step_s,
            stall_s=worker.stall_s,
            slo_excess=self._objective.excess(ttft_s, decode.step_s),
            cost=worker.prefill_price + decode.output_price,
            uncached_tokens=worker.uncached_tokens,
            cached_tokens=worker.cached_tokens,
            transfer_bytes=transfer_bytes,
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
