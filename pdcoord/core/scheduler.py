"""The joint choice: the best pair of endpoints, or the best one alone, by predicted time."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pdcoord.core.costs import PathFigures
from pdcoord.core.disagg import SLO_EXCESS_EQUAL, weigh, why_together
from pdcoord.core.filters import eligible
from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Fleet, PoolName
from pdcoord.core.ledger import Ledger, Load
from pdcoord.core.model import Model, SplitMode
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, DropReason, Figures, Why
from pdcoord.core.ports import SpeedModel
from pdcoord.core.prefix import PrefixIndex
from pdcoord.core.request import Request

SHORTLIST_MAX = 4
"""Endpoints of one pool that pairs are formed from. Within a pool speed, verdict and price are equal,
so the order by own time is the order of every pair they are part of; four leave room for breakers."""
WIDE_LIST_MAX = 64
"""The same when every pair of the short lists is closed."""
OUTPUT_TOKENS_GUESS = 256
OUTPUT_TOKENS_COUNTED_MAX = 1_024
"""Output length is known only at the end; these bound what price and nothing else assumes of it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and what it was chosen from.

    Attributes:
        other_prefills: prefill endpoints for the same decode endpoint, best first, for the ladder.
        is_outage: the request would have been considered for splitting, but no pair was open.
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


