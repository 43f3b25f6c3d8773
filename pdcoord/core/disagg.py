"""When a request stays together whatever the load: the rules of never being worse than not splitting."""

import math

from pdcoord.core.fleet import EngineKind, Pool
from pdcoord.core.model import Disaggregation, LegOrder, Model, SplitMode
from pdcoord.core.objective import SLO_EXCESS_EQUAL
from pdcoord.core.plan import Candidate, Why
from pdcoord.core.request import Request
from pdcoord.protocol.plans import DialectName
from transfer.verdict import Connector

MUST_STAY_TOGETHER = frozenset({Why.NOT_GENERATIVE, Why.MANY_CHOICES, Why.ONE_ENGINE_CALL, Why.MODE_NEVER})
"""Reasons that hold even where nobody can serve the request alone; the others are of speed only."""


def why_together(request: Request, model: Model) -> Why | None:
    """The reason that forbids splitting this request, or None."""
    rules = model.disaggregation
    if not request.is_generative:
        return Why.NOT_GENERATIVE
    if request.choice_count > 1:
        # One ticket is pulled once: a second answer would find its KV gone (vLLM issue 43509).
        return Why.MANY_CHOICES
    if not request.is_splittable:
        return Why.ONE_ENGINE_CALL
    if rules.mode is SplitMode.NEVER:
        return Why.MODE_NEVER
    if request.prompt_tokens < model.block_tokens_max:
        # Less than one full block hands nothing over, and some connectors hang on it (LMCache 2459).
        return Why.PROMPT_BELOW_BLOCK
    if rules.mode is SplitMode.AUTO and request.prompt_tokens < rules.uncached_tokens_min:
        return Why.PROMPT_BELOW_THRESHOLD
    return None


def weigh(split: Candidate, together: Candidate, rules: Disaggregation) -> Why:
    """Whether the best split is worth it beside the best colocated serving, both being possible."""
    if rules.mode is SplitMode.ALWAYS:
        return Why.SPLIT_ALWAYS
    sure_s = max(rules.saving_s_min, math.hypot(split.figures.spread_s, together.figures.spread_s))
    excess = split.figures.slo_excess - together.figures.slo_excess
    if excess > SLO_EXCESS_EQUAL:
        return Why.COLOCATED_FASTER
    if excess < -SLO_EXCESS_EQUAL:
        # A tight objective makes a large ratio of a small saving.
        is_sure = together.figures.ttft_s - split.figures.ttft_s >= sure_s
        is_sure = is_sure or split.figures.pace_s < together.figures.pace_s
        is_sure = is_sure or split.figures.harm < together.figures.harm
        return Why.SPLIT_FASTER if is_sure else Why.SAVING_BELOW_NOISE
    if split.figures.unfit != together.figures.unfit:
        is_split = split.figures.unfit < together.figures.unfit
        return Why.SPLIT_PREFERRED if is_split else Why.COLOCATED_PREFERRED
    saving_s = together.figures.split_time_s - split.figures.split_time_s
    if saving_s <= 0.0:
        return Why.COLOCATED_FASTER
    return Why.SPLIT_FASTER if saving_s >= sure_s else Why.SAVING_BELOW_NOISE


def dialect(decode: Pool, model: Model) -> DialectName:
    """How legs to this pool are handed over. A path's connectors are equal, so the decode pool's will do."""
    if decode.engine is EngineKind.SGLANG:
        return DialectName.SGLANG
    is_ours = decode.side.connector is Connector.PDCOORD
    is_concurrent = model.disaggregation.order is LegOrder.CONCURRENT
    return DialectName.PDCOORD if is_ours and is_concurrent else DialectName.NIXLV2
