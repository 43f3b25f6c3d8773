"""Requests that have a second attempt beside the first: who gets one, and which of the two goes on."""

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import replace

from pdcoord.core import hedging, resumes
from pdcoord.core.accounts import Accounts
from pdcoord.core.bookings import Bookings
from pdcoord.core.events import Action, HedgeAsked, HedgeOver
from pdcoord.core.fleet import EndpointId
from pdcoord.core.hedging import HedgeEnd
from pdcoord.core.ladder import FallbackBudget, may_try_other, replaced_budgets
from pdcoord.core.model import Model
from pdcoord.core.models import Models
from pdcoord.core.plan import Plan
from pdcoord.core.planning import Planner
from pdcoord.core.served import PathEvidence
from pdcoord.protocol.errors import RungReason


class Hedges:
    """Sends few of them, and keeps the booking of the attempt that a request goes on with.

    Attributes:
        counts: what became of them since the start, by model.
    """

    def __init__(
        self,
        accounts: Accounts,
        models: Models,
        planner: Planner,
        bookings: Bookings,
        evidence: PathEvidence,
    ) -> None:
        self.counts: Counter[tuple[str, HedgeEnd]] = Counter()
        self._fleet = accounts.fleet
        self._progress = accounts.progress
        self._models = models
        self._planner = planner
        self._bookings = bookings
        self._evidence = evidence
        self._budgets: dict[str, FallbackBudget] = {}

    def replace_models(self, models: Iterable[Model]) -> None:
        """These are all models from now on."""
        self._budgets = replaced_budgets(self._budgets, models)

    def share(self, model: str) -> float:
        """Share of the model's recent attempts that were second ones, 0..1."""
        budget = self._budgets.get(model)
        return budget.share if budget is not None else 0.0

    def note(self, model: str, *, is_second: bool) -> None:
        """An attempt was sent."""
        if (budget := self._budgets.get(model)) is not None:
            budget.note(is_fallback=is_second)

    def handle(self, event: HedgeAsked | HedgeOver, now_s: float) -> list[Action]:
        """Send a request to a second endpoint beside the first, if one may be asked; or leave one of two."""
        if isinstance(event, HedgeAsked):
            return self._ask(event, now_s)
        self._end(event, now_s)
        return []

    def validate(self) -> None:
        """Assert that every model has its share of them."""
        assert self._budgets.keys() == self._models.budgets.keys(), (
            "a model without a share of second attempts"
        )

    def _ask(self, event: HedgeAsked, now_s: float) -> list[Action]:
        live, second = self._bookings.live[event.id], hedging.id_of(event.id)
        model = self._models.get(live.request.model)
        barred = self._progress.quarantine.barred
        is_due = model is not None and not live.has_begun and second not in self._bookings.live
        attempt = live.plan.attempt + 1
        if model is None or not is_due or not may_try_other(model, attempt):
            return []
        if not self._allows(model, live.plan, barred):
            self.counts[model.name, HedgeEnd.WITHHELD] += 1
            return []
        request, failed = replace(live.request, id=second), resumes.excluded(live.failed_decodes, self._fleet)
        for excluded in hedging.exclusions(live.plan, failed, barred):
            planned = self._planner.plan(request, model, excluded, attempt, now_s)
            if isinstance(planned, Plan):
                self.note(model.name, is_second=True)
                return [self._bookings.open(replace(live, request=request, plan=planned), model, now_s)]
        return []

    def _allows(self, model: Model, plan: Plan, barred: Container[EndpointId]) -> bool:
        """Whether one more may be sent beside this plan.

        An endpoint that was put out does no other work, so what waits there is moved rather than doubled.
        """
        if plan.hedge_after_s is None:
            return False
        ends = (plan.decode, plan.prefill)
        is_moved = any(endpoint is not None and endpoint.id in barred for endpoint in ends)
        return is_moved or self.share(model.name) < model.fallback.hedge_share_max

    def _end(self, event: HedgeOver, now_s: float) -> None:
        live = self._bookings.live
        first, second = live[event.id], live[hedging.id_of(event.id)]
        slower = first if event.is_won else second
        self.counts[first.request.model, hedging.end_of(event)] += 1
        if event.reason is not None:
            self._progress.failed(slower.request.id, event.reason, event.served, now_s)
        elif event.is_won:
            self._progress.outrun(event.id, now_s)
        if event.reason is not None or event.is_won:
            decode = slower.plan.decode
            state, why = self._fleet.get(decode.id), event.reason or RungReason.DECODE_TIMEOUT
            failed = resumes.failed_with(first.failed_decodes, decode, state, resumes.blamed(state, why))
            first.failed_decodes = second.failed_decodes = failed
        self._evidence.take(slower.plan, event.served, now_s)
        if event.reason is not None:
            resumes.mark_gone(self._fleet, slower.plan.decode.id, event.reason)
        if event.is_won:
            self._bookings.adopt(first, second, now_s)
        else:
            self._bookings.close(second, now_s)
