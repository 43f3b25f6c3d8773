"""Drives one request: does what the handoff machine orders and tells it what happened."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason
from pdcoord.protocol.headers import SERVED, HostPort
from pdcoord.protocol.plans import DialectName, encode_served
from pdcoord.protocol.tickets import PAIRING_ID_BITS, ROOM_MAX, Pairing, decode_prefill_answer
from pdcoord.wire.asgi import Receive, Scope, Send, send_head, send_json, watch_disconnect
from pdcoord.wire.client import Client, Response
from pdcoord.wire.errors import BodyTooLargeError, ConnectError, HeadTimeoutError, ResetError, WireError
from pdcoord.wire.heads import end_to_end
from pdcoord.wire.relay import Change, relay_body
from pdcoord.wire.tracing import Tracing
from sidecar import dialects
from sidecar.guard import LEG, Headers, for_client
from sidecar.handoff import Handoff
from sidecar.observe import Metrics
from sidecar.opening import Opening, Seen
from sidecar.reporter import Reporter
from sidecar.reports import RequestReport
from sidecar.tracing import HandoffTrace, begin_handoff
from sidecar.usage import UsageRewriter
from sidecar.vocabulary import (
    Action,
    Begun,
    BreakOff,
    CancelLeg,
    ClientLeft,
    Commit,
    DeadlinePassed,
    DecodeEnded,
    DecodeLost,
    DecodeOpened,
    DecodeRejected,
    End,
    Event,
    Fault,
    Order,
    OrphanLease,
    PassOn,
    PrefillAnswered,
    PrefillLost,
    PrefillRejected,
    Progressed,
    Refuse,
    SendDecode,
    SendPrefill,
    State,
)

# The machine's deadlines come first; the wire's own are there in case this module fails to cancel.
_BACKSTOP_S = 5.0
_LOOKS_PER_IDLE = 4
# For the head and body of an answer of our own, or for an error event, to a client that may not be reading.
_LAST_WORDS_S = 10.0
_EVENTS_MAX = 64
_ERROR_BODY_BYTES_MAX = 8 << 20
_ANSWER_BYTES_MAX = 64 << 20

_MESSAGES = {
    RefuseReason.LADDER_EXHAUSTED: "No prefill target could be used and the engine may not prefill itself",
    RefuseReason.UPSTREAM_TIMEOUT: "The engine did not answer in time",
    RefuseReason.UPSTREAM_FAILED: "The engine could not be reached or broke off",
}


@dataclass(frozen=True, slots=True)
class Tools:
    """What every exchange of a process shares.

    Attributes:
        rng: draws SGLang's rooms and pdcoord's pairings; cryptographic, since others share the engines.
        kv_port: KV side channel of a prefill target that names none.
        tracing: makes spans of generative calls; None where nothing is traced.
        reporter: tells coordinators of requests; None where there is no control stream.
    """

    client: Client
    engine: HostPort
    metrics: Metrics
    rng: Random
    bootstrap_port: int
    kv_port: int
    now_s: Callable[[], float]
    tracing: Tracing | None = None
    reporter: Reporter | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it may go to an engine.

    Attributes:
        target: path and query.
        headers: filtered by `guard.for_engine`.
        raw: the body, with nothing in it that no client may set.
        body: the same, read; None for a call that is not generative.
    """

    method: str
    target: str
    headers: Headers
    raw: bytes
    request_id: bytes
    body: dialects.ClientBody | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """An engine's whole answer, kept in case it must be passed on."""

    status: int
    headers: Headers
    body: bytes


