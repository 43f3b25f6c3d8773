"""What an emulated engine shows of its inside, for tests and for people who debug a fleet."""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from pdcoord.sim.emulator_host import EngineHost
from pdcoord.sim.live import State

TRACES_MAX = 256


@dataclass(frozen=True, slots=True)
class TracedCall:
    """A call that named a trace.

    Attributes:
        span_id: of whoever sent it.
        leg: prefill, decode (its KV comes from another engine) or whole.
    """

    request_id: str
    trace_id: str
    span_id: str
    leg: str


def state_of(host: EngineHost, traced: Iterable[TracedCall] = ()) -> bytes:
    """Blocks, requests, leases, pulls, real KV and the last traced calls as JSON. No prompt, no ticket."""
    model, now_s = host.model, host.now_s
    pool, settings = model.pool, model.settings
    body = {
        "name": settings.name,
        "engine_id": model.engine_id,
        "engine": settings.engine,
        "role": settings.role,
        "connector": settings.connector,
        "side_channel": host.side_address,
        "kv_events": None if host.publisher is None else host.publisher.address,
        "blocks": {
            "total": pool.block_count,
            "available": pool.available_count,
            "cached": pool.cached_count,
            "pinned": pool.pinned_count,
            "block_tokens": pool.block_tokens,
        },
        "requests": {state.value: model.count_in(state) for state in State},
        "leases": [
            {
                "request_id": lease.request_id,
                "blocks": len(lease.blocks),
                "ends_in_s": round(lease.deadline_s - now_s, 3),
                "pulls": len(lease.pull_ids),
            }
            for lease in model.producer.leases()
        ],
        "rooms": model.producer.room_count,
        "fetches": [
            {"request_id": fetch.live.id, "stage": fetch.stage, "address": fetch.address}
            for fetch in model.consumer.fetches()
        ],
        "kv": host.kv_state(),
        "counters": {
            "steps": model.counters.steps,
            "busy_s": round(model.counters.busy_s, 6),
            "computed_tokens": model.counters.computed_tokens,
            "cache_hit_tokens": model.counters.cache_hit_tokens,
            "external_tokens": model.counters.external_hit_tokens,
            "generated_tokens": model.counters.generated_tokens,
            "aborted": model.counters.aborted,
            "failed": model.counters.failed,
            "rejected": model.counters.rejected,
            "expired_leases": model.counters.expired_leases,
        },
        "traced": list(traced),
    }
    return msgspec.json.encode(body)
