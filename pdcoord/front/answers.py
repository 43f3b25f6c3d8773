"""What a front answers itself, whatever it speaks to its clients, and how such an answer counts; pure."""

from pdcoord.core.events import Outcome
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason

_TOO_MANY_REQUESTS = 429
_UPSTREAM_REASONS = frozenset(
    {
        RefuseReason.UPSTREAM_FAILED,
        RefuseReason.UPSTREAM_TIMEOUT,
        RefuseReason.LADDER_EXHAUSTED,
        RefuseReason.STREAM_LOST,
    }
)


def outcome_of(refusal: Refusal) -> Outcome:
    """How a call ends that is answered so."""
    if refusal.reason in _UPSTREAM_REASONS:
        return Outcome.UPSTREAM_ERROR
    if refusal.is_servers_fault or refusal.status == _TOO_MANY_REQUESTS:
        return Outcome.REFUSED
    return Outcome.CLIENT_ERROR


def internal_error() -> Refusal:
    """All that a client hears of a defect of ours."""
    return Refusal(
        RefuseReason.INTERNAL, "pdcoord failed on this request; its log has the cause under the request id."
    )


def body_too_large(bytes_max: int) -> Refusal:
    return Refusal(RefuseReason.BODY_TOO_LARGE, f"The body is longer than {bytes_max} bytes; send less.")


def body_too_slow(timeout_s: float) -> Refusal:
    message = f"The body had not come whole after {timeout_s:g} s; send it without pausing."
    return Refusal(RefuseReason.BODY_TOO_SLOW, message)


def bodies_full() -> Refusal:
    message = "The gateway holds as many bytes of bodies as it may; retry after the time in Retry-After."
    return Refusal(RefuseReason.SATURATED, message, retry_after_s=RETRY_AFTER_S)


def too_many_calls() -> Refusal:
    message = "The gateway is serving as many calls as it may; retry after the time in Retry-After."
    return Refusal(RefuseReason.SATURATED, message, retry_after_s=RETRY_AFTER_S)
