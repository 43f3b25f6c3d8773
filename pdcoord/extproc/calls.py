"""One call between its stream and the core: planned, accounted for, and told of exactly once when it ends."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from pdcoord.core.events import (
    DecodeFailed,
    DecodeMoved,
    Outcome,
    RequestArrived,
    ResponseBegan,
)
from pdcoord.core.model import Model, PrefixMode
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId, is_allowed
from pdcoord.extproc.asking import header
from pdcoord.extproc.paths import path_of, why_not
from pdcoord.extproc.vocabulary import (
    Began,
    Ended,
    Failed,
    Headers,
    Moved,
    Refused,
    RequestHead,
    Route,
    Routed,
)
from pdcoord.front.account import Account
from pdcoord.front.answers import outcome_of, too_many_calls
from pdcoord.front.asked import Asked, asked_of
from pdcoord.front.gate import Gate, Visa
from pdcoord.front.intake import build_request, check_reserved, client_request_id, model_unknown
from pdcoord.front.ports import CallRecord, Limits, Observer, Picking, Tokens
from pdcoord.front.tracing import CallTrace, begin_call
from pdcoord.front.upstream import Sign, plan_header, resumed_below, steering_headers
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefusedError, RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import APIS, Call, parse_call
from pdcoord.protocol.signing import Steering
from pdcoord.wire.room import ByteRoom
from pdcoord.wire.tracing import Tracing

_OWN_ID_CUT = 80
"""What is kept of an id that needs a suffix, so that sidecars still take it over (128 bytes at most)."""
_TEST_SELECTION = b"test-epp-endpoint-selection"
_ECHO_HEADER = b"x-echo-set-header"
_PATH_SHOWN_MAX = 128


@dataclass(slots=True)
class _Asking:
    """A call that is being planned.

    Attributes:
        body: in place of the client's, where its model has another name or it is salted.
    """

    head: RequestHead
    call: Call
    model: Model
    asked: Asked
    body: bytes | None


@dataclass(frozen=True, slots=True)
class PickRules:
    """What a picker does beside planning.

    Attributes:
        fallbacks_max: endpoints named behind the primary.
        is_conformance: do what the Gateway API's conformance tests ask of a picker in headers, and let any
            path pass.
        passed: paths that any endpoint may be sent, beside those of `paths.PAGES`.
    """

    fallbacks_max: int = 2
    is_conformance: bool = False
    passed: frozenset[str] = frozenset()


_USUAL = PickRules()


class Picker:
    """Where calls go; one for the whole process.

    Args:
        clock: monotonic seconds.
        new_id: makes a request id for calls that bring none, unique for all practical purposes.
        tokens: asked where a model's prefixes are precise; without it they are approximate.

    Attributes:
        tracing: makes spans of calls; None where nothing is traced. Set once, before serving.
        bodies: that are being read or wait for their route.
        gate: lets calls in by their keys; every call until it is set, once, before serving.
        sign: signs plans; None where they are not signed. Set once, before serving.
    """

    def __init__(
        self,
        *,
        coordination: Picking,
        observer: Observer,
        limits: Limits,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        tokens: Tokens | None = None,
        rules: PickRules = _USUAL,
    ) -> None:
        self.coordination = coordination
        self.observer = observer
        self.limits = limits
        self.clock = clock
        self.new_id = new_id
        self.tokens = tokens
        self.rules = rules
        self.bodies = ByteRoom(limits.bodies_bytes_max)
        self.tracing: Tracing | None = None
        self.gate = Gate(clock=clock, wall=clock)
        self.sign: Sign | None = None
        self.live: set[str] = set()

    def open(self, head: RequestHead) -> "PickedCall":
        """Take a call on; `close` it, whatever happens."""
        client_id = client_request_id(head.headers)
        shown_id = client_id if client_id is not None else self.new_id()
        # The core keeps an account per id, so two live calls under one id need two accounts.
        own_id = shown_id if shown_id not in self.live else f"{shown_id[:_OWN_ID_CUT]}-{self.new_id()}"
        self.live.add(own_id)
        path = path_of(header(head.headers, b":path") or b"")
        record = CallRecord(id=RequestId(own_id), path=path[:_PATH_SHOWN_MAX], began_s=self.clock())
        trace = begin_call(self.tracing, self.clock, head.headers, record)
        self.observer.call_began()
        return PickedCall(self, record, shown_id.encode(), head.headers, trace)

    def identify(self, headers: Headers) -> Visa:
        """Whose call it is.

        Raises:
            RefusedError: if it is not let in, or there is no room.
        """
        if len(self.live) > self.limits.live_max:
            raise RefusedError(too_many_calls())
        return self.gate.identify(headers)


class PickedCall:
    """One call.

    Attributes:
        record: what is known of the call so far; its id is the core's.
        barred: why the call is not let in, which its head alone tells; None if it is.
    """

    __slots__ = ("_account", "_asking", "_picker", "_shown_id", "_trace", "_visa", "barred", "record")

    def __init__(
        self,
        picker: Picker,
        record: CallRecord,
        shown_id: bytes,
        headers: Headers,
        trace: CallTrace | None = None,
    ) -> None:
        self._picker = picker
        self._trace = trace
        self._shown_id = shown_id
        self._asking: _Asking | None = None
        self._account = Account(picker.coordination, record)
        self._visa: Visa | None = None
        self.barred: Refusal | None = None
        self.record = record
        try:
            self._visa = picker.identify(headers)
            record.key_name = self._visa.key_name
            self._visa.take_request()
        except RefusedError as error:
            self.barred = error.refusal

    def ask(self, head: RequestHead, body: bytes | None) -> Routed | Refused | None:
        """Have the call planned; None if that takes a while, and then `ask_on`."""
        try:
            route = self._ask(head, body)
        except RefusedError as error:
            return Refused(error.refusal)
        return Routed(route) if route is not None else None

    async def ask_on(self) -> Routed | Refused:
        """The rest of `ask`: wait for the prompt's tokens, and for the call's turn.

        The core bounds how long its turn takes, the tokens their own deadline.
        """
        asking = self._asking
        assert asking is not None, "nothing was asked"
        try:
            plan = None
            if not self._account.is_asked:
                tokens = self._picker.tokens
                ids = await tokens.tokens(asking.call, asking.model) if tokens is not None else None
                plan = self._arrive(asking, ids)
            if plan is None:
                with nullcontext() if self._trace is None else self._trace.waiting():
                    plan = await self._account.planned()
            return Routed(self._route(asking, plan))
        except RefusedError as error:
            return Refused(error.refusal)

    def tell(self, action: Moved | Began | Failed | Ended) -> None:
        """Pass on what became of the call to the core."""
        record, coordination, account = self.record, self._picker.coordination, self._account
        match action:
            case Moved(address):
                if account.is_live:
                    coordination.handle(DecodeMoved(record.id, HostPort(address)))
            case Began(status, served):
                record.status, record.served = status, served
                record.first_byte_s = self._picker.clock()
                if account.is_live:
                    coordination.handle(ResponseBegan(record.id, served))
            case Failed(status, reason, served):
                record.status, record.served, record.outcome = status, served, Outcome.UPSTREAM_ERROR
                record.failures += (reason,)
                if account.is_live:
                    account.is_live = False
                    coordination.handle(DecodeFailed(record.id, reason, served, is_final=True))
            case Ended(outcome, output_tokens):
                record.outcome, record.output_tokens = outcome, output_tokens
                account.end(outcome, output_tokens)

    def refused(self, refusal: Refusal) -> None:
        """The client is answered so."""
        record = self.record
        record.status, record.reason, record.outcome = refusal.status, refusal.reason, outcome_of(refusal)

    def answered(self, status: int) -> None:
        """Envoy showed how the call was answered, which the core does not account for."""
        record = self.record
        if record.plan is None and record.reason is None:
            record.status = status
            if status >= 400:
                is_upstreams = status >= 500
                record.outcome = Outcome.UPSTREAM_ERROR if is_upstreams else Outcome.CLIENT_ERROR
            else:
                record.outcome = Outcome.OK

    @property
    def _entered(self) -> Visa:
        assert self._visa is not None, "a call that was not let in is given a route"
        return self._visa

    def close(self) -> None:
        """The stream is over: the core hears of the end, if it has not yet, and so does who counts."""
        self._account.end(self.record.outcome, None)
        if self._visa is not None:
            self._visa.settle(self.record)
        self._asking = None
        self._picker.live.discard(self.record.id)
        self.record.ended_s = self._picker.clock()
        self._picker.observer.call_ended(self.record)
        if self._trace is not None:
            self._trace.end()

    def _ask(self, head: RequestHead, body: bytes | None) -> Route | None:
        picker, record = self._picker, self.record
        if self.barred is not None:
            raise RefusedError(self.barred)
        if head.subset is not None and not head.subset:
            raise RefusedError(_no_endpoints("The gateway's subset names no endpoint"))
        if picker.rules.is_conformance and header(head.headers, _TEST_SELECTION) is not None:
            return self._selected(head)
        if body is None:
            self._check_passable(head)
            endpoint = picker.coordination.any_endpoint(head.subset)
            if endpoint is None:
                raise RefusedError(_no_endpoints("No endpoint is ready"))
            return self._plain_route(endpoint.address, head)
        visa = self._entered
        call = visa.salted(parse_call(APIS[record.path], body))
        check_reserved(call)
        model = picker.coordination.model(call.model)
        if model is None:
            raise RefusedError(model_unknown(call.model))
        visa.check_model(model, call.model)
        asked = visa.granted(asked_of(visa.headers(head.headers)), model)
        record.model = model.name
        record.has_unknown_objective = asked.has_unknown_objective(model)
        changed = visa.body(body, call, model)
        self._asking = asking = _Asking(head, call, model, asked, None if changed is body else changed)
        is_precise = call.api.is_generative and model.prefix_mode is PrefixMode.PRECISE
        if is_precise and picker.tokens is not None:
            return None
        plan = self._arrive(asking, None)
        return None if plan is None else self._route(asking, plan)

    def _check_passable(self, head: RequestHead) -> None:
        rules = self._picker.rules
        path = path_of(header(head.headers, b":path") or b"")
        refusal = why_not(header(head.headers, b":method"), path, rules.passed)
        if refusal is not None and not rules.is_conformance:
            raise RefusedError(refusal)
        if path in APIS and not head.is_end and not self._picker.gate.is_open:
            # Unseen, it would go on for any model and without the tenant's salt.
            message = "request_body_mode of Envoy's ext_proc filter is NONE; with API keys, set BUFFERED."
            raise RefusedError(Refusal(RefuseReason.INTERNAL, message))

    def _arrive(self, asking: _Asking, token_ids: Sequence[int] | None) -> Plan | None:
        """Ask the core; None if the call must wait."""
        request = build_request(self.record.id, asking.call, asking.model, token_ids, asking.asked)
        self._entered.take_prompt(request)
        self.record.note_request(asking.call, request, asking.model)
        if asking.head.subset is not None:
            request = replace(request, allowed=asking.head.subset)
        return self._account.ask(RequestArrived(request))

    def _route(self, asking: _Asking, plan: Plan) -> Route:
        self._entered.sent(plan)
        picker, head, body = self._picker, asking.head, asking.body
        fallback, fallbacks_max = asking.model.fallback, picker.rules.fallbacks_max
        count_max = max(fallbacks_max, fallback.resume_tries_max)
        others = picker.coordination.alternatives(plan, head.subset, count_max)
        # Envoy sends nothing twice that has begun to come back.
        is_stream = asking.call.is_stream
        steering = resumed_below(plan, fallback, others) if is_stream else plan_header(plan)
        path, query = _split_target(head.headers)
        target = _target(self.record.path, query)
        headers = steering_headers(steering, self.record.id.encode(), target, picker.sign)
        headers += self._entered.added()
        if self._trace is not None:
            headers += self._trace.headers()
        if body is not None:
            headers.append((b"content-length", b"%d" % len(body)))
        if path != self.record.path:
            # What is accounted for is what the engine is asked, whatever it takes for the same path.
            headers.append((b":path", target.encode("latin-1")))
        self._asking = None  # The body goes with the route, and is not kept for as long as the answer takes.
        return Route(
            destination=",".join([plan.decode.address, *(other.address for other in others[:fallbacks_max])]),
            headers=headers,
            removed=self._removed(head, headers),
            body=body,
            plan=plan,
            request_id=self._shown_id,
        )

    def _plain_route(self, destination: str, head: RequestHead) -> Route:
        headers = [(names.REQUEST_ID, self._shown_id), *self._entered.added()]
        if self._picker.sign is not None:
            method = header(head.headers, b":method") or b""
            target = _target(*_split_target(head.headers)).encode("latin-1")
            headers += self._picker.sign(Steering(method, target, self._shown_id))
        removed = self._removed(head, headers)
        return Route(destination, headers, removed, request_id=self._shown_id)

    def _removed(self, head: RequestHead, kept: Headers) -> list[bytes]:
        return _removed(head.headers, kept, self._entered.removed())

    def _selected(self, head: RequestHead) -> Route:
        """The endpoints that a conformance test names, by host or address, in its order."""
        wanted = (header(head.headers, _TEST_SELECTION) or b"").decode("latin-1").split(",")
        addresses = [endpoint.address for endpoint in self._picker.coordination.endpoints()]
        named = [
            address
            for each in wanted
            for address in addresses
            if is_allowed(frozenset({each.strip()}), address)
        ]
        picked = [address for address in named if is_allowed(head.subset, address)]
        if not picked:
            raise RefusedError(_no_endpoints("test-epp-endpoint-selection names no endpoint of the fleet"))
        route = self._plain_route(",".join(picked), head)
        route.headers.append((_ECHO_HEADER, b"x-conformance-test-served-endpoint:" + picked[0].encode()))
        route.is_conformance = True
        return route


def _removed(client: Headers, kept: Headers, secret: frozenset[bytes]) -> list[bytes]:
    """Names by which a client could steer, and `secret` ones, without those that are set anyway."""
    own = {name for name, _ in kept} | {names.DESTINATION_ENDPOINT}
    dropped = {name for name, _ in client if names.is_routing(name) or name in secret}
    return sorted(dropped - own)


def _split_target(headers: Headers) -> tuple[str, str]:
    path, _, query = (header(headers, b":path") or b"").decode("latin-1").partition("?")
    return path, query


def _target(path: str, query: str) -> str:
    """As sidecars read it: an empty query is none."""
    return f"{path}?{query}" if query else path


def _no_endpoints(what: str) -> Refusal:
    message = f"{what}; retry after the time in Retry-After."
    return Refusal(RefuseReason.NO_ENDPOINTS, message, retry_after_s=RETRY_AFTER_S)
