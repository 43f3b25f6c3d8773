"""One call's life: read, decide, forward, relay as bytes, and tell the core exactly once that it ended."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from pdcoord.core.events import (
    DecodeFailed,
    Outcome,
    RequestArrived,
    ResponseBegan,
)
from pdcoord.core.model import PrefixMode
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.front import upstream as wires
from pdcoord.front.account import Account
from pdcoord.front.answers import body_too_large, body_too_slow, internal_error, outcome_of, too_many_calls
from pdcoord.front.asked import asked_of
from pdcoord.front.intake import build_request, check_reserved, client_request_id, model_unknown
from pdcoord.front.outputs import OutputCounter
from pdcoord.front.ports import CallRecord, Coordination, Limits, Observer, Tokens
from pdcoord.front.tracing import CallTrace, begin_call
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefusedError, RefuseReason, RungReason
from pdcoord.protocol.openai import Api, parse_call
from pdcoord.protocol.plans import ServedHeader
from pdcoord.wire.asgi import (
    BodyTimeoutError,
    ClientGoneError,
    Receive,
    Scope,
    Send,
    read_body,
    send_head,
    send_json,
    watch_disconnect,
)
from pdcoord.wire.client import Client, Response
from pdcoord.wire.errors import BodyTooLargeError, InvalidRequestError, StreamError, WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.relay import relay_body
from pdcoord.wire.tracing import Tracing

_EVENT_STREAM = b"text/event-stream"
_ERROR_EVENT = b'data: {"error"'
_OWN_ID_CUT = 80
"""What is kept of an id that needs a suffix, so that sidecars still take it over (128 bytes at most)."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An engine's whole answer to a failed attempt, kept to be relayed if no other is left."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class _Failure:
    """One attempt that ended before a byte reached the client."""

    reason: RungReason
    served: ServedHeader | None = None
    answer: _Answer | None = None