class Exchange:
    """One request on its way.

    Attributes:
        handoff: the machine; read it when `run` has returned.
        status: the status that the client got; None if none was sent.
        trace: the spans of a generative call; None where nothing is traced.
        report: what coordinators are told of it; None where nobody is.
    """

    def __init__(
        self, tools: Tools, call: Call, order: Order, *, scope: Scope, send: Send, receive: Receive
    ) -> None:
        self.handoff = Handoff(order)
        self.status: int | None = None
        self.trace: HandoffTrace | None = None
        self.report: RequestReport | None = None
        if tools.tracing is not None and call.body is not None:
            path = call.body.api.path
            self.trace = begin_handoff(tools.tracing, tools.now_s, call.headers, path, call.request_id)
        self._tools = tools
        self._call = call
        self._order = order
        self._scope = scope
        self._send = send
        self._receive = receive
        self._events: asyncio.Queue[Event] = asyncio.Queue(_EVENTS_MAX)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._rooms: dict[int, int] = {}
        self._pairings: dict[int, Pairing] = {}
        self._answers: dict[int, _Answer] = {}
        self._committed = asyncio.Event()
        self._is_event_stream = False
        self._progress_s = 0.0
        self._held = b""
        self._relayed: Response | None = None
        self._seen_count = 0

    async def run(self) -> None:
        """Serve the request to its end; the client has its answer, or what there was of it."""
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch_client())
            try:
                await self._drive(group)
            finally:
                watch.cancel()
                for task in self._tasks.values():
                    task.cancel()

    async def _drive(self, group: asyncio.TaskGroup) -> None:
        handoff, now_s, reporter = self.handoff, self._tools.now_s, self._tools.reporter
        event: Event = Begun()
        while True:
            actions = handoff.handle(event, now_s())
            if reporter is not None and self.report is not None:
                reporter.look(self.report, handoff)
            if self.trace is not None:
                self.trace.follow(handoff)
            for action in actions:
                await self._do(action, group)
            if handoff.state is State.DONE:
                return
            event = await self._next_event()

    async def _next_event(self) -> Event:
        handoff = self.handoff
        while True:
            deadline_s = handoff.deadline_s
            until_s = deadline_s
            if handoff.state is State.RELAYING and deadline_s is not None:
                # Progress is looked at from time to time, so that nothing has to be noted per chunk.
                until_s = min(deadline_s, self._tools.now_s() + self._order.idle_deadline_s / _LOOKS_PER_IDLE)
            try:
                async with asyncio.timeout(until_s and until_s - self._tools.now_s()):
                    return await self._events.get()
            except TimeoutError:
                self._look_at_progress()
                if until_s != deadline_s or deadline_s is None:
                    continue
                progress_s = self._progress_s
                is_silent = progress_s + self._order.idle_deadline_s <= deadline_s
                if handoff.state is not State.RELAYING or is_silent:
                    return DeadlinePassed()
                return Progressed(progress_s)

    def _look_at_progress(self) -> None:
        if self._relayed is not None and self._relayed.part_count != self._seen_count:
            self._seen_count = self._relayed.part_count
            self._progress_s = self._tools.now_s()

    async def _watch_client(self) -> None:
        await watch_disconnect(self._receive)
        self._events.put_nowait(ClientLeft())

    # Actions.

    async def _do(self, action: Action, group: asyncio.TaskGroup) -> None:
        match action:
            case SendPrefill():
                self._tasks[action.leg] = group.create_task(self._prefill(action))
            case SendDecode():
                self._tasks[action.leg] = group.create_task(self._decode(action))
            case CancelLeg(leg):
                self._tasks[leg].cancel()
            case Commit():
                self._progress_s = self._tools.now_s()
                self._committed.set()
            case PassOn() | Refuse() | BreakOff():
                await self._answer(action)
            case OrphanLease():
                self._tools.metrics.count("orphaned_leases")
            case End():
                pass  # The state says it, and what has to be counted is counted by the caller.

    async def _answer(self, action: PassOn | Refuse | BreakOff) -> None:
        """The last words to the client; bounded, since it may not be reading."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                match action:
                    case PassOn(leg):
                        await self._pass_on(self._answers[leg])
                    case Refuse(reason):
                        await self._refuse(reason)
                    case BreakOff(reason) if self.status is None:
                        await self._refuse(reason)
                    case BreakOff(reason):
                        await self._break_off(reason)
        except TimeoutError:
            return

    async def _pass_on(self, answer: _Answer) -> None:
        self.status = answer.status
        headers = self._our_headers(for_client(end_to_end(answer.headers)))
        if self._call.method == "HEAD" or answer.status in {204, 304}:
            await send_head(self._send, answer.status, headers)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(answer.body)))
        await send_head(self._send, answer.status, headers)
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": False})

    async def _refuse(self, reason: RefuseReason) -> None:
        refusal = self._refusal(reason)
        self.status = refusal.status
        self._tools.metrics.count("refusals", reason)
        await send_json(self._send, refusal.status, refusal.body(), self._our_headers(refusal.headers()))

    async def _break_off(self, reason: RefuseReason) -> None:
        # The response stays unfinished on purpose: the server closes the connection, and no client and no
        # gateway can take what it has for the whole.
        last = (self._relayed.last if self._relayed is not None else b"") or self._held
        if self._is_event_stream and last.endswith((b"\n\n", b"\r\n\r\n")):
            # Inside an event another would be garbage.
            event = self._refusal(reason).event()
            await self._send({"type": "http.response.body", "body": event, "more_body": True})

    def _refusal(self, reason: RefuseReason) -> Refusal:
        rungs = self.handoff.rungs
        why = f" ({rungs[-1].reason})" if rungs else ""
        retry_after_s = RETRY_AFTER_S if reason is RefuseReason.LADDER_EXHAUSTED else None
        return Refusal(reason, f"{_MESSAGES[reason]}{why}; try again.", retry_after_s=retry_after_s)

    def _our_headers(self, headers: Headers) -> Headers:
        kept = [*headers, (b"x-request-id", self._call.request_id)]
        if self._call.body is not None:
            kept.append((SERVED, encode_served(self.handoff.served())))
        return kept

    # Legs. Each runs in a task of its own and ends by putting one event, or by being cancelled.

    async def _prefill(self, action: SendPrefill) -> None:
        self._events.put_nowait(await self._ask_prefill(action))

    async def _ask_prefill(self, action: SendPrefill) -> Event:
        timeout_s = self._order.prefill_deadline_s + _BACKSTOP_S
        has_head = False
        try:
            async with await self._tools.client.request(
                "POST",
                action.target.address,
                self._call.target,
                headers=[*self._leg_headers(action.leg), (LEG, b"prefill")],
                body=self._prefill_body(action),
                head_timeout_s=timeout_s,
            ) as response:
                has_head = True
                raw = await response.read_all(timeout_s=timeout_s, bytes_max=_ANSWER_BYTES_MAX)
        except WireError as error:
            return PrefillLost(action.leg, _fault(error, has_head=has_head))
        if response.status != 200:
            self._answers[action.leg] = _Answer(response.status, response.headers, raw)
            return PrefillRejected(action.leg, response.status)
        try:
            answer = decode_prefill_answer(raw)
        except ValueError:
            return PrefillLost(action.leg, Fault.MALFORMED)
        return PrefillAnswered(action.leg, answer.ticket, answer.cached_tokens)

    def _leg_headers(self, leg: int) -> Headers:
        if self.trace is None:
            return self._call.headers
        return self.trace.leg_headers(self._call.headers, self.handoff.legs[leg])

    async def _decode(self, action: SendDecode) -> None:
        has_head = False
        try:
            async with await self._tools.client.request(
                self._call.method,
                self._tools.engine,
                self._call.target,
                headers=self._leg_headers(action.leg),
                body=self._decode_body(action),
                head_timeout_s=self._longest_wait_s(),
            ) as response:
                has_head = True
                if not 200 <= response.status < 300:
                    raw = await response.read_all(
                        timeout_s=self._longest_wait_s(), bytes_max=_ERROR_BODY_BYTES_MAX
                    )
                    self._answers[action.leg] = _Answer(response.status, response.headers, raw)
                    self._events.put_nowait(DecodeRejected(action.leg, response.status))
                    return
                await self._serve_output(action, response)
        except WireError as error:
            self._events.put_nowait(DecodeLost(action.leg, _fault(error, has_head=has_head)))

    async def _serve_output(self, action: SendDecode, response: Response) -> None:
        is_split = action.ticket is not None or action.peer is not None
        # A colocated stream is the engine's word from its first byte on, keep-alive comments included.
        opening = Opening((is_split and response.header(b"content-type")) or b"")
        seen = Seen.NOTHING
        has_ended = False
        while seen is Seen.NOTHING and not has_ended:
            chunk = await response.read_chunk(idle_timeout_s=self._longest_wait_s())
            has_ended = not chunk
            seen = opening.end() if has_ended else opening.feed(chunk)
        if is_split and seen is Seen.NOTHING:
            self._events.put_nowait(DecodeLost(action.leg, Fault.LOST_IN_BODY))
            return
        self._events.put_nowait(DecodeOpened(action.leg, is_error=seen is Seen.ERROR))
        await self._committed.wait()  # The machine's deadline bounds it: it cancels this task.
        await self._relay(response, bytes(opening.held), has_ended=has_ended)
        self._events.put_nowait(DecodeEnded(action.leg))

    # Relaying.

    async def _relay(self, response: Response, held: bytes, *, has_ended: bool) -> None:
        content_type = response.header(b"content-type") or b""
        self._is_event_stream = content_type.lower().startswith(b"text/event-stream")
        rewriter = self._rewriter()
        if rewriter is not None and not self._is_event_stream:
            await self._relay_rewritten(response, held, rewriter)
            return
        send = self._send
        headers = self._our_headers(for_client(end_to_end(response.headers)))
        if rewriter is not None:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
            held = rewriter.feed(held)
        self.status = response.status
        await send_head(send, response.status, headers)
        await send({"type": "http.response.body", "body": held, "more_body": True})
        self._held = held
        if not has_ended:
            await self._relay_chunks(response, None if rewriter is None else rewriter.feed)
        rest = b"" if rewriter is None else rewriter.finish()
        await send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _relay_chunks(self, response: Response, change: Change | None) -> None:
        self._relayed = response
        self._seen_count = response.part_count
        idle_timeout_s = self._order.idle_deadline_s * 2 + _BACKSTOP_S
        await relay_body(self._scope, self._send, response, idle_timeout_s=idle_timeout_s, change=change)

    async def _relay_rewritten(self, response: Response, held: bytes, rewriter: UsageRewriter) -> None:
        """Send an answer in one piece whose length may change."""
        rest = await response.read_all(timeout_s=self._order.idle_deadline_s, bytes_max=_ANSWER_BYTES_MAX)
        body = rewriter.feed(held + rest) + rewriter.finish()
        headers = for_client(end_to_end(response.headers))
        headers = [pair for pair in self._our_headers(headers) if pair[0] != b"content-length"]
        self.status = response.status
        await send_head(self._send, response.status, [*headers, (b"content-length", b"%d" % len(body))])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    def _rewriter(self) -> UsageRewriter | None:
        cached_tokens, body = self.handoff.cached_tokens, self._call.body
        if cached_tokens is None or body is None:
            return None
        return UsageRewriter(body.api.path, cached_tokens)

    # Bodies.

    def _prefill_body(self, action: SendPrefill) -> bytes:
        body = self._call.body
        assert body is not None, "only a generative call is split"
        match self._order.dialect:
            case DialectName.NIXLV2:
                return dialects.nixlv2_prefill(body)
            case DialectName.PDCOORD:
                return dialects.pdcoord_prefill(body, self._pairing(action.attempt))
            case DialectName.SGLANG:
                port, room = self._tools.bootstrap_port, self._room(action.attempt)
                return dialects.sglang_prefill(body, action.target, bootstrap_port=port, room=room)

    def _decode_body(self, action: SendDecode) -> bytes:
        body = self._call.body
        if body is None or (action.ticket is None and action.peer is None):
            return self._call.raw
        if action.ticket is not None:
            return dialects.nixlv2_decode(body, action.ticket)
        assert action.peer is not None
        if self._order.dialect is DialectName.PDCOORD:
            pairing, kv_port = self._pairing(action.attempt), self._tools.kv_port
            return dialects.pdcoord_decode(body, action.peer, pairing, kv_port=kv_port)
        port, room = self._tools.bootstrap_port, self._room(action.attempt)
        return dialects.sglang_decode(body, action.peer, bootstrap_port=port, room=room)

    def _room(self, attempt: int) -> int:
        """One room for both legs of an attempt, another for each attempt."""
        if attempt not in self._rooms:
            self._rooms[attempt] = self._tools.rng.randint(0, ROOM_MAX)
        return self._rooms[attempt]

    def _pairing(self, attempt: int) -> Pairing:
        """One transfer id and nonce for both legs of an attempt, others for each attempt."""
        if attempt not in self._pairings:
            draw = self._tools.rng.getrandbits
            transfer, nonce = (f"{draw(PAIRING_ID_BITS):032x}" for _ in range(2))
            self._pairings[attempt] = Pairing(transfer, nonce)
        return self._pairings[attempt]

    def _longest_wait_s(self) -> float:
        order = self._order
        split_s = order.prefill_deadline_s + order.transfer_deadline_s
        return max(order.answer_deadline_s, split_s) + _BACKSTOP_S


def _fault(error: WireError, *, has_head: bool) -> Fault:
    match error:
        case ConnectError():
            return Fault.UNREACHABLE
        case HeadTimeoutError():
            return Fault.TIMED_OUT
        case ResetError():
            return Fault.LOST_BEFORE_HEAD
        case BodyTooLargeError():
            return Fault.MALFORMED
        case _:
            return Fault.LOST_IN_BODY if has_head else Fault.MALFORMED
