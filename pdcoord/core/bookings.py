"""The requests under way: each is booked, carried on and closed in all accounts at once."""

from dataclasses import dataclass, replace

from pdcoord.core import hedging
from pdcoord.core.accounts import Accounts
from pdcoord.core.alternatives import moved
from pdcoord.core.canary import Canaries
from pdcoord.core.events import DecodeMoved, Dispatch, RequestEnded, ResponseBegan
from pdcoord.core.fleet import Endpoint, EndpointId, Life
from pdcoord.core.ledger import Entry
from pdcoord.core.model import Model
from pdcoord.core.models import Models
from pdcoord.core.plan import Plan
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.request import Request, RequestId
from pdcoord.core.served import PathEvidence, target_of
from pdcoord.protocol.plans import RungKind


@dataclass(slots=True)
class Live:
    """One request between its first plan and its end.

    Attributes:
        failed_decodes: endpoints that failed it, each in the life in which it did.
        has_begun: the plan's endpoint answers.
        begun_s: when the first byte of its answer came, from whichever endpoint; None before.
        resume_count: continuations planned since an endpoint failed it.
        moved_count: likewise since one drained, which is no failure.
        output_tokens: of its answer, that its prompt has in it since it was continued.
    """

    request: Request
    plan: Plan
    failed_decodes: frozenset[Life] = frozenset()
    has_begun: bool = False
    begun_s: float | None = None
    resume_count: int = 0
    moved_count: int = 0
    output_tokens: int = 0


