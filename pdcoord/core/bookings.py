"""The accounts of requests under way: each is opened, carried on and closed in all of them at once."""

from dataclasses import dataclass, replace

from pdcoord.core.fleet import Endpoint, Life
from pdcoord.core.ledger import Entry
from pdcoord.core.model import Model
from pdcoord.core.plan import Plan
from pdcoord.core.prefixes import Prefixes
from pdcoord.core.remote import Accounts
from pdcoord.core.request import Request, RequestId
from pdcoord.core.served import PathEvidence


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
    """Holds no state of its own."""

    def __init__(self, accounts: Accounts, prefixes: Prefixes, evidence: PathEvidence) -> None:
        self._to = accounts
        self._prefixes = prefixes
        self._evidence = evidence

    def open(self, live: Live, model: Model, now_s: float) -> None:
        """A request is sent to its plan's endpoints."""
        plan, request = live.plan, live.request
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
        if plan.prefill is not None:
            self._to.paths.begin(plan.prefill.id, plan.decode.id, request.id)
        state = self._evidence.state_of(worker)
        if state is not None and request.is_generative:
            self._prefixes.compare(state, request, model)
        # Recorded when routed, not when answered, so that a burst of one prefix goes to one place.
        for endpoint in {worker.id: worker, plan.decode.id: plan.decode}.values():
            wait_s = plan.chosen.figures.ttft_s
            self.record_prefix(endpoint, request, model, now_s, wait_s=wait_s)

    def record_prefix(
        self, endpoint: Endpoint, request: Request, model: Model, now_s: float, *, wait_s: float = 0.0
    ) -> None:
        """An endpoint has a request's prompt, or will once it has waited for its turn there."""
        state = self._evidence.state_of(endpoint)
        if state is not None and request.is_generative:
            self._prefixes.record(state, request, model, now_s, wait_s=wait_s)

    def adopt(self, second: Live, request_id: RequestId) -> None:
        """The accounts of a second attempt go on as those of its request, whose own are closed."""
        before = second.request.id
        plan = second.plan = replace(second.plan, request_id=request_id)
        second.request = replace(second.request, id=request_id)
        self._to.ledger.rename(before, request_id)
        self._to.lessons.rename(before, request_id, plan)
        self._to.progress.rename(before, request_id, plan)
        if plan.prefill is not None:
            self._to.paths.abandon(plan.prefill.id, plan.decode.id, before)
            self._to.paths.begin(plan.prefill.id, plan.decode.id, request_id)

    def close(self, live: Live, now_s: float) -> None:
        """Take a plan off the accounts, and with it those of endpoints that are gone."""
        plan = live.plan
        self._to.lessons.dropped(live.request.id, now_s)
        self._to.progress.dropped(live.request.id, now_s)
        self._to.ledger.end(live.request.id, now_s)
        for endpoint in (plan.decode, plan.prefill):
            if endpoint is not None and self._to.fleet.get(endpoint.id) is None:
                self._to.ledger.forget(endpoint.id)
