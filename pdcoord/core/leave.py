"""What the fallback budget gives leave for: decode endpoints that compute what others are there for."""

from collections.abc import Callable
from dataclasses import replace

from pdcoord.core import refusals
from pdcoord.core.disagg import MUST_STAY_TOGETHER
from pdcoord.core.fleet import Fleet
from pdcoord.core.ladder import FallbackBudget
from pdcoord.core.model import Model
from pdcoord.core.pairs import has_way_to_split
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Candidate, Why
from pdcoord.core.request import Request
from pdcoord.core.scheduler import Choice
from pdcoord.protocol.errors import Refusal
from pdcoord.protocol.plans import Mode, RungKind

Spare = Callable[[], Choice | None]
"""The choice with prefill endpoints that serve badly among the rest; None where that changes nothing."""


def is_local_prefill(best: Candidate, why: Why, model: Model, paths: PathTable) -> bool:
    """Whether a decode endpoint is to compute what prefill endpoints are there for."""
    return (
        best.mode is Mode.COLOCATED
        and why not in MUST_STAY_TOGETHER
        and best.figures.uncached_tokens >= model.disaggregation.uncached_tokens_min
        and has_way_to_split(model, paths)
    )


class Leave:
    """Holds no state of its own."""

    def __init__(self, fleet: Fleet, paths: PathTable) -> None:
        self._fleet = fleet
        self._paths = paths

    def choice(
        self, choice: Choice, request: Request, model: Model, budget: FallbackBudget, spare: Spare
    ) -> Choice | Refusal:
        """What may be done of what was chosen, or the refusal where there is no leave; the budget is told.

        A prefill endpoint that serves badly is better than none: `spare` is asked before anybody is refused.
        """
        if request.is_resumed:
            return self._continued(choice, model, budget, spare)
        if not choice.is_outage or self._is_allowed(choice, model, budget):
            return choice
        other = spare()
        if other is not None and not other.is_outage:
            return other
        # Counted, since the share is of what was asked for: were only what is served counted, a
        # share once reached would let nothing pass any more.
        budget.note(is_fallback=False)
        if RungKind.COLOCATED not in model.fallback.rungs:
            return refusals.why_nobody(request, model, choice.drops)
        budget.refused_count += 1
        return refusals.saturated()

    def _continued(
        self, choice: Choice, model: Model, budget: FallbackBudget, spare: Spare
    ) -> Choice | Refusal:
        """The same for a continuation.

        A pod that dies takes many streams with it at one moment: each is noted as it is planned, since at
        their first bytes all of them would have had leave.
        """
        is_fallback = is_local_prefill(choice.best, choice.why, model, self._paths)
        if is_fallback and not self._is_allowed(choice, model, budget):
            split = _split_of(choice) or _split_of(spare())
            if split is None:
                budget.refused_count += 1
                budget.note(is_fallback=False)
                return refusals.saturated()
            choice, is_fallback = split, False
        budget.note(is_fallback=is_fallback)
        return choice

    def _is_allowed(self, choice: Choice, model: Model, budget: FallbackBudget) -> bool:
        decode = self._fleet.get(choice.best.decode.id)
        assert decode is not None, "the scheduler chose an endpoint that is not in the fleet"
        return budget.allows(model.fallback, decode)


def _split_of(choice: Choice | None) -> Choice | None:
    """The choice with the pair in it as the best, faster or not; None if there is none."""
    if choice is None or choice.best.mode is Mode.SPLIT:
        return choice
    other = choice.runner_up
    if other is None or other.mode is not Mode.SPLIT:
        return None
    return replace(choice, best=other, why=Why.SPLIT_ONLY_WAY, runner_up=choice.best, is_outage=False)