class Bookings:
    """Every request that was sent and has not ended.

    Attributes:
        live: they, by id; a second attempt has one of its own. Changed by nobody else.
    """

    def __init__(
        self,
        accounts: Accounts,
        prefixes: Prefixes,
        models: Models,
        canaries: Canaries,
        evidence: PathEvidence,
    ) -> None:
        self.live: dict[RequestId, Live] = {}
        self._to = accounts
        self._prefixes = prefixes
        self._models = models
        self._canaries = canaries
        self._evidence = evidence

    def open(self, live: Live, model: Model, now_s: float) -> Dispatch:
        """A request is sent to its plan's endpoints."""
        plan, request = live.plan, live.request
        self.live[request.id] = live
        worker = plan.prefill or plan.decode
        self._to.ledger.begin(
            Entry(
                request_id=request.id,
                decode=plan.decode.id,
                worker=worker.id,
                prefill_us=round(plan.chosen.figures.prefill_s * 1e6),
                prompt_tokens=request.prompt_tokens,
                transfer_bytes=plan.chosen.figures.transfer_bytes,
                uncached_tokens=plan.chosen.figures.landing_tokens,
                is_streamed=request.is_streamed,
            ),
            now_s,
        )
        self._to.lessons.dispatched(request, plan, now_s, live.output_tokens)
        self._to.progress.sent(request, plan, now_s)
        decode_state = self._evidence.state_of(plan.decode)
        if decode_state is not None and request.is_generative:
            self._prefixes.in_use.hold(decode_state.ordinal, request)
        if plan.prefill is not None:
            self._to.paths.begin(plan.prefill.id, plan.decode.id, request.id)
        state = self._evidence.state_of(worker)
        if state is not None and request.is_generative:
            self._prefixes.compare(state, request, model)
        # Recorded when routed, not when answered, so that a burst of one prefix goes to one place.
        for endpoint in {worker.id: worker, plan.decode.id: plan.decode}.values():
            wait_s = plan.chosen.figures.ttft_s
            self._record_prefix(endpoint, request, model, now_s, wait_s=wait_s)
        return Dispatch(plan)

    def begin(self, began: ResponseBegan, now_s: float) -> None:
        """A request's endpoint answers."""
        live, served = self.live[began.id], began.served
        assert not live.has_begun, f"response {live.request.id} began twice"
        live.has_begun = True
        if live.begun_s is None:
            live.begun_s = now_s
        if served is not None:
            self._canaries.heard(live.plan.decode.id)
        model = self._models.get(live.request.model)
        bandwidth_min = model.disaggregation.bandwidth_bytes_per_s_min if model is not None else 0.0
        self._to.lessons.began(began, bandwidth_min, now_s)
        self._to.progress.began(live.request.id, served, now_s)
        self._to.ledger.finish_prefill(live.request.id, now_s)
        self._evidence.take(live.plan, served, now_s)
        fell_back = served is not None and any(r.rung is RungKind.COLOCATED for r in served.rungs)
        budget = self._models.budgets.get(live.request.model)
        # A continuation was noted when it was planned.
        if budget is not None and (fell_back or not live.request.is_resumed):
            budget.note(is_fallback=fell_back or live.plan.is_outage)
        if model is not None and served is not None and served.prefill is not None:
            used = target_of(live.plan, served.prefill)
            if used is not None:
                self._record_prefix(used, live.request, model, now_s)

    def move(self, event: DecodeMoved, now_s: float) -> None:
        """A request was sent to another decode endpoint than its plan's, if it is one of its model's."""
        live = self.live[event.id]
        model, plan = self._models.get(live.request.model), live.plan
        states = (each.endpoint for each in self._to.fleet.at(event.address))
        decode = next((each for each in states if each.pool.model == live.request.model), None)
        if model is None or decode is None or decode.id == plan.decode.id:
            return
        assert not live.has_begun, f"request {event.id} was moved after its response began"
        self._evidence.take(plan, None, now_s)
        self.close(live, now_s)
        self.open(replace(live, plan=moved(plan, decode)), model, now_s)

    def adopt(self, first: Live, second: Live, now_s: float) -> None:
        """A request goes on as its second attempt, whose accounts go on as its own; the first is closed."""
        before, request_id = second.request.id, first.request.id
        del self.live[before]
        self.close(first, now_s)
        plan = second.plan = replace(second.plan, request_id=request_id)
        second.request = replace(second.request, id=request_id)
        self.live[request_id] = second
        self._to.ledger.rename(before, request_id)
        self._to.lessons.rename(before, request_id, plan)
        self._to.progress.rename(before, request_id, plan)
        self._prefixes.in_use.rename(before, request_id)
        if plan.prefill is not None:
            self._to.paths.abandon(plan.prefill.id, plan.decode.id, before)
            self._to.paths.begin(plan.prefill.id, plan.decode.id, request_id)

    def end(self, event: RequestEnded, now_s: float) -> None:
        """A request is over."""
        live = self.live[event.id]
        pace = self._to.lessons.ended(event.id, event.outcome, event.output_tokens, now_s)
        self._to.progress.ended(event.id, event.outcome, pace, now_s)
        if not live.has_begun:
            self._evidence.take(live.plan, None, now_s)
        self.close(live, now_s)

    def close(self, live: Live, now_s: float) -> None:
        """Take a plan off the accounts, and with it a second attempt that was made beside it."""
        for each in (live, self.live.get(hedging.id_of(live.request.id))):
            if each is not None:
                del self.live[each.request.id]
                self._close(each, now_s)

    def endpoint_ids(self) -> set[EndpointId]:
        """Every endpoint that is to serve a request under way."""
        ends = (end for live in self.live.values() for end in (live.plan.decode, live.plan.prefill))
        return {end.id for end in ends if end is not None}

    def validate(self) -> None:
        """Assert that each is booked under its own id, and nothing else is."""
        assert all(live.request.id == name == live.plan.request_id for name, live in self.live.items())
        assert self._to.ledger.open_count == len(self.live), "the ledger and the live requests disagree"
        self._to.progress.validate(self.live)
        self._to.lessons.validate(self.live)
        self._prefixes.in_use.validate(set(self.live))

    def _close(self, live: Live, now_s: float) -> None:
        """Those of endpoints that are gone go with it."""
        plan = live.plan
        self._to.lessons.dropped(live.request.id, now_s)
        self._to.progress.dropped(live.request.id, now_s)
        self._to.ledger.end(live.request.id, now_s)
        self._prefixes.in_use.let_go(live.request.id)
        for endpoint in (plan.decode, plan.prefill):
            if endpoint is not None and self._to.fleet.get(endpoint.id) is None:
                self._to.ledger.forget(endpoint.id)

    def _record_prefix(
        self, endpoint: Endpoint, request: Request, model: Model, now_s: float, *, wait_s: float = 0.0
    ) -> None:
        """An endpoint has a request's prompt, or will once it has waited for its turn there."""
        state = self._evidence.state_of(endpoint)
        if state is not None and request.is_generative:
            self._prefixes.record(state, request, model, now_s, wait_s=wait_s)
