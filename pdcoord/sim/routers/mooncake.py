"""Mooncake's KVCache-centric scheduling: the prefill instance with the least predicted TTFT, always split.

Source: Mooncake (FAST'25; arXiv 2407.00079), Algorithm 1. TTFT = queue + prefill of what is not cached, from
an offline fit of prefill time, here the pool's own figures; the cache is known exactly, here by KV events.
The decode instance is the one with the least predicted time between tokens.

Left out: fetching a longer prefix from another instance (the kvcache_balancing_threshold branch) and the
replication of hot blocks that follows from it, since a route here names no third place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from pdcoord.sim.routers.base import Route, Shed, Surroundings
from pdcoord.sim.routers.keyindexes import EventIndex
from pdcoord.sim.routers.rival import ALONE, SPLIT, Entry, Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call, CallId

REJECTED: Final = "slo"


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """Algorithm 1.

    Attributes:
        ttft_s_max: TTFT_SLO; a call predicted to miss it is refused. None refuses nothing.
        tbt_s_max: TBT_SLO, likewise.
        retries_max: the paper has none.
    """

    ttft_s_max: float | None = None
    tbt_s_max: float | None = None
    retries_max: int = 0


@dataclass(slots=True)
class Queue:
    """Predicted seconds of prefills sent to one place and not known to be done, oldest first."""

    pending_s: dict[CallId, float] = field(default_factory=dict)
    since_s: float = 0.0

    def wait_s(self, now_s: float) -> float:
        """What is left of them; the oldest is taken to run since it was the oldest."""
        if not self.pending_s:
            return 0.0
        oldest_s = next(iter(self.pending_s.values()))
        return sum(self.pending_s.values()) - min(max(now_s - self.since_s, 0.0), oldest_s)


class Mooncake(Rival):
    """The Conductor."""

    def __init__(self, surroundings: Surroundings, name: str, settings: MooncakeSettings) -> None:
        super().__init__(surroundings, name, settings.retries_max)
        self._settings = settings
        keys_max = [2 * place.kv_tokens // surroundings.key_tokens + 1 for place in self.places]
        self._events = EventIndex(keys_max, None)
        self._queues = [Queue() for _ in self.places]
        self._cached_keys: dict[int, int] = {}

    def choose(self, call: Call, rotation: Rotation, now_s: float) -> Route | Shed:
        self._cached_keys = self._events.match(call.keys, now_s)
        workers = rotation.prefills or rotation.alone
        ttfts = [self.ttft_s(call, index, now_s) for index in workers]
        ttft_s = min(ttfts)
        worker = self.drawn([index for index, at in zip(workers, ttfts, strict=True) if at == ttft_s])
        decodes = rotation.decodes_of[worker] if rotation.prefills else (worker,)
        tbts = [self.tbt_s(call, index) for index in decodes]
        tbt_s = min(tbts)
        if _is_over(ttft_s, self._settings.ttft_s_max) or _is_over(tbt_s, self._settings.tbt_s_max):
            return Shed(REJECTED)
        decode = self.drawn([index for index, at in zip(decodes, tbts, strict=True) if at == tbt_s])
        return Route(decode, worker, why=SPLIT) if rotation.prefills else Route(decode, why=ALONE)

    def ttft_s(self, call: Call, index: int, now_s: float) -> float:
        """T_queue + T_prefill of a prefill instance."""
        speed = self.places[index].endpoint.pool.speed
        return self._queues[index].wait_s(now_s) + speed.prefill_s(self.uncached_tokens(call, index))

    def tbt_s(self, call: Call, index: int) -> float:
        """One step of a decode instance with this call in its batch."""
        load = self.loads[index]
        speed = self.places[index].endpoint.pool.speed
        return speed.step_s(load.decoding + 1, load.context_tokens + call.prompt_tokens)

    def uncached_tokens(self, call: Call, worker: int) -> int:
        cached = self._cached_keys.get(worker, 0) * self.surroundings.key_tokens
        return max(0, call.prompt_tokens - cached)

    def on_opened(self, entry: Entry, now_s: float) -> None:
        queue = self._queues[entry.worker]
        if not queue.pending_s:
            queue.since_s = now_s
        speed = self.places[entry.worker].endpoint.pool.speed
        queue.pending_s[entry.call.id] = speed.prefill_s(entry.uncached_tokens)

    def on_began(self, entry: Entry, now_s: float) -> None:
        queue = self._queues[entry.worker]
        if next(iter(queue.pending_s)) == entry.call.id:
            queue.since_s = now_s
        del queue.pending_s[entry.call.id]

    def on_gone(self, index: int, now_s: float) -> None:  # noqa: ARG002  # of the base
        self._events.forget(index)

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:  # noqa: ARG002  # of the Protocol
        self._events.apply(index, stored, removed)


def _is_over(value_s: float, limit_s: float | None) -> bool:
    return limit_s is not None and value_s > limit_s
