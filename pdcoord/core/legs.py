"""What a request would cost each endpoint that may take a leg of it."""

import heapq
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass

from pdcoord.core.filters import PoolFit
from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Pool, Sample
from pdcoord.core.harm import Surroundings, crowding_s, harm, others_s, slowing_s
from pdcoord.core.inuse import PromptsInUse
from pdcoord.core.ledger import Load
from pdcoord.core.model import Slo
from pdcoord.core.ports import SpeedModel
from pdcoord.core.request import Request
from pdcoord.core.room import room_wait_s

_NO_SLO = Slo()
OUTPUT_TOKENS_GUESS = 256
OUTPUT_TOKENS_COUNTED_MAX = 1_024
"""Output length is known only at the end; these bound what price and nothing else assumes of it."""


@dataclass(slots=True)
class Leg:
    """An endpoint with what this request would cost it.

    Attributes:
        queue_s: wait before its prefill could start here.
        room_s: wait for room in the KV pool here, beside that wait; 0.0 on a prefill endpoint.
        wait_s: the longer of the two: before that nothing of it begins here.
        pace_s: time per output token, with the prefills that are lately sent here between; likewise.
        others_s: what all of it here costs others, as it counts beside the request's own time.
        prefill_others_s: the part of that for its prefill and its prompt's KV here.
        answer_others_s: the part for its prompt's KV and its answer here; 0.0 on a prefill endpoint.
        harm: requests of others that its prefill here is expected to push past their objectives.
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
    room_s: float = 0.0
    wait_s: float = 0.0
    pace_s: float = 0.0
    harm: float = 0.0
    others_s: float = 0.0
    prefill_others_s: float = 0.0
    answer_others_s: float = 0.0


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class PoolLegs:
    """The legs of one pool.

    Attributes:
        legs: at least every one that can be the best of some choice; see `LegMaker.legs`.
        endpoint_count: endpoints of the pool that may take the leg, with those left out.
    """

    pool: Pool
    legs: list[Leg]
    endpoint_count: int


# Not frozen, though nobody changes it: that would double what making it costs each request.
@dataclass(slots=True)
class Conditions:
    """What is the same for all endpoints while one request is decided.

    Attributes:
        slo: the request's objectives.
        typical_prefill_s: predicted prefill of an average request lately.
    """

    now_s: float
    slo: Slo = _NO_SLO
    typical_prefill_s: float = 0.0


class LegMaker:
    """Makes the legs of one request.

    Args:
        room: how many that are no worse put an endpoint out of the choice.
        troubled: endpoints with a tripped path, which put nobody out.
        in_use: what of cached prompts is held by requests under way.
        speed: its `unlike` endpoints put nobody out and are put out by nobody.
    """

    def __init__(
        self,
        request: Request,
        cached_tokens: Mapping[int, int],
        speed: SpeedModel,
        *,
        room: int,
        troubled: Container[EndpointId],
        conditions: Conditions,
        in_use: PromptsInUse,
    ) -> None:
        self._request = request
        self._in_use = in_use
        self._cached_tokens = cached_tokens
        self._speed = speed
        self._room = room
        self._troubled = troubled
        self._conditions = conditions
        self._unlike = speed.unlike
        self._output_tokens = _output_tokens(request, speed)

    def legs(self, fit: PoolFit) -> PoolLegs:
        """The legs of a pool.

        Idle endpoints with the same cached prefix are twins: all their figures are equal, so that of
        more than `room` only those are needed whose turn is longest past. Where there are so many, no
        endpoint that is busy and has no more cached is needed either: it is worse in some figure.
        """
        maker = _PoolLegMaker(self._request, fit.pool, self._speed, self._output_tokens, self._conditions)
        busy, twins, odd = self._by_load(fit)
        legs: list[Leg] = []
        for state, load, others, cached in odd:
            idle = self._idle_tokens(state, cached)
            legs.append(maker.leg(state.endpoint, load, others, cached, state.sample, idle_tokens=idle))
        beaten_up_to = -1
        for cached, group in twins.items():
            if len(group) >= self._room:
                beaten_up_to = max(beaten_up_to, cached)
            for _, _, endpoint, load in heapq.nsmallest(self._room, group):
                legs.append(maker.leg(endpoint, load, 0, cached))
        for state, load, others, cached in busy:
            if cached > beaten_up_to:
                idle = self._idle_tokens(state, cached)
                legs.append(maker.leg(state.endpoint, load, others, cached, state.sample, idle_tokens=idle))
        return PoolLegs(fit.pool, legs, fit.endpoint_count)

    def _idle_tokens(self, state: EndpointState, cached: int) -> int:
        """Of what is cached of the prompt what nobody holds, which takes room in the pool once it is held."""
        sample = state.sample
        if not cached or sample is None or not (sample.kv_tokens and sample.kv_usage):
            return 0
        if not state.endpoint.pool.can_decode:
            return 0  # Nobody asks for room there.
        return cached - self._in_use.shared_tokens(state.ordinal, self._request, cached)

    def _by_load(
        self, fit: PoolFit
    ) -> tuple[
        list[tuple[EndpointState, Load, int, int]],
        Mapping[int, list[tuple[int, int, Endpoint, Load]]],
        list[tuple[EndpointState, Load, int, int]],
    ]:
        """The busy with others' requests and cached tokens, the idle by cached tokens, the unlike."""
        cached_tokens, troubled, unlike = self._cached_tokens, self._troubled, self._unlike
        busy: list[tuple[EndpointState, Load, int, int]] = []
        odd: list[tuple[EndpointState, Load, int, int]] = []
        idle: defaultdict[int, list[tuple[int, int, Endpoint, Load]]] = defaultdict(list)
        for state, load, others in fit.endpoints:
            cached = cached_tokens.get(state.ordinal, 0)
            holds = load.recent_prefill_s or (state.sample is not None and state.sample.kv_usage > 0.0)
            if state.endpoint.id in unlike:
                odd.append((state, load, others, cached))
            elif others or load.request_count or holds or state.endpoint.id in troubled:
                busy.append((state, load, others, cached))
            else:
                idle[cached].append((load.begun_ordinal, state.ordinal, state.endpoint, load))
        return busy, idle, odd


