"""Streams that broke off in their middle: whether each may go on elsewhere, and what is left to be done."""

from dataclasses import replace

from pdcoord.core.disagg import MUST_STAY_TOGETHER
from pdcoord.core.fleet import EndpointId, EndpointState, Fleet, Health
from pdcoord.core.ladder import FallbackBudget
from pdcoord.core.ledger import Load
from pdcoord.core.model import Model
from pdcoord.core.pairs import has_way_to_split
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, Why
from pdcoord.core.request import Request
from pdcoord.core.scheduler import Choice
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import Mode, RungKind

STALL_STEPS = 100
"""Expected steps without a token after which a stream counts as stalled, where that is longer than the
policy's least: an engine that is merely busy is late by some of them."""


def why_not(model: Model, tries: int, age_s: float) -> str:
    """Why the policy has a stream not continued; empty if it may be.

    Args:
        tries: continuations that were planned for it already.
        age_s: since its first byte.
    """
    rules = model.fallback
    if RungKind.RESUME not in rules.rungs:
        return "the policy's ladder has no resume"
    if tries >= rules.resume_tries_max:
        return f"{tries} continuations failed, which is all that the policy allows"
    if age_s > rules.resume_age_s_max:
        return f"it is older than the {rules.resume_age_s_max:g} s that the policy allows"
    return ""


def blamed(state: EndpointState | None, reason: RungReason) -> RungReason:
    """What a broken stream is held against its endpoint for: one that drains was told to give it back.

    A sidecar whose streams are continued elsewhere breaks them off without a word then.
    """
    is_draining = state is not None and state.health is Health.DRAINING
    return RungReason.DECODE_DRAINING if is_draining else reason


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


def is_local_prefill(best: Candidate, why: Why, model: Model, paths: PathTable) -> bool:
    """Whether a decode endpoint is to compute what prefill endpoints are there for."""
    return (
        best.mode is Mode.COLOCATED
        and why not in MUST_STAY_TOGETHER
        and best.figures.uncached_tokens >= model.disaggregation.uncached_tokens_min
        and has_way_to_split(model, paths)
    )


def within_budget(
    choice: Choice, model: Model, budget: FallbackBudget, decode: EndpointState, paths: PathTable
) -> Choice | None:
    """The choice for a continuation that the fallback budget allows, which is told of it; None if none is.

    A pod that dies takes many streams with it at one moment: each is noted as it is planned, since at their
    first bytes all of them would have had leave.
    """
    is_fallback = is_local_prefill(choice.best, choice.why, model, paths)
    if is_fallback and not budget.allows(model.fallback, decode):
        other = choice.runner_up
        if other is None or other.mode is not Mode.SPLIT:
            budget.refused_count += 1
            budget.note(is_fallback=False)
            return None
        choice = replace(choice, best=other, why=Why.SPLIT_ONLY_WAY, runner_up=choice.best, is_outage=False)
        is_fallback = False
    budget.note(is_fallback=is_fallback)
    return choice


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
