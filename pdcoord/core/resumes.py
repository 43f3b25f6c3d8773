"""Streams that broke off in their middle: whether each may go on elsewhere, and what is left to be done."""

from dataclasses import replace

from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Fleet, Health, Life
from pdcoord.core.ledger import Load
from pdcoord.core.model import Model
from pdcoord.core.request import Request
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import RungKind

_GONE = frozenset({RungReason.DECODE_UNREACHABLE, RungReason.DECODE_DRAINING})
_NOBODY: frozenset[EndpointId] = frozenset()

STALL_STEPS = 100
"""Expected steps without a token after which a stream counts as stalled, where that is longer than the
policy's least: an engine that is merely busy is late by some of them."""


RESUMES_MAX = 16
"""Continuations of one stream in all, whatever the reasons, so that nothing goes on for ever."""


def why_not(model: Model, tries: int, age_s: float, *, moves: int = 0, is_drain: bool = False) -> str:
    """Why the policy has a stream not continued; empty if it may be.

    Args:
        tries: continuations that were planned for it since an endpoint failed it.
        age_s: since its first byte.
        moves: those that were planned since one drained; they are none of the policy's tries.
        is_drain: this one would be another of those, which the policy's tries and age do not bound: a rolling
            update is no reason to lose an answer that took long.
    """
    rules = model.fallback
    if RungKind.RESUME not in rules.rungs:
        return "the policy's ladder has no resume"
    if tries + moves >= RESUMES_MAX:
        return f"it was continued {tries + moves} times, which is all that any stream is"
    if tries >= rules.resume_tries_max and not is_drain:
        return f"{tries} continuations failed, which is all that the policy allows"
    if age_s > rules.resume_age_s_max and not is_drain:
        return f"it is older than the {rules.resume_age_s_max:g} s that the policy allows"
    return ""


def blamed(state: EndpointState | None, reason: RungReason) -> RungReason:
    """What a broken stream is held against its endpoint for: one that drains was told to give it back.

    A sidecar whose streams are continued elsewhere breaks them off without a word then.
    """
    return RungReason.DECODE_DRAINING if state is not None and state.is_leaving else reason


def mark_gone(fleet: Fleet, decode: EndpointId, reason: RungReason) -> None:
    """Have nothing sent on to an endpoint where a request found nobody, or was given back."""
    if reason in _GONE:
        fleet.mark_unreachable(decode, said_draining=reason is RungReason.DECODE_DRAINING)


def failed_with(
    failed: frozenset[Life], decode: Endpoint, state: EndpointState | None, reason: RungReason
) -> frozenset[Life]:
    """Those that failed a request, now that its decode endpoint gave it up too.

    One that drains is not chosen while it does, and has failed nothing once it is back.

    Args:
        state: of the endpoint of that id, which may be another process by now.
        reason: as `blamed` has it.
    """
    is_there = state is not None and state.endpoint.address == decode.address
    if state is None or not is_there or reason is RungReason.DECODE_DRAINING:
        return failed
    return failed | {(decode.id, state.life)}


def excluded(failed: frozenset[Life], fleet: Fleet) -> frozenset[EndpointId]:
    """Endpoints that are still the processes that failed a request."""
    if not failed:
        return _NOBODY
    states = ((endpoint_id, life, fleet.get(endpoint_id)) for endpoint_id, life in failed)
    return frozenset(each for each, life, state in states if state is not None and state.life == life)


def exclusions(failed: frozenset[Life], last: EndpointId, fleet: Fleet) -> tuple[frozenset[EndpointId], ...]:
    """Whom to leave out of the choice for a stream, in the order in which to try it.

    Where everybody has failed it, who failed it before the last is better than none: a connection that was
    cut says little of the process behind it.
    """
    everyone = excluded(failed, fleet)
    return (everyone,) if everyone <= {last} else (everyone, frozenset({last}))


def grown(request: Request, output_tokens: int) -> Request:
    """A request with so much more of its answer behind it, which is prompt from now on.

    What was cached of its prompt is so still, so its keys stay. It was admitted once and is not turned away
    for being one too many.
    """
    left = request.output_tokens_max
    return replace(
        request,
        prompt_tokens=request.prompt_tokens + output_tokens,
        output_tokens_max=None if left is None else max(1, left - output_tokens),
        is_resumed=True,
    )


def has_other(fleet: Fleet, request: Request, failed: frozenset[EndpointId]) -> bool:
    """Whether an endpoint that did not fail a request could take over its decode leg, as far as is known."""
    groups = (group for group in fleet.groups(request.model) if group.pool.can_decode)
    ready = (state.endpoint for group in groups for state in group.by_health[Health.READY].values())
    return any(each.id not in failed and request.allows(each.address) for each in ready)


def silence_s_max(model: Model, step_s: float, load: Load, now_s: float) -> float:
    """How long a stream may go without a token at an endpoint before it counts as stalled.

    Prompts that the endpoint has yet to compute are waited for: an engine that does not cut them into chunks
    gives no stream a token meanwhile.

    Args:
        step_s: expected time of a step there, as it is loaded now.
        load: the endpoint's account.
    """
    expected_s = max(step_s, model.slo.tpot_s or 0.0)
    return max(model.fallback.resume_stall_s_min, STALL_STEPS * expected_s) + load.pending_prefill_s(now_s)
