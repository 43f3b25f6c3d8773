"""What the coordinator answers a request that it will not serve: the reason, the words, and when to retry."""

import math
from collections.abc import Mapping

from pdcoord.core.disagg import MUST_STAY_TOGETHER, why_together
from pdcoord.core.filters import is_too_long_everywhere
from pdcoord.core.model import Model
from pdcoord.core.plan import DropReason
from pdcoord.core.request import Request
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason

RETRY_AFTER_S_MAX = 60
"""Longer predictions of load say nothing of when a retry helps."""

AT_LIMIT = Refusal(
    RefuseReason.SATURATED,
    "The fleet is at its limits for this model; retry after the time in Retry-After.",
    retry_after_s=RETRY_AFTER_S,
)
"""Every endpoint that could serve the request has as many as it may; some wait may change that."""


def retry_after_s(drain_s: float) -> int:
    """Whole seconds for Retry-After, from how long the load ahead is predicted to last."""
    return min(max(RETRY_AFTER_S, math.ceil(drain_s)), RETRY_AFTER_S_MAX)


def model_unknown(name: str) -> Refusal:
    message = f"The model '{name}' does not exist; GET /v1/models lists those that do."
    return Refusal(RefuseReason.MODEL_UNKNOWN, message, "model")


def saturated() -> Refusal:
    return Refusal(RefuseReason.SATURATED, AT_LIMIT.message, retry_after_s=RETRY_AFTER_S)


def exhausted(attempt: int) -> Refusal:
    return Refusal(
        RefuseReason.LADDER_EXHAUSTED,
        f"{attempt} endpoint(s) failed this request and no other can take it; retry later.",
        retry_after_s=RETRY_AFTER_S,
    )


def stream_lost(why: str) -> Refusal:
    """`why` completes "it could not be continued:"."""
    message = f"The stream broke off, and it could not be continued: {why}. What came before is incomplete."
    return Refusal(RefuseReason.STREAM_LOST, message)


def queue_full(drain_s: float) -> Refusal:
    return Refusal(
        RefuseReason.QUEUE_FULL,
        "As many requests wait for this model as may; retry after the time in Retry-After.",
        retry_after_s=retry_after_s(drain_s),
    )


def waited_too_long(wait_s: float, drain_s: float) -> Refusal:
    return Refusal(
        RefuseReason.WAITED_TOO_LONG,
        f"The request waited {wait_s:.1f} s for its turn, which is the longest allowed; retry after the time "
        "in Retry-After.",
        retry_after_s=retry_after_s(drain_s),
    )


def deadline(ttft_s: float, wanted_s: float, drain_s: float) -> Refusal:
    """`ttft_s` from arrival, as predicted or as it has passed already."""
    return Refusal(
        RefuseReason.DEADLINE,
        f"The first token is predicted after {ttft_s * 1e3:.0f} ms, too late for the {wanted_s * 1e3:.0f} ms "
        "that are asked for; retry after the time in Retry-After, or ask for more.",
        retry_after_s=retry_after_s(drain_s),
    )


def pace(pace_s: float, wanted_s: float, drain_s: float) -> Refusal:
    """`pace_s` for a token, as predicted where the request would be served best."""
    return Refusal(
        RefuseReason.DEADLINE,
        f"The answer is predicted to take {pace_s * 1e3:.0f} ms a token, more than the "
        f"{wanted_s * 1e3:.0f} ms that are asked for; retry after the time in Retry-After, or ask for more.",
        retry_after_s=retry_after_s(drain_s),
    )


def shed(drain_s: float) -> Refusal:
    return Refusal(
        RefuseReason.SHED,
        "The fleet is busy with requests of higher priority; retry after the time in Retry-After.",
        retry_after_s=retry_after_s(drain_s),
    )


def why_never(request: Request, model: Model) -> Refusal | None:
    """Why no wait would get a request served; None if one might."""
    if is_too_long_everywhere(request, model.pools):
        return Refusal(
            RefuseReason.CONTEXT_TOO_LONG,
            f"The prompt has {request.prompt_tokens} tokens, more than any endpoint of this model takes.",
        )
    is_alone_only = why_together(request, model) in MUST_STAY_TOGETHER
    if is_alone_only and not any(pool.can_serve_alone for pool in model.pools):
        return Refusal(
            RefuseReason.NOT_SERVED,
            "This kind of call must be served by one endpoint alone, and no pool of this model can do that.",
        )
    return None


def why_nobody(request: Request, model: Model, drops: Mapping[DropReason, int]) -> Refusal:
    """Why nobody can serve a request: what no wait would change first, then what a wait might."""
    never = why_never(request, model)
    if never is not None:
        return never
    # The first canary of a pair takes a second or so: who can only be split waits for it in the line.
    if drops.get(DropReason.AT_LIMIT) or drops.get(DropReason.CANARY_UNTRIED):
        return AT_LIMIT
    return Refusal(
        RefuseReason.NO_ENDPOINTS,
        "No endpoint of this model can serve the request now; retry after the time in Retry-After.",
        retry_after_s=RETRY_AFTER_S,
    )
