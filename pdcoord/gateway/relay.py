"""One call's life: read, decide, forward, relay as bytes, and tell the core exactly once that it ended."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass

from pdcoord.core.events import (
    DecodeFailed,
    Outcome,
    RequestArrived,
    ResponseBegan,
)
from pdcoord.core.hedging import may_have_second
from pdcoord.core.model import PrefixMode
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.front import upstream as wires
from pdcoord.front.account import Account
from pdcoord.front.answers import internal_error, outcome_of, too_many_calls
from pdcoord.front.asked import asked_of
from pdcoord.front.gate import Gate, Visa
from pdcoord.front.intake import build_request, check_reserved, client_request_id, model_unknown
from pdcoord.front.ports import CallRecord, Limits, Observer, Relaying, Tokens
from pdcoord.front.tracing import CallTrace, begin_call
from pdcoord.gateway.arrival import Body
from pdcoord.gateway.first import is_plain_stream, read_first
from pdcoord.gateway.hedging import Failure, Opened, Race
from pdcoord.gateway.held import Held, hold
from pdcoord.gateway.resuming import Call, Means, Resumer
from pdcoord.gateway.streams import Answer, Fate
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefusedError, RefuseReason, RungReason
from pdcoord.protocol.openai import Api, parse_call
from pdcoord.protocol.plans import RungKind
from pdcoord.resume.call import CHAT, COMPLETIONS
from pdcoord.resume.continuation import Unresumable
from pdcoord.resume.tape import Shelf, Tape
from pdcoord.wire.asgi import ClientGoneError, Receive, Scope, Send, send_json, watch_disconnect
from pdcoord.wire.client import Client, Response
from pdcoord.wire.errors import InvalidRequestError, StreamError, WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.room import ByteRoom
from pdcoord.wire.tracing import Tracing

_OK = 200
_CONTINUED_PATHS = frozenset({CHAT, COMPLETIONS})
_OWN_ID_CUT = 80
"""What is kept of an id that needs a suffix, so that sidecars still take it over (128 bytes at most)."""
_BREAK_OFF_S = 10.0
"""Longest time that a client is given to take the error that ends its answer."""


@dataclass(frozen=True, slots=True)
class _Broken:
    """One attempt whose stream broke off, or whose end is in doubt, and that may go on elsewhere."""

    fate: Fate
    resumer: Resumer


class Relay:
    """Serves calls of the API; one for the whole process.

    Args:
        clock: monotonic seconds.
        new_id: makes a request id for calls that bring none, unique for all practical purposes.
        tokens: asked where a model's prefixes are precise; without it they are approximate.
        tracing: makes spans of calls; None where nothing is traced.

    Attributes:
        gate: lets calls in by their keys; every call until it is set, once, before serving.
        sign: signs plans; None where they are not signed. Set once, before serving.
    """

    def __init__(
        self,
        *,
        coordination: Relaying,
        upstream: Client,
        observer: Observer,
        limits: Limits,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        tokens: Tokens | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.coordination = coordination
        self.upstream = upstream
        self.observer = observer
        self.limits = limits
        self.clock = clock
        self.new_id = new_id
        self.tokens = tokens
        self.tracing = tracing
        self.bodies = ByteRoom(limits.bodies_bytes_max)
        self.gate = Gate(clock=clock, wall=clock)
        self.sign: wires.Sign | None = None
        self.shelf = Shelf(limits.resume_bytes_max, limits.resume_stream_bytes_max)
        self.means = Means(coordination, upstream, limits, clock, self.headers_for)
        self._live: set[str] = set()

    def headers_for(
        self,
        plan: Plan,
        client: Headers,
        request_id: bytes,
        target: str,
        *,
        is_kept: bool = True,
        is_lost: bool = False,
    ) -> Headers:
        """The headers that a call is sent with.

        Args:
            target: path and query that it is sent to.
            is_kept: its stream is continued from here if it breaks off.
            is_lost: it would be, but nobody can, and the client hears from here why.
        """
        return wires.headers_for(
            plan,
            client,
            request_id,
            target,
            self.sign,
            is_resumed_above=is_kept,
            is_ended_above=is_lost,
        )

    @property
    def live_count(self) -> int:
        """Calls being read or served."""
        return len(self._live)

    async def serve(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one POST of `api` from its head to the end of its answer."""
        client_id = client_request_id(scope["headers"])
        shown_id = client_id if client_id is not None else self.new_id()
        # The core keeps an account per id, so two live calls under one id need two accounts.
        is_taken = shown_id in self._live or not may_have_second(shown_id)
        own_id = f"{shown_id[:_OWN_ID_CUT]}-{self.new_id()}" if is_taken else shown_id
        self._live.add(own_id)
        record = CallRecord(id=RequestId(own_id), path=api.path, began_s=self.clock())
        trace = begin_call(self.tracing, self.clock, scope["headers"], record)
        self.observer.call_began()
        try:
            await _Exchange(
                relay=self,
                api=api,
                scope=scope,
                receive=receive,
                send=send,
                record=record,
                account=Account(self.coordination, record),
                body=Body(self.bodies),
                shown_id=shown_id,
                trace=trace,
            ).run()
        finally:
            self._live.discard(own_id)
            record.ended_s = self.clock()
            if trace is not None:
                trace.end()
            self.observer.call_ended(record)


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """One call while it is served.

    Attributes:
        record: what is known of the call so far; its id is the core's.
        account: what the core keeps of it.
        shown_id: the request id that the client is told.
        trace: the call's spans; None where nothing is traced.
        body: what goes upstream; let go of once an answer has begun.
        is_continued: the policy has the call's stream go on elsewhere if it breaks off.
        why_not_kept: why that cannot be done whatever is in the stream; None if it can.
        answer: what goes to the client of an engine's answer; None before one.
        has_begun: the head of the answer has been sent, so nothing can be taken back.
        visa: what the call's key allows; None before it was looked at.
        group: where what is done for the call runs; None before it is sent on.
    """

    relay: Relay
    api: Api
    scope: Scope
    receive: Receive
    send: Send
    record: CallRecord
    account: Account
    shown_id: str
    body: Body
    trace: CallTrace | None = None
    is_stream: bool = False
    has_begun: bool = False
    is_continued: bool = False
    why_not_kept: Unresumable | None = None
    answer: Answer | None = None
    visa: Visa | None = None
    group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Serve the call; whatever happens, the client gets one answer and the core one end."""
        try:
            async with asyncio.timeout(self.relay.limits.request_deadline_s):
                await self._serve_watched(await self._prepare())
        except RefusedError as error:
            await self._refuse(error.refusal)
        except ClientGoneError:
            pass  # The record says so from the start.
        except TimeoutError:
            await self._time_out()
        except asyncio.CancelledError:
            # The drain has run out. The client is still there and is told so.
            await self._cut()
            raise
        except Exception as error:  # noqa: BLE001  # A defect must not reach the client as a stack trace.
            await self._crash(error)
        finally:
            self._end()

    async def _prepare(self) -> Plan | None:
        """Read and check the call, and have it planned; the parsed body is gone when this returns.

        None stands for a call that must wait for its plan.
        """
        if self.relay.live_count > self.relay.limits.live_max:
            raise RefusedError(too_many_calls())
        visa = self.visa = self.relay.gate.identify(self.scope["headers"])
        self.record.key_name = visa.key_name
        visa.take_request()
        # From here on the key is nowhere: not in what goes upstream, nor in what is traced.
        self.scope["headers"] = visa.headers(self.scope["headers"])
        await self.body.read(self.scope["headers"], self.receive, self.relay.limits)
        raw = self.body.raw
        call = visa.salted(parse_call(self.api, raw))
        check_reserved(call)
        model = self.relay.coordination.model(call.model)
        if model is None:
            raise RefusedError(model_unknown(call.model))
        visa.check_model(model, call.model)
        asked = visa.granted(asked_of(self.scope["headers"]), model)
        self.record.model = model.name
        self.record.has_unknown_objective = asked.has_unknown_objective(model)
        self.is_stream = call.is_stream
        self.body.raw = visa.body(raw, call, model)
        token_ids = None
        tokens = self.relay.tokens
        if tokens is not None and self.api.is_generative and model.prefix_mode is PrefixMode.PRECISE:
            token_ids = await tokens.tokens(call, model)
        request = build_request(self.record.id, call, model, token_ids, asked)
        visa.take_prompt(request)
        self.is_continued = self.is_stream and RungKind.RESUME in model.fallback.rungs
        if self.api.path not in _CONTINUED_PATHS:
            self.why_not_kept = Unresumable.API
        elif request.choice_count > 1:
            self.why_not_kept = Unresumable.MANY_CHOICES
        self.record.note_request(call, request, model)
        return self.account.ask(RequestArrived(request))

    async def _planned(self) -> Plan:
        with nullcontext() if self.trace is None else self.trace.waiting():
            return await self.account.planned()

    async def _serve_watched(self, plan: Plan | None) -> None:
        """Forward the call unless the client goes, which cancels everything that is done for it."""
        refusal: Refusal | None = None
        is_gone = False
        try:
            async with asyncio.TaskGroup() as group:
                self.group = group
                watcher = group.create_task(self._watch_client())
                try:
                    await self._forward(plan if plan is not None else await self._planned())
                except RefusedError as error:
                    refusal = error.refusal
                watcher.cancel()
        except* ClientGoneError:
            is_gone = True
        if is_gone:
            raise ClientGoneError("the client left before its answer was complete")
        if refusal is not None:
            raise RefusedError(refusal)

    async def _watch_client(self) -> None:
        await watch_disconnect(self.receive)
        raise ClientGoneError("the client left before its answer was complete")

    async def _forward(self, plan: Plan) -> None:
        """Try decode endpoints until one answers; the core says which, and when it is enough."""
        held: Held | None = None
        for _ in range(self.relay.limits.attempts_max):
            failure = await self._attempt(plan)
            if isinstance(failure, _Broken):
                await failure.resumer.run(failure.fate)
                return
            if failure is None:
                return
            held = failure.answer or held
            self.record.failures += (failure.reason,)
            try:
                other = self.account.ask(DecodeFailed(self.record.id, failure.reason, failure.served))
                plan = other if other is not None else await self._planned()
            except RefusedError:
                if held is None:
                    raise
                await self._answer(held)
                return
        message = f"{self.relay.limits.attempts_max} endpoints failed this request; retry later."
        raise RefusedError(Refusal(RefuseReason.LADDER_EXHAUSTED, message))

    async def _attempt(self, plan: Plan) -> Failure | _Broken | None:
        """Send the call to one decode endpoint, or two; None if its answer went to the client to its end."""
        assert self.group is not None, "an attempt outside its call"
        assert self.visa is not None, "an attempt at a call that was not let in"
        self.visa.sent(plan)
        opened = await Race(self.account, self._open, self.group).run(plan)
        if isinstance(opened, Failure):
            return opened
        async with opened.stack:
            began = ResponseBegan(self.record.id, opened.served, has_output=opened.has_output)
            self.relay.coordination.handle(began)
            decision = wires.decision_header(opened.plan, opened.served)
            self.record.served = opened.served
            if opened.held is not None:
                opened.held.headers.append((names.DECISION, decision))
                await self._answer(opened.held)
                return None
            self.record.began_plan = self.record.plan
            broken = await self._relay(opened.response, opened.first, decision)
            if broken is not None and opened.trace is not None:
                opened.trace.error = broken.resumer.reason_of(broken.fate)
            return broken

    async def _open(self, plan: Plan) -> Opened | Failure:
        """Send the call where a plan says, until there is something for the client."""
        async with AsyncExitStack() as stack:
            headers, trace = self.scope["headers"], None
            if self.trace is not None:
                trace = stack.enter_context(self.trace.attempt(plan))
                headers = trace.headers(headers)
            opened = await self._reach(plan, headers, stack)
            if isinstance(opened, Failure):
                if trace is not None:
                    trace.error = opened.reason
                return opened
            opened.trace, opened.stack = trace, stack.pop_all()
            return opened

    async def _reach(self, plan: Plan, headers: Headers, stack: AsyncExitStack) -> Opened | Failure:
        limits, path = self.relay.limits, self.api.path
        wait_s = limits.head_timeout_s if self.is_stream else limits.answer_timeout_s
        request_id, target = plan.request_id.encode(), self._target()
        is_kept = self.is_kept
        is_lost = self.is_continued and not is_kept
        try:
            response = await self.relay.upstream.request(
                "POST",
                plan.decode.address,
                target,
                headers=self.relay.headers_for(
                    plan, headers, request_id, target, is_kept=is_kept, is_lost=is_lost
                ),
                body=self.body.raw,
                head_timeout_s=wait_s,
            )
        except InvalidRequestError as error:
            raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, f"The call's {error}.")) from error
        except WireError as error:
            return Failure(wires.failure_of_error(error))
        await stack.enter_async_context(response)
        served = wires.served_of(response.header(names.SERVED))
        reason = wires.failure_of_answer(response.status, response.header(names.REASON))
        if reason is not None:
            # A sidecar's own error is not kept: the core's refusal says more.
            is_engines = response.header(names.REASON) is None
            return Failure(reason, served, await hold(response, limits, path) if is_engines else None)
        if response.status >= 400:
            # What an engine, or a sidecar for it, says is wrong with the call.
            held = await hold(response, limits, path)
            if held is None:
                return Failure(RungReason.DECODE_ERROR, served)
            return Opened(plan, response, served, held=held)
        try:
            # An engine sends a stream's head at once and may still die in its prefill. The client
            # has seen nothing until the first event, so until then another endpoint can take over.
            is_generated = self.api.is_generative and response.status == _OK
            first = await read_first(response, timeout_s=wait_s, is_generated=is_generated)
        except StreamError:
            return Failure(RungReason.DECODE_ERROR, served)
        return Opened(plan, response, served, first)

    def _target(self) -> str:
        query = self.scope.get("query_string", b"")
        return f"{self.api.path}?{query.decode('latin-1')}" if query else self.api.path

    async def _relay(self, response: Response, first: bytes, decision: bytes) -> _Broken | None:
        """Pass an answer on as it comes; per part there is only what `relay_body` does."""
        self.has_begun = True
        self.record.status = response.status
        self.record.first_byte_s = self.relay.clock()
        headers = wires.headers_to_client(response.headers)
        headers += [(names.REQUEST_ID, self.shown_id.encode()), (names.DECISION, decision)]
        is_continued = self.is_continued and response.status == _OK and is_plain_stream(response)
        tape = Tape(self.relay.shelf, self.body.raw) if is_continued and self.is_kept else None
        why_not_kept = self.why_not_kept or Unresumable.API
        answer = Answer(self.scope, self.send, response, tape=tape, why_not_kept=why_not_kept)
        self.body.let_go()
        self.answer = answer
        await answer.begin(headers)
        resumer = Resumer(self.relay.means, self._as_call(), answer)
        fate = await answer.relay(response, first, resumer.watch())
        is_whole = fate is Fate.WHOLE and (not is_continued or await resumer.is_whole())
        if is_continued and not is_whole:
            return _Broken(fate, resumer)
        if is_whole:
            self.record.outcome = Outcome.OK if response.status < 400 else Outcome.CLIENT_ERROR
            if self._is_cut_short(response, answer):
                self.record.is_cut_short, self.record.outcome = True, Outcome.UPSTREAM_ERROR
            await answer.end()
        else:
            self.record.outcome, self.record.reason = Outcome.UPSTREAM_ERROR, RefuseReason.STREAM_LOST
            message = "The engine's stream broke off; what came before is incomplete."
            await answer.break_off(Refusal(RefuseReason.STREAM_LOST, message))
        return None

    def _is_cut_short(self, response: Response, answer: Answer) -> bool:
        """Whether a stream that ended, and that nobody continues, is not whole."""
        is_told = self.api.path in _CONTINUED_PATHS and response.status == _OK and is_plain_stream(response)
        return is_told and not self.is_continued and not answer.seems_whole()

    @property
    def is_kept(self) -> bool:
        """Whether its stream is kept while it passes, to be continued from here."""
        return self.is_continued and self.why_not_kept is None

    def _as_call(self) -> Call:
        assert self.group is not None, "an answer outside its call"
        return Call(
            path=self.api.path,
            headers=self.scope["headers"],
            record=self.record,
            account=self.account,
            trace=self.trace,
            planned=self._planned,
            group=self.group,
        )

    async def _answer(self, held: Held) -> None:
        self.has_begun = True
        self.record.status = held.status
        self.record.outcome = Outcome.UPSTREAM_ERROR if held.status >= 500 else Outcome.CLIENT_ERROR
        headers = [*held.headers, (names.REQUEST_ID, self.shown_id.encode())]
        await send_json(self.send, held.status, held.body, headers)

    async def _refuse(self, refusal: Refusal) -> None:
        self.has_begun = True
        self.record.status = refusal.status
        self.record.reason = refusal.reason
        self.record.outcome = outcome_of(refusal)
        headers = [*refusal.headers(), (names.REQUEST_ID, self.shown_id.encode())]
        await send_json(self.send, refusal.status, refusal.body(self.api.path), headers)

    async def _time_out(self) -> None:
        limit_s = self.relay.limits.request_deadline_s
        if self.has_begun:
            message = f"The answer was not complete after {limit_s:g} s; ask for less output at a time."
            await self._break_off(Refusal(RefuseReason.UPSTREAM_TIMEOUT, message))
            return
        message = f"No answer within {limit_s:g} s; ask for less output at a time."
        await self._refuse(Refusal(RefuseReason.UPSTREAM_TIMEOUT, message))

    async def _cut(self) -> None:
        message = "The gateway is stopping and could not wait for this answer; send the call again."
        refusal = Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S)
        await (self._break_off(refusal) if self.has_begun else self._refuse(refusal))

    async def _crash(self, error: Exception) -> None:
        self.relay.observer.crashed(error, self.record.id)
        await (self._break_off(internal_error()) if self.has_begun else self._refuse(internal_error()))

    async def _break_off(self, refusal: Refusal) -> None:
        """End an answer that has begun, for a reason of ours that is none of its endpoint's."""
        self.record.outcome, self.record.reason = Outcome.REFUSED, refusal.reason
        if self.answer is not None:
            with suppress(Exception):  # What the client cannot be told any more it need not be.
                async with asyncio.timeout(_BREAK_OFF_S):
                    await self.answer.break_off(refusal)

    def _end(self) -> None:
        self.body.let_go()
        if self.answer is not None:
            self.record.output_tokens = self.answer.output_tokens()
            self.answer.close()
        self.account.end(self.record.outcome, self.record.output_tokens)
        if self.visa is not None:
            self.visa.settle(self.record)