class _PoolLegMaker:
    """Makes the legs of one request in one pool."""

    def __init__(
        self,
        request: Request,
        pool: Pool,
        speed: SpeedModel,
        output_tokens: float,
        conditions: Conditions,
    ) -> None:
        self._slo = None if conditions.slo == _NO_SLO else conditions.slo
        self._typical_prefill_s = conditions.typical_prefill_s
        self._prompt_tokens = request.prompt_tokens
        self._is_generative = request.is_generative
        self._can_decode = pool.can_decode
        self._price_per_s = pool.cost_per_hour / 3600.0
        self._speed = speed
        self._unlike = speed.unlike
        self._output_tokens = output_tokens
        self._output_price_per_s = output_tokens * self._price_per_s / pool.limits.in_flight_max
        self._added_step_s: float | None = None
        self._now_s = conditions.now_s
        self._prefill_s: dict[int, float] = {}

    def leg(
        self,
        endpoint: Endpoint,
        load: Load,
        others: int,
        cached_tokens: int,
        sample: Sample | None = None,
        *,
        idle_tokens: int = 0,
    ) -> Leg:
        uncached_tokens = self._prompt_tokens - cached_tokens
        prefill_s = self._prefill_s.get(uncached_tokens)
        if prefill_s is None or (self._unlike and endpoint.id in self._unlike):
            prefill_s = self._own_prefill_s(endpoint, uncached_tokens)
        queue_s = load.pending_prefill_s(self._now_s) if load.prefills else 0.0
        streams = load.streaming_count
        step_s = pace_s = output_price = room_s = kv_s = slower_s = 0.0
        if self._can_decode:
            # Nothing is known of others' prompts: here each is taken to be a running stream, on a
            # prefill pod each is taken to be like this one.
            streams += others
            batch = load.decode_count + others + 1
            step_s = self._speed.step_s(endpoint, batch, load.context_tokens + self._prompt_tokens)
            output_price = self._output_price_per_s * step_s
            pace_s = step_s
            if load.recent_prefill_s:
                pace_s /= 1.0 - load.prefill_share(self._now_s)
            if sample is not None and sample.kv_tokens:
                room_s, kv_s = self._room_s(sample, load, uncached_tokens + idle_tokens, step_s)
            if batch > 1:
                slower_s = slowing_s(batch - 1, self._output_tokens * self._added_s(endpoint))
        elif others:
            queue_s += others * self._own_prefill_s(endpoint, self._prompt_tokens)
        harmed = lost_s = 0.0
        if prefill_s and (queue_s or streams):
            at = Surroundings(queue_s, streams, step_s)
            lost_s = others_s(prefill_s, at, self._typical_prefill_s)
            if self._slo is not None:
                harmed = harm(self._slo, prefill_s, at, self._typical_prefill_s, self._output_tokens)
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
            room_s,
            room_s if room_s > queue_s else queue_s,  # noqa: FURB136  # the call costs more than the rest
            pace_s,
            harmed,
            lost_s + kv_s + slower_s,
            lost_s + kv_s,
            kv_s + slower_s,
        )

    def _room_s(self, sample: Sample, load: Load, taken_tokens: int, step_s: float) -> tuple[float, float]:
        """How long it waits for room in a KV pool, and the time that it costs others to have it there."""
        output_tokens = self._output_tokens
        room_s = room_wait_s(sample, load, taken_tokens, output_tokens, step_s)
        kv_share = taken_tokens / sample.kv_tokens
        return room_s, crowding_s(kv_share, sample.kv_usage, output_tokens * step_s)

    def _added_s(self, endpoint: Endpoint) -> float:
        """By how much this request makes each step longer: a step is linear in what is in its batch."""
        added_s = self._added_step_s
        if added_s is None or (self._unlike and endpoint.id in self._unlike):
            speed = self._speed
            added_s = speed.step_s(endpoint, 1, self._prompt_tokens) - speed.step_s(endpoint, 0, 0)
            if endpoint.id not in self._unlike:
                self._added_step_s = added_s
        return added_s

    def _own_prefill_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:
        if endpoint.id in self._unlike:
            return self._prefill_time(endpoint, uncached_tokens)
        prefill_s = self._prefill_s.get(uncached_tokens)
        if prefill_s is None:
            prefill_s = self._prefill_s[uncached_tokens] = self._prefill_time(endpoint, uncached_tokens)
        return prefill_s

    def _prefill_time(self, endpoint: Endpoint, tokens: int) -> float:
        return self._speed.prefill_s(endpoint, tokens) if self._is_generative else 0.0


def _output_tokens(request: Request, speed: SpeedModel) -> float:
    """How many tokens the answer is counted with: as learned, no more than asked for."""
    asked, learned = request.output_tokens_max, speed.output_tokens(request.model, request.tenant)
    if learned is None:
        return min(OUTPUT_TOKENS_GUESS if asked is None else asked, OUTPUT_TOKENS_COUNTED_MAX)
    return min(learned, OUTPUT_TOKENS_COUNTED_MAX if asked is None else asked, OUTPUT_TOKENS_COUNTED_MAX)
