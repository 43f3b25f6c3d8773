"""How long a request waits for room in an engine's KV pool, which only requests that end can make."""

from pdcoord.core.fleet import Sample
from pdcoord.core.ledger import Load

WAIT_S_MAX = 600.0
"""Longer predictions say no more than that the endpoint is full."""


def room_wait_s(
    sample: Sample | None, load: Load, needed_tokens: int, output_tokens: float, step_s: float
) -> float:
    """Predicted wait until the pool has room for one more request; 0.0 where it has, or nobody knows.

    Whoever runs ends after `output_tokens` steps and frees what it holds, so that in steady state the
    pool's content turns over once in that time (Little's law). Those that were sent and have not begun
    hold nothing yet and stand before this one.

    Args:
        needed_tokens: of the prompt, without what requests under way hold of it there.
        output_tokens: expected of each running request.
        step_s: of the batch as it runs.
    """
    if sample is None or not sample.kv_tokens:
        return 0.0
    held_tokens = sample.kv_usage * sample.kv_tokens
    missing_tokens = needed_tokens + load.pending_tokens - (sample.kv_tokens - held_tokens)
    if missing_tokens <= 0.0 or held_tokens <= 0.0:
        return 0.0
    return min(missing_tokens * (output_tokens * step_s) / held_tokens, WAIT_S_MAX)