@dataclass(frozen=True, slots=True)
class _Leg:
    """An endpoint with what this request would cost it."""

    endpoint: Endpoint
    load: Load
    cached_tokens: int
    uncached_tokens: int
    queue_s: float
    prefill_s: float
    stall_s: float

    @property
    def work_s(self) -> float:
        return self.queue_s + self.prefill_s + self.stall_s


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode endpoint: its leg if it served alone, and what it adds to a pair."""

    leg: _Leg
    step_s: float
    token_price: float

    @property
    def endpoint(self) -> Endpoint:
        return self.leg.endpoint


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
        """Least SLO violation, then least time, then least cost, over all open pairs and all alone."""
        found = eligible(self._fleet.of_model(model.name), request, self._ledger, excluded)
        cached = self._cached_tokens(request)
        decodes = [self._decode(state, request, cached, now_s) for state in found.decode]
        alone = self._best_alone(decodes, request, model, found.drops)
        together_why = why_together(request, model)
        if together_why is not None and alone is not None:
            return Choice(alone, together_why, None, (), found.drops, is_outage=False)
        if not request.is_generative or request.choice_count > 1:
            return NoChoice(found.drops)
        workers = [self._leg(state, request, cached, now_s) for state in found.prefill]
        pairs = _Pairs(request, model, self._paths, self._speed, found.drops, now_s)
        split, others = pairs.best(workers, decodes)
        if split is None:
            why = pairs.why_none(workers)
            if alone is None:
                return NoChoice(found.drops)
            is_outage = why is not Why.PREFIX_CACHED
            return Choice(alone, why, None, (), found.drops, is_outage=is_outage)
        if alone is None:
            return Choice(split, Why.SPLIT_ONLY_WAY, None, others, found.drops, is_outage=False)
        why = weigh(split, alone, model.disaggregation)
        if why in {Why.SPLIT_FASTER, Why.SPLIT_ALWAYS}:
            return Choice(split, why, alone, others, found.drops, is_outage=False)
        return Choice(alone, why, split, (), found.drops, is_outage=False)

    def _cached_tokens(self, request: Request) -> dict[int, int]:
        # The last token is always computed, to get the logits of the next.
        most = max(0, request.prompt_tokens - 1)
        matched = self._prefix.match(request.block_keys)
        return {o: min(blocks * request.block_tokens, most) for o, blocks in matched.items()}

    def _leg(self, state: EndpointState, request: Request, cached: Mapping[int, int], now_s: float) -> _Leg:
        endpoint = state.endpoint
        load = self._ledger.load(endpoint.id)
        cached_tokens = cached.get(state.ordinal, 0)
        uncached_tokens = request.prompt_tokens - cached_tokens
        prefill_s = self._speed.prefill_s(endpoint, uncached_tokens) if request.is_generative else 0.0
        queue_s = load.pending_prefill_s(now_s)
        others = load.others(state.sample)
        streams = load.streaming_count
        if others:
            # Nothing is known of others' prompts: on a prefill pod each is taken to be like this
            # one, elsewhere each is taken to be a running stream.
            if endpoint.pool.can_decode:
                streams += others
            else:
                queue_s += others * self._speed.prefill_s(endpoint, request.prompt_tokens)
        return _Leg(endpoint, load, cached_tokens, uncached_tokens, queue_s, prefill_s, prefill_s * streams)

    def _decode(
        self, state: EndpointState, request: Request, cached: Mapping[int, int], now_s: float
    ) -> _Decode:
        leg = self._leg(state, request, cached, now_s)
        batch = leg.load.decode_count + leg.load.others(state.sample) + 1
        step_s = self._speed.step_s(leg.endpoint, batch, leg.load.context_tokens + request.prompt_tokens)
        price = leg.endpoint.pool.cost_per_hour / 3600.0 * step_s / batch
        return _Decode(leg, step_s, price)

    def _best_alone(
        self, decodes: Iterable[_Decode], request: Request, model: Model, drops: Counter[DropReason]
    ) -> Candidate | None:
        best: Candidate | None = None
        for decode in decodes:
            leg = decode.leg
            if not leg.endpoint.pool.can_serve_alone:
                drops[DropReason.CANNOT_SERVE_ALONE] += 1
                continue
            ttft_s = leg.queue_s + leg.prefill_s + decode.step_s
            figures = Figures(
                queue_s=leg.queue_s,
                prefill_s=leg.prefill_s,
                transfer_s=0.0,
                step_s=decode.step_s,
                stall_s=leg.stall_s,
                slo_excess=_slo_excess(model, ttft_s, decode.step_s),
                cost=_cost(request, leg, decode),
                uncached_tokens=leg.uncached_tokens,
                cached_tokens=leg.cached_tokens,
            )
            candidate = Candidate(leg.endpoint, None, None, figures)
            if best is None or self._key(candidate, model) < self._key(best, model):
                best = candidate
        return best

    def _key(self, candidate: Candidate, model: Model) -> tuple[float, float, float, float, int]:
        ordinal = self._ledger.load(candidate.decode.id).begun_ordinal
        return _order(candidate.figures, model, ordinal)


class _Pairs:
    """The open pairs of one request."""

    def __init__(  # noqa: PLR0917 - built in one place, right above
        self,
        request: Request,
        model: Model,
        paths: PathTable,
        speed: SpeedModel,
        drops: Counter[DropReason],
        now_s: float,
    ) -> None:
        self._request = request
        self._model = model
        self._paths = paths
        self._speed = speed
        self._drops = drops
        self._now_s = now_s
        self._has_cached = False
        self._link_figures: dict[tuple[PoolName, PoolName], PathFigures | DropReason] = {}

    def best(
        self, workers: list[_Leg], decodes: list[_Decode]
    ) -> tuple[Candidate | None, tuple[Endpoint, ...]]:
        """The best pair, and the next best prefill endpoints for its decode endpoint."""
        for size in (SHORTLIST_MAX, WIDE_LIST_MAX):
            short_workers = _shortlist(workers, size)
            ranked = self._ranked(short_workers, _shortlist_decodes(decodes, size))
            if ranked:
                best = ranked[0]
                others = [c.prefill for c in ranked[1:] if c.decode is best.decode and c.prefill is not None]
                return best, tuple(others[: self._model.fallback.other_prefill_max])
        return None, ()

    def why_none(self, workers: list[_Leg]) -> Why:
        if self._has_cached:
            return Why.PREFIX_CACHED
        return Why.NO_OPEN_PATH if workers else Why.NO_PREFILL_ENDPOINT

    def _ranked(self, workers: list[_Leg], decodes: list[_Decode]) -> list[Candidate]:
        ranked: list[tuple[tuple[float, float, float, float, int], int, Candidate]] = []
        for decode in decodes:
            if self._is_cached_enough(decode.leg):
                self._has_cached = True
                continue
            for worker in workers:
                candidate = self._candidate(worker, decode)
                if isinstance(candidate, DropReason):
                    self._drops[candidate] += 1
                elif candidate is not None:
                    ordinal = worker.load.begun_ordinal + decode.leg.load.begun_ordinal
                    key = _order(candidate.figures, self._model, ordinal)
                    ranked.append((key, len(ranked), candidate))
        ranked.sort()
        return [candidate for _, _, candidate in ranked]

    def _is_cached_enough(self, leg: _Leg) -> bool:
        rules = self._model.disaggregation
        return rules.mode is SplitMode.AUTO and leg.uncached_tokens < rules.uncached_tokens_min

    def _candidate(self, worker: _Leg, decode: _Decode) -> Candidate | DropReason | None:
        if worker.endpoint.id == decode.endpoint.id:
            return None
        link = self._link(worker.endpoint, decode.endpoint)
        if isinstance(link, DropReason):
            return link
        if not self._paths.lets_pass(worker.endpoint.id, decode.endpoint.id, self._now_s):
            return DropReason.BREAKER_OPEN
        leg = decode.leg
        transfer_bytes = leg.uncached_tokens * worker.endpoint.pool.kv_bytes_per_token
        in_flight = max(worker.load.bytes_in_flight, leg.load.bytes_in_flight)
        transfer_s = link.transfer_s(transfer_bytes, in_flight)
        ttft_s = worker.queue_s + worker.prefill_s + transfer_s + decode.step_s
        figures = Figures(
            queue_s=worker.queue_s,
            prefill_s=worker.prefill_s,
            transfer_s=transfer_s,
            step_s=decode.step_s,
            stall_s=worker.stall_s,
            slo_excess=_slo_excess(self._model, ttft_s, decode.step_s),
            cost=_cost(self._request, worker, decode),
            uncached_tokens=worker.uncached_tokens,
            cached_tokens=worker.cached_tokens,
            transfer_bytes=transfer_bytes,
        )
        verdict = self._paths.verdict(worker.endpoint.pool, decode.endpoint.pool)
        return Candidate(decode.endpoint, worker.endpoint, verdict, figures)

    def _link(self, prefill: Endpoint, decode: Endpoint) -> PathFigures | DropReason:
        pair = (prefill.pool.name, decode.pool.name)
        found = self._link_figures.get(pair)
        if found is None:
            found = self._link_figures[pair] = self._judge(prefill, decode)
        return found

    def _judge(self, prefill: Endpoint, decode: Endpoint) -> PathFigures | DropReason:
        if not self._paths.verdict(prefill.pool, decode.pool).is_possible:
            return DropReason.VERDICT_IMPOSSIBLE
        figures = self._speed.path(prefill, decode)
        if figures.bandwidth_bytes_per_s <= 0.0:
            return DropReason.BANDWIDTH_UNKNOWN
        if figures.bandwidth_bytes_per_s < self._model.disaggregation.bandwidth_bytes_per_s_min:
            return DropReason.BANDWIDTH_TOO_LOW
        return figures


def _order(figures: Figures, model: Model, ordinal: int) -> tuple[float, float, float, float, int]:
    """Least violation, then time in steps of the estimate's noise, then price, then time, then turn."""
    noise_s = model.disaggregation.saving_s_min or 1e-6
    return (
        figures.slo_excess // SLO_EXCESS_EQUAL,
        figures.time_s // noise_s,
        figures.cost,
        figures.time_s,
        ordinal,
    )


