"""One decision taken apart: each part timed by itself on the inputs that the whole is about to get."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec

from benchmarks.decide.fleet import MODEL, BenchFleet
from benchmarks.decide.reference import RoundRobin, best_of_all_pairs
from pdcoord.core.blocks import block_keys
from pdcoord.core.filters import eligible
from pdcoord.core.legs import Conditions, LegMaker
from pdcoord.core.pairs import Pairs, worker_room
from pdcoord.core.plan import DropReason
from pdcoord.core.pruning import pruned
from pdcoord.core.request import BlockKey, Request, RequestId
from pdcoord.core.scheduler import best_alone
from pdcoord.protocol.openai import APIS, parse_call

PROMPT_BYTES = 30_000
SHARED_BYTES = 6_000
"""The system prompt that all requests begin with."""
_BRUTE_FORCE_ENDPOINTS_MAX = 100

T = TypeVar("T")
Times = dict[str, list[float]]
"""Microseconds on the CPU, by part, one for each request."""

READ = ("parse JSON", "read the call", "hash blocks")
DECIDE = ("match prefix", "filters", "prune", "legs", "alone", "pairs", "ladder", "record prefix")
WHOLE = "handle in all"
REST = "the rest of handle"
ROUND_ROBIN = "round robin"
BRUTE_FORCE = "all pairs, one by one"


class Timer:
    """Times on this thread's own CPU clock: what others do on the machine is not in them."""

    def __init__(self) -> None:
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self._overhead_ns = 0
        self._overhead_ns = min(self._empty_ns() for _ in range(1_000))

    def __call__(self, part: str, work: Callable[[], T]) -> T:
        begun_ns = time.thread_time_ns()
        result = work()
        self.times[part].append(max(0, time.thread_time_ns() - begun_ns - self._overhead_ns) / 1e3)
        return result

    def _empty_ns(self) -> int:
        self("nothing", lambda: None)
        return round(self.times.pop("nothing")[0] * 1e3)


def body(index: int) -> bytes:
    """A chat call with a prompt of PROMPT_BYTES, the first SHARED_BYTES of which all calls share."""
    system = ("You answer briefly and name your sources. " * 200)[:SHARED_BYTES]
    own = (f"Document {index}: the quick brown fox jumps over the lazy dog. " * 600)[
        : PROMPT_BYTES - SHARED_BYTES
    ]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": own}]
    return msgspec.json.encode({"model": MODEL, "messages": messages, "max_tokens": 256, "stream": True})


def run(fleet: BenchFleet, request_count: int, tag: str) -> Times:
    """Decide `request_count` requests; the fleet's load stays what it was."""
    timer, turns = Timer(), RoundRobin(fleet)
    for index in range(request_count):
        keys, tokens = _read(timer, fleet, body(index))
        request = Request(
            RequestId(f"{tag}-{index}"),
            MODEL,
            prompt_tokens=tokens,
            block_keys=keys,
            block_tokens=fleet.model.prefix_block_tokens,
            output_tokens_max=256,
        )
        _take_apart(timer, fleet, request)
        timer(ROUND_ROBIN, turns.pick)
        if len(fleet.endpoints) <= _BRUTE_FORCE_ENDPOINTS_MAX:
            timer(BRUTE_FORCE, partial(best_of_all_pairs, fleet, request))
        plan = timer(WHOLE, partial(fleet.arrive, request)).plan
        timer("record prefix", partial(fleet.record, plan, request))
        fleet.move_on()
    times = dict(timer.times)
    parts = zip(*(times[part] for part in DECIDE), strict=True)
    times[REST] = [whole - sum(own) for whole, own in zip(times[WHOLE], parts, strict=True)]
    return times


def _read(timer: Timer, fleet: BenchFleet, raw: bytes) -> tuple[tuple[BlockKey, ...], int]:
    timer("parse JSON", lambda: msgspec.json.decode(raw))
    call = timer("read the call", lambda: parse_call(APIS["/v1/chat/completions"], raw))
    size = fleet.model.prefix_block_bytes
    keys = timer("hash blocks", lambda: block_keys(call.prompt, model=MODEL, cache_salt="", block_bytes=size))
    return keys, round(len(call.prompt) / fleet.model.bytes_per_token)


def _take_apart(timer: Timer, fleet: BenchFleet, request: Request) -> None:
    """The parts of Scheduler.choose, in its order."""
    coordinator, model, speed = fleet.coordinator, fleet.model, fleet.speed
    troubled = coordinator.paths.troubled
    matched = timer("match prefix", lambda: coordinator.prefixes.approximate.match(request.block_keys))
    found = timer(
        "filters",
        lambda: eligible(coordinator.fleet.groups(MODEL), request, coordinator.ledger, frozenset()),
    )
    cached = {ordinal: blocks * request.block_tokens for ordinal, blocks in matched.items()}
    conditions = Conditions(fleet.now_s, model.slo, coordinator.ledger.typical_prefill_s)
    room = worker_room(model)
    maker = LegMaker(
        request,
        cached,
        speed,
        room=room,
        troubled=troubled,
        conditions=conditions,
        in_use=coordinator.prefixes.in_use,
    )
    apart = {*troubled, *speed.unlike}
    kept = timer("prune", lambda: [pruned(fit, cached, apart) for fit in found.pools])
    legs = timer("legs", lambda: [maker.legs(fit) for fit in kept])
    drops: Counter[DropReason] = Counter()
    decodes = [pool_legs for pool_legs in legs if pool_legs.pool.can_decode]
    workers = [pool_legs for pool_legs in legs if pool_legs.pool.can_prefill]
    timer("alone", lambda: best_alone(decodes, model, speed, drops))
    pairs = Pairs(model, coordinator.paths, speed, drops, fleet.now_s)
    pair = timer("pairs", lambda: pairs.best(workers, decodes))
    timer("ladder", lambda: pair.other_prefills if pair is not None else ())
