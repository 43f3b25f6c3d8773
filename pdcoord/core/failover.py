"""Requests whose endpoint failed, and streams that broke off: where each goes on, or why it is refused."""

from dataclasses import replace

from pdcoord.core import refusals, resumes
from pdcoord.core.accounts import Accounts
from pdcoord.core.bookings import Bookings, Live
from pdcoord.core.events import Action, DecodeFailed, Refuse, StreamBroke
from pdcoord.core.ladder import may_try_other
from pdcoord.core.models import Models
from pdcoord.core.plan import Plan
from pdcoord.core.planning import Planner
from pdcoord.core.request import RequestId
from pdcoord.core.served import PathEvidence
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason


class Failover:
    """Holds no state of its own: what a request has been through is in its booking."""

    def __init__(
        self,
        accounts: Accounts,
        models: Models,
        planner: Planner,
        bookings: Bookings,
        evidence: PathEvidence,
    ) -> None:
        self._fleet = accounts.fleet
        self._ledger = accounts.ledger
        self._speed = accounts.speed
        self._progress = accounts.progress
        self._models = models
        self._planner = planner
        self._bookings = bookings
        self._evidence = evidence

    def handle(self, event: DecodeFailed | StreamBroke, now_s: float) -> list[Action]:
        """Close the plan that failed, and send the request elsewhere or refuse it."""
        if isinstance(event, DecodeFailed):
            return [self._fail_decode(event, now_s)]
        return [self._break_stream(event, now_s)]

    def blamed(self, request_id: RequestId, reason: RungReason) -> RungReason:
        """What a request's decode endpoint is held against for, where it failed for this reason."""
        live = self._bookings.live.get(request_id)
        return reason if live is None else resumes.blamed(self._fleet.get(live.plan.decode.id), reason)

    def silence_s_max(self, request_id: RequestId, now_s: float) -> float | None:
        """How long a request's stream may go without a token; None where it could not go on elsewhere."""
        live = self._bookings.live.get(request_id)
        model = self._models.get(live.request.model) if live is not None else None
        if live is None or model is None or live.begun_s is None:
            return None
        decode = live.plan.decode
        if resumes.why_not(model, live.resume_count, now_s - live.begun_s, moves=live.moved_count):
            return None
        excluded = resumes.excluded(live.failed_decodes, self._fleet) | {decode.id}
        if not resumes.has_other(self._fleet, live.request, excluded):
            return None
        load = self._ledger.load(decode.id)
        step_s = self._speed.step_s(decode, max(1, load.streaming_count), load.streaming_tokens)
        return resumes.silence_s_max(model, step_s, load, now_s)

    def _fail_decode(self, event: DecodeFailed, now_s: float) -> Action:
        live = self._bookings.live[event.id]
        assert not live.has_begun, f"request {event.id} failed over after its response began"
        self._evidence.take(live.plan, event.served, now_s)
        reason = resumes.blamed(self._fleet.get(live.plan.decode.id), event.reason)
        self._progress.failed(event.id, reason, event.served, now_s)
        live = self._give_up(live, event.reason, now_s)
        attempt = live.plan.attempt + 1
        model = self._models.get(live.request.model)
        if live.request.is_resumed and not event.is_final:
            return self._resume(live, reason, now_s)
        if model is None or event.is_final or not may_try_other(model, attempt):
            return Refuse(event.id, refusals.exhausted(attempt))
        excluded = resumes.excluded(live.failed_decodes, self._fleet)
        planned = self._planner.plan(live.request, model, excluded, attempt, now_s)
        if isinstance(planned, Refusal):
            return Refuse(event.id, refusals.exhausted(attempt))
        return self._bookings.open(replace(live, plan=planned), model, now_s)

    def _break_stream(self, event: StreamBroke, now_s: float) -> Action:
        live = self._bookings.live[event.id]
        assert live.has_begun, f"the stream of {event.id} broke off before it began"
        reason = resumes.blamed(self._fleet.get(live.plan.decode.id), event.reason)
        self._progress.broke(event.id, reason, now_s)
        live = self._give_up(live, event.reason, now_s)
        tokens = max(live.output_tokens, event.output_tokens)
        request = resumes.grown(live.request, tokens - live.output_tokens)
        return self._resume(replace(live, request=request, output_tokens=tokens), reason, now_s)

    def _give_up(self, live: Live, reason: RungReason, now_s: float) -> Live:
        """Close the account of a plan whose endpoint failed or drains; the request with that noted."""
        self._bookings.close(live, now_s)
        decode = live.plan.decode
        resumes.mark_gone(self._fleet, decode.id, reason)
        state = self._fleet.get(decode.id)
        failed = resumes.failed_with(live.failed_decodes, decode, state, resumes.blamed(state, reason))
        return replace(live, failed_decodes=failed)

    def _resume(self, live: Live, reason: RungReason, now_s: float) -> Action:
        """Have what is left of an answer made elsewhere; its old account is closed."""
        request, plan = live.request, live.plan
        model = self._models.get(request.model)
        if model is None:
            return Refuse(request.id, refusals.stream_lost("its model is no longer served"))
        assert live.begun_s is not None, f"the stream of {request.id} goes on though it never began"
        is_drain = reason is RungReason.DECODE_DRAINING
        tries, moves = live.resume_count, live.moved_count
        why = resumes.why_not(model, tries, now_s - live.begun_s, moves=moves, is_drain=is_drain)
        if why:
            return Refuse(request.id, refusals.stream_lost(why))
        for excluded in resumes.exclusions(live.failed_decodes, plan.decode.id, self._fleet):
            planned = self._planner.plan(request, model, excluded, plan.attempt + 1, now_s)
            if isinstance(planned, Plan) or planned.reason is not RefuseReason.NO_ENDPOINTS:
                break
        if isinstance(planned, Refusal):
            why = f"no other endpoint can take it ({planned.reason})"
            return Refuse(request.id, refusals.stream_lost(why))
        tries, moves = tries + (not is_drain), moves + is_drain
        live = replace(live, plan=planned, has_begun=False, resume_count=tries, moved_count=moves)
        return self._bookings.open(live, model, now_s)
