"""What an emulated engine has counted since its start, for its metrics."""

from dataclasses import dataclass, field

from pdcoord.sim.messages import FailReason, FinishReason, RejectReason


@dataclass(slots=True)
class EngineCounters:
    """Totals. Token counts are of prompts unless the name says otherwise.

    Attributes:
        cache_queried_tokens, cache_hit_tokens: asked of and found in the prefix cache.
        external_queried_tokens, external_hit_tokens: asked of and fetched from producers.
        late_notifications: releases and ends of pulls heard after their lease had expired.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    cache_queried_tokens: int = 0
    cache_hit_tokens: int = 0
    external_queried_tokens: int = 0
    external_hit_tokens: int = 0
    preemptions: int = 0
    arrived_transfers: int = 0
    failed_transfers: int = 0
    failed_notifications: int = 0
    expired_leases: int = 0
    late_notifications: int = 0
    steps: int = 0
    busy_s: float = 0.0
    finished: dict[FinishReason, int] = field(default_factory=dict)
    rejected: dict[RejectReason, int] = field(default_factory=dict)
    failed: dict[FailReason, int] = field(default_factory=dict)
    aborted: int = 0
