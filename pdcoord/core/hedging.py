"""A second attempt beside one that shows no output: when it is asked for, how often, and under which id.

As in Dean and Barroso, "The Tail at Scale" (2013): the second is sent only where the first has taken longer
than nearly all do, and of few requests, so that a fleet that is slow as a whole is not asked twice.
"""

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from enum import StrEnum

from pdcoord.core.events import HedgeOver
from pdcoord.core.fleet import EndpointId
from pdcoord.core.ladder import FallbackBudget
from pdcoord.core.model import Model
from pdcoord.core.plan import Figures, Plan
from pdcoord.core.progress import expected_s, late_after_s
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.headers import REQUEST_ID_BYTES_MAX
from pdcoord.protocol.plans import RungKind

FACTOR_MIN = 2.0
SPREADS_MIN = 3.0
"""No second attempt before so many times the prediction of the first, and spreads of it."""
LEFT_FACTOR = 1.5
"""Of the prediction, what the second must have left of the objective: its own output comes no sooner."""
_SUFFIX = "-hedge"


class HedgeEnd(StrEnum):
    """What became of a second attempt; closed, a label of metrics."""

    WON = "won"
    LOST = "lost"
    FAILED = "failed"
    WITHHELD = "withheld"
    """It was asked for and not sent: their share of requests is spent."""


def id_of(request_id: RequestId) -> RequestId:
    """The id of a request's second attempt: engines do not take two requests of one id."""
    return RequestId(request_id + _SUFFIX)


def may_have_second(name: str) -> bool:
    """Whether a request may have this id: it is no second attempt's, and that would be none too long."""
    return not name.endswith(_SUFFIX) and len(name) + len(_SUFFIX) <= REQUEST_ID_BYTES_MAX


def after_s(request: Request, model: Model, figures: Figures) -> float | None:
    """How long after its dispatch a request may be asked of a second endpoint; None for never.

    As late as its objective allows, since most first attempts answer until then, but not before the first is
    later than nearly all are; without an objective, when it is late.
    """
    rules = model.fallback
    late_s = late_after_s(request, figures)
    is_allowed = rules.hedge_share_max > 0.0 and RungKind.OTHER_DECODE in rules.rungs
    if late_s is None or not is_allowed or request.is_resumed:
        return None
    wait_s = late_s
    objective_s = request.slo.ttft_s or model.slo.ttft_s
    if objective_s is not None and request.is_streamed:
        least_s = FACTOR_MIN * expected_s(request, figures) + SPREADS_MIN * figures.spread_s
        wait_s = min(max(objective_s - LEFT_FACTOR * figures.ttft_s, least_s), late_s)
    return max(wait_s, rules.hedge_after_s_min)


def exclusions(
    plan: Plan, failed: frozenset[EndpointId], barred: Iterable[EndpointId]
) -> Iterator[frozenset[EndpointId]]:
    """Whom a second attempt avoids, the best first: which leg keeps the first one waiting is not known."""
    avoided = failed | {plan.decode.id} | frozenset(barred)
    if plan.prefill is not None:
        yield avoided | {plan.prefill.id}
    yield avoided


def end_of(event: HedgeOver) -> HedgeEnd:
    if event.is_won:
        return HedgeEnd.WON
    return HedgeEnd.LOST if event.reason is None else HedgeEnd.FAILED


class Hedges:
    """How many second attempts there are of each model's requests.

    Attributes:
        counts: what became of them since the start, by model.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, HedgeEnd]] = Counter()
        self._budgets: dict[str, FallbackBudget] = {}

    def replace_models(self, models: Iterable[Model]) -> None:
        """These are all models from now on."""
        kept, self._budgets = self._budgets, {}
        for model in models:
            budget, window = kept.get(model.name), model.fallback.window
            is_same = budget is not None and budget.window == window
            self._budgets[model.name] = budget if budget is not None and is_same else FallbackBudget(window)

    def share(self, model: str) -> float:
        """Share of the model's recent attempts that were second ones, 0..1."""
        budget = self._budgets.get(model)
        return budget.share if budget is not None else 0.0

    def note(self, model: str, *, is_second: bool) -> None:
        """An attempt was sent."""
        if (budget := self._budgets.get(model)) is not None:
            budget.note(is_fallback=is_second)

    def count(self, model: str, end: HedgeEnd) -> None:
        """That became of one."""
        self.counts[model, end] += 1

    def allows(self, model: Model, plan: Plan, barred: Container[EndpointId]) -> bool:
        """Whether one more may be sent beside this plan.

        An endpoint that was put out does no other work, so what waits there is moved rather than doubled.
        """
        if plan.hedge_after_s is None:
            return False
        is_moved = any(endpoint in barred for endpoint in _ends(plan))
        return is_moved or self.share(model.name) < model.fallback.hedge_share_max


def _ends(plan: Plan) -> tuple[EndpointId, ...]:
    return (plan.decode.id,) if plan.prefill is None else (plan.decode.id, plan.prefill.id)