class Relay:
    """Serves calls of the API; one for the whole process.

    Args:
        clock: monotonic seconds.
        new_id: makes a request id for calls that bring none, unique for all practical purposes.
        tokens: asked where a model's prefixes are precise; without it they are approximate.
        tracing: makes spans of calls; None where nothing is traced.
    """

    def __init__(
        self,
        *,
        coordination: Coordination,
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
        self._live: set[str] = set()

    @property
    def live_count(self) -> int:
        """Calls being read or served."""
        return len(self._live)

    async def serve(self, api: Api, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one POST of `api` from its head to the end of its answer."""
        client_id = client_request_id(scope["headers"])
        shown_id = client_id if client_id is not None else self.new_id()
        # The core keeps an account per id, so two live calls under one id need two accounts.
        own_id = shown_id if shown_id not in self._live else f"{shown_id[:_OWN_ID_CUT]}-{self.new_id()}"
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
        outputs: counts the answer's tokens; None before an answer, and where it is compressed.
        has_begun: the head of the answer has been sent, so nothing can be taken back.
    """

    relay: Relay
    api: Api
    scope: Scope
    receive: Receive
    send: Send
    record: CallRecord
    account: Account
    shown_id: str
    trace: CallTrace | None = None
    body: bytes = b""
    is_stream: bool = False
    has_begun: bool = False
    outputs: OutputCounter | None = None

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
        raw = await self._read()
        call = parse_call(self.api, raw)
        check_reserved(call)
        asked = asked_of(self.scope["headers"])
        model = self.relay.coordination.model(call.model)
        if model is None:
            raise RefusedError(model_unknown(call.model))
        self.record.model = model.name
        self.record.has_unknown_objective = asked.has_unknown_objective(model)
        self.is_stream = call.is_stream
        self.body = raw if call.model == model.name else wires.with_model(raw, model.name)
        token_ids = None
        tokens = self.relay.tokens
        if tokens is not None and self.api.is_generative and model.prefix_mode is PrefixMode.PRECISE:
            token_ids = await tokens.tokens(call, model)
        request = build_request(self.record.id, call, model, token_ids, asked)
        self.record.note_request(call, request, model)
        return self.account.ask(RequestArrived(request))

    async def _read(self) -> bytes:
        limits = self.relay.limits
        too_large = body_too_large(limits.body_bytes_max)
        for name, value in self.scope["headers"]:
            # Answered before the body is sent where the client says how long it will be.
            if name == b"content-length" and value.isdigit() and int(value) > limits.body_bytes_max:
                raise RefusedError(too_large)
        try:
            return await read_body(
                self.receive, bytes_max=limits.body_bytes_max, timeout_s=limits.body_timeout_s
            )
        except BodyTooLargeError as error:
            raise RefusedError(too_large) from error
        except BodyTimeoutError as error:
            raise RefusedError(body_too_slow(limits.body_timeout_s)) from error

    async def _planned(self) -> Plan:
        with nullcontext() if self.trace is None else self.trace.waiting():
            return await self.account.planned()

    async def _serve_watched(self, plan: Plan | None) -> None:
        """Forward the call unless the client goes, which cancels everything that is done for it."""
        refusal: Refusal | None = None
        is_gone = False
        try:
            async with asyncio.TaskGroup() as group:
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
        held: _Answer | None = None
        for _ in range(self.relay.limits.attempts_max):
            failure = await self._attempt(plan)
            if failure is None:
                return
            held = failure.answer or held
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

    async def _attempt(self, plan: Plan) -> _Failure | None:
        """Send the call to one decode endpoint; None if its answer went to the client."""
        if self.trace is None:
            return await self._send_to(plan, self.scope["headers"])
        with self.trace.attempt(plan) as attempt:
            failure = await self._send_to(plan, attempt.headers(self.scope["headers"]))
            attempt.error = "" if failure is None else failure.reason
            return failure

    async def _send_to(self, plan: Plan, client_headers: Headers) -> _Failure | None:
        limits = self.relay.limits
        wait_s = limits.head_timeout_s if self.is_stream else limits.answer_timeout_s
        try:
            response = await self.relay.upstream.request(
                "POST",
                plan.decode.address,
                self._target(),
                headers=wires.headers_for(plan, client_headers, self.record.id.encode()),
                body=self.body,
                head_timeout_s=wait_s,
            )
        except InvalidRequestError as error:
            raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, f"The call's {error}.")) from error
        except WireError as error:
            return _Failure(wires.failure_of_error(error))
        async with response:
            served = wires.served_of(response.header(names.SERVED))
            reason = wires.failure_of_answer(response.status, response.header(names.REASON))
            if reason is not None:
                return _Failure(reason, served, await self._hold(response))
            if response.status >= 400:
                return await self._relay_error(response, plan, served)
            try:
                # An engine sends a stream's head at once and may still die in its prefill. The client
                # has seen nothing until the first byte, so until then another endpoint can take over.
                first = await response.read_chunk(idle_timeout_s=wait_s)
            except StreamError:
                return _Failure(RungReason.DECODE_ERROR, served)
            self.relay.coordination.handle(ResponseBegan(self.record.id, served))
            self.record.served = served
            await self._relay(response, first, wires.decision_header(plan, served))
        return None

    def _target(self) -> str:
        query = self.scope.get("query_string", b"")
        return f"{self.api.path}?{query.decode('latin-1')}" if query else self.api.path

    async def _relay_error(
        self, response: Response, plan: Plan, served: ServedHeader | None
    ) -> _Failure | None:
        """Pass on what an engine, or a sidecar for it, says is wrong with the call."""
        answer = await self._read_answer(response)
        if answer is None:
            return _Failure(RungReason.DECODE_ERROR, served)
        self.relay.coordination.handle(ResponseBegan(self.record.id, served))
        self.record.served = served
        answer.headers.append((names.DECISION, wires.decision_header(plan, served)))
        await self._answer(answer)
        return None

    async def _hold(self, response: Response) -> _Answer | None:
        """An engine's own error, whole; a sidecar's is not kept, the core's refusal says more."""
        return None if response.header(names.REASON) is not None else await self._read_answer(response)

    async def _read_answer(self, response: Response) -> _Answer | None:
        """An error, whole and in OpenAI's form; None if it broke off."""
        limits = self.relay.limits
        try:
            body = await response.read_all(timeout_s=limits.stream_idle_s, bytes_max=limits.held_bytes_max)
        except WireError:
            return None
        headers = wires.headers_to_client(response.headers)
        is_plain = response.header(b"content-encoding") is None
        shown = wires.error_body(response.status, body) if is_plain else body
        if shown is not body:
            headers = [pair for pair in headers if pair[0] != b"content-type"]
        return _Answer(response.status, headers, shown)

    async def _relay(self, response: Response, first: bytes, decision: bytes) -> None:
        """Pass an answer on as it comes; per part there is only what `relay_body` does."""
        self.body = b""
        self.has_begun = True
        self.record.status = response.status
        self.record.first_byte_s = self.relay.clock()
        headers = wires.headers_to_client(response.headers)
        headers += [(names.REQUEST_ID, self.shown_id.encode()), (names.DECISION, decision)]
        await send_head(self.send, response.status, headers)
        if response.header(b"content-encoding") is None:
            is_stream = (response.header(b"content-type") or b"").startswith(_EVENT_STREAM)
            self.outputs = OutputCounter(first, is_stream=is_stream)
        try:
            if first:
                await self.send({"type": "http.response.body", "body": first, "more_body": True})
                idle_timeout_s = self.relay.limits.stream_idle_s
                await relay_body(
                    self.scope, self.send, response, idle_timeout_s=idle_timeout_s, change=self.outputs
                )
        except StreamError:
            self.record.outcome = Outcome.UPSTREAM_ERROR
            await self._break_off(response, response.last or first)
            return
        self.record.outcome = Outcome.OK if response.status < 400 else Outcome.CLIENT_ERROR
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_off(self, response: Response, last: bytes) -> None:
        """End a broken answer so that it cannot pass for a whole one: its last chunk is never sent.

        The error goes out as an event only where an event may stand: behind a whole one, in a stream
        that is not compressed, and that the sidecar has not ended so already. Elsewhere it would be garbage.
        """
        is_stream = (response.header(b"content-type") or b"").startswith(_EVENT_STREAM)
        is_plain = response.header(b"content-encoding") is None
        has_said_so = last.rstrip().rpartition(b"\n\n")[2].startswith(_ERROR_EVENT)
        if is_stream and is_plain and last.endswith((b"\n\n", b"\r\n\r\n")) and not has_said_so:
            event = Refusal(
                RefuseReason.UPSTREAM_FAILED, "The engine's stream broke off; what came before is incomplete."
            ).event()
            await self.send({"type": "http.response.body", "body": event, "more_body": True})

    async def _answer(self, held: _Answer) -> None:
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
        await send_json(self.send, refusal.status, refusal.body(), headers)

    async def _time_out(self) -> None:
        if self.has_begun:
            self.record.outcome = Outcome.UPSTREAM_ERROR  # Left without its end, as in _break_off.
            return
        message = (
            f"No answer within {self.relay.limits.request_deadline_s:g} s; ask for less output at a time."
        )
        await self._refuse(Refusal(RefuseReason.UPSTREAM_TIMEOUT, message))

    async def _cut(self) -> None:
        if self.has_begun:
            self.record.outcome = Outcome.UPSTREAM_ERROR  # Left without its end, as in _break_off.
            return
        message = "The gateway is stopping and could not wait for this answer; send the call again."
        await self._refuse(Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S))

    async def _crash(self, error: Exception) -> None:
        self.relay.observer.crashed(error, self.record.id)
        if not self.has_begun:
            await self._refuse(internal_error())

    def _end(self) -> None:
        if self.account.is_live:
            tokens = self.record.output_tokens = self.outputs.count() if self.outputs is not None else None
            self.account.end(self.record.outcome, tokens)
