"""What a request would cost each endpoint that may take a leg of it."""

import heapq
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass

from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import Endpoint, EndpointId, Pool
from pdcoord.core.ledger import Load
from pdcoord.core.ports import SpeedModel
from pdcoord.core.request import Request

OUTPUT_TOKENS_GUESS = 256
OUTPUT_TOKENS_COUNTED_MAX = 1_024
"""Output length is known only at the end; these bound what price and nothing else assumes of it."""


@dataclass(slots=True)
class Leg:
    """An endpoint with what this request would cost it.

    Attributes:
        queue_s: wait before its prefill could start here.
        stall_s: delay that its prefill here would cause running streams, summed over them.
        step_s: one decode step here with this request in the batch; 0.0 on a prefill endpoint.
        prefill_price: of its prefill here.
        output_price: of its output here, as one of as many requests as the endpoint may have; 0.0 on a
            prefill endpoint. Not as one of those it has: a price that falls as an endpoint fills would
            fill one after the other, though an empty one costs as much.
    """

    endpoint: Endpoint
    load: Load
    cached_tokens: int
    uncached_tokens: int
    queue_s: float
    prefill_s: float
    stall_s: float
    step_s: float
    prefill_price: float
    output_price: float


@dataclass(frozen=True, slots=True)
class PoolLegs:
    """The legs of one pool.

    Attributes:
        legs: at least every one that can be the best of some choice; see `LegMaker.legs`.
        endpoint_count: endpoints of the pool that may take the leg, with those left out.
    """

    pool: Pool
    legs: list[Leg]
    endpoint_count: int


class LegMaker:
    """Makes the legs of one request.

    Args:
        room: how many that are no worse put an endpoint out of the choice.
        troubled: endpoints with a tripped path, which put nobody out.
    """

    def __init__(
        self,
        request: Request,
        cached_tokens: Mapping[int, int],
        speed: SpeedModel,
        *,
        room: int,
        troubled: Container[EndpointId],
        now_s: float,
    ) -> None:
        self._request = request
        self._cached_tokens = cached_tokens
        self._speed = speed
        self._room = room
        self._troubled = troubled
        self._now_s = now_s
        output_tokens = request.output_tokens_max
        if output_tokens is None:
            output_tokens = OUTPUT_TOKENS_GUESS
        self._output_tokens = min(output_tokens, OUTPUT_TOKENS_COUNTED_MAX)

    def legs(self, fit: PoolFit) -> PoolLegs:
        """The legs of a pool.

        Idle endpoints with the same cached prefix are twins: all their figures are equal, so that of
        more than `room` only those are needed whose turn is longest past. Where there are so many, no
        endpoint that is busy and has no more cached is needed either: it is worse in some figure.
        """
        maker = _PoolLegMaker(self._request, fit.pool, self._speed, self._output_tokens, self._now_s)
        busy, twins = self._by_load(fit)
        legs: list[Leg] = []
        beaten_up_to = -1
        for cached, group in twins.items():
            if len(group) >= self._room:
                beaten_up_to = max(beaten_up_to, cached)
            for _, _, endpoint, load in heapq.nsmallest(self._room, group):
                legs.append(maker.leg(endpoint, load, 0, cached))
        for endpoint, load, others, cached in busy:
            if cached > beaten_up_to:
                legs.append(maker.leg(endpoint, load, others, cached))
        return PoolLegs(fit.pool, legs, len(fit.endpoints))

    def _by_load(
        self, fit: PoolFit
    ) -> tuple[
        list[tuple[Endpoint, Load, int, int]],
        Mapping[int, list[tuple[int, int, Endpoint, Load]]],
    ]:
        """The busy with others' requests and cached tokens, and the idle by cached tokens."""
        cached_tokens, troubled = self._cached_tokens, self._troubled
        busy: list[tuple[Endpoint, Load, int, int]] = []
        idle: defaultdict[int, list[tuple[int, int, Endpoint, Load]]] = defaultdict(list)
        for state, load, others in fit.endpoints:
            cached = cached_tokens.get(state.ordinal, 0)
            if others or load.request_count or state.endpoint.id in troubled:
                busy.append((state.endpoint, load, others, cached))
            else:
                idle[cached].append((load.begun_ordinal, state.ordinal, state.endpoint, load))
        return busy, idle


class _PoolLegMaker:
    """Makes the legs of one request in one pool."""

    def __init__(
        self, request: Request, pool: Pool, speed: SpeedModel, output_tokens: int, now_s: float
    ) -> None:
        self._prompt_tokens = request.prompt_tokens
        self._is_generative = request.is_generative
        self._can_decode = pool.can_decode
        self._price_per_s = pool.cost_per_hour / 3600.0
        self._speed = speed
        self._output_price_per_s = output_tokens * self._price_per_s / pool.limits.in_flight_max
        self._now_s = now_s
        self._prefill_s: dict[int, float] = {}

    def leg(self, endpoint: Endpoint, load: Load, others: int, cached_tokens: int) -> Leg:
        uncached_tokens = self._prompt_tokens - cached_tokens
        prefill_s = self._prefill_s.get(uncached_tokens)
        if prefill_s is None:
            prefill_s = self._prefill_s[uncached_tokens] = self._prefill_time(endpoint, uncached_tokens)
        queue_s = load.pending_prefill_s(self._now_s) if load.prefills else 0.0
        streams = load.streaming_count
        step_s = output_price = 0.0
        if self._can_decode:
            # Nothing is known of others' prompts: here each is taken to be a running stream, on a
            # prefill pod each is taken to be like this one.
            streams += others
            batch = load.decode_count + others + 1
            step_s = self._speed.step_s(endpoint, batch, load.context_tokens + self._prompt_tokens)
            output_price = self._output_price_per_s * step_s
        elif others:
            queue_s += others * self._prefill_time(endpoint, self._prompt_tokens)
        return Leg(
            endpoint,
            load,
            cached_tokens,
            uncached_tokens,
            queue_s,
            prefill_s,
            prefill_s * streams,
            step_s,
            prefill_s * self._price_per_s,
            output_price,
        )

    def _prefill_time(self, endpoint: Endpoint, tokens: int) -> float:
        return self._speed.prefill_s(endpoint, tokens) if self._is_generative else 0.0