def _slo_excess(model: Model, ttft_s: float, step_s: float) -> float:
    excess = 0.0
    if model.slo.ttft_s is not None:
        excess += max(0.0, ttft_s / model.slo.ttft_s - 1.0)
    if model.slo.tpot_s is not None:
        excess += max(0.0, step_s / model.slo.tpot_s - 1.0)
    return excess


def _cost(request: Request, worker: _Leg, decode: _Decode) -> float:
    """Price of the request: the worker's time, and the decode endpoint's shared among its batch."""
    output_tokens = request.output_tokens_max
    if output_tokens is None:
        output_tokens = OUTPUT_TOKENS_GUESS
    worker_price = worker.prefill_s * worker.endpoint.pool.cost_per_hour / 3600.0
    return worker_price + min(output_tokens, OUTPUT_TOKENS_COUNTED_MAX) * decode.token_price


def _shortlist(legs: Iterable[_Leg], size: int) -> list[_Leg]:
    by_pool: dict[PoolName, list[_Leg]] = {}
    for leg in legs:
        by_pool.setdefault(leg.endpoint.pool.name, []).append(leg)
    return [
        leg
        for pool_legs in by_pool.values()
        for leg in heapq.nsmallest(size, pool_legs, key=lambda leg: (leg.work_s, leg.load.begun_ordinal))
    ]


def _shortlist_decodes(decodes: Iterable[_Decode], size: int) -> list[_Decode]:
    by_pool: dict[PoolName, list[_Decode]] = {}
    for decode in decodes:
        by_pool.setdefault(decode.endpoint.pool.name, []).append(decode)

    def own_time(decode: _Decode) -> tuple[float, int]:
        # Bytes to move in units of time need the path; within a pool their order is that of tokens.
        pool = decode.endpoint.pool
        link_bytes = decode.leg.uncached_tokens * pool.kv_bytes_per_token + decode.leg.load.bytes_in_flight
        link_s = link_bytes / pool.link_bytes_per_s if pool.link_bytes_per_s > 0.0 else 0.0
        return decode.step_s + link_s, decode.leg.load.begun_ordinal

    return [d for group in by_pool.values() for d in heapq.nsmallest(size, group, key=own_time)]
