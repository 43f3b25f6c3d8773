"""Plans one attempt: what the scheduler chose, within the fallback budget's leave, with its ladder."""

from pdcoord.core import hedging, refusals
from pdcoord.core.accounts import Accounts
from pdcoord.core.disagg import dialect
from pdcoord.core.fleet import EndpointId
from pdcoord.core.ladder import rungs
from pdcoord.core.leave import Leave
from pdcoord.core.model import Model
from pdcoord.core.models import Models
from pdcoord.core.plan import Plan
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import Request
from pdcoord.core.scheduler import Choice, NoChoice, Scheduler
from pdcoord.protocol.errors import Refusal
from pdcoord.protocol.plans import Mode


class Planner:
    """Holds no state of its own; the budget is told of leave that was given or not.

    Args:
        replica: the coordinator process whose plans these are; empty where no sidecar tells others of it.
    """

    def __init__(self, accounts: Accounts, prefixes: Prefixes, models: Models, replica: str = "") -> None:
        self._fleet = accounts.fleet
        self._progress = accounts.progress
        self._models = models
        self._replica = replica
        self._scheduler = Scheduler(accounts.fleet, accounts.ledger, prefixes, accounts.paths, accounts.speed)
        self._leave = Leave(accounts.fleet, accounts.paths)

    def plan(
        self, request: Request, model: Model, excluded: frozenset[EndpointId], attempt: int, now_s: float
    ) -> Plan | Refusal:
        """The best way to serve a request now, or why there is none.

        Args:
            excluded: endpoints that it is not to be sent to.
            attempt: as of the plan.
        """
        shunned = self._progress.shunned(now_s)
        choice = self._scheduler.choose(request, model, excluded, now_s, shunned)
        if isinstance(choice, NoChoice):
            return refusals.why_nobody(request, model, choice.drops)
        budget = self._models.budgets[model.name]

        def spare() -> Choice | None:
            return self._scheduler.choose_with_shunned_prefills(request, model, excluded, now_s, shunned)

        within = self._leave.choice(choice, request, model, budget, spare)
        if isinstance(within, Refusal):
            return within
        choice = within
        decode = self._fleet.get(choice.best.decode.id)
        assert decode is not None, "the scheduler chose an endpoint that is not in the fleet"
        is_split = choice.best.mode is Mode.SPLIT
        return Plan(
            request_id=request.id,
            chosen=choice.best,
            why=choice.why,
            dialect=dialect(decode.endpoint.pool, model),
            rungs=rungs(model, decode, choice.other_prefills, budget) if is_split else (),
            runner_up=choice.runner_up,
            drops=dict(choice.drops),
            prefill_deadline_s=model.disaggregation.prefill_deadline_s,
            transfer_deadline_s=model.disaggregation.transfer_deadline_s,
            attempt=attempt,
            is_outage=choice.is_outage,
            replica=self._replica,
            hedge_after_s=hedging.after_s(request, model, choice.best.figures),
        )
