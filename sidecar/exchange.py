"""Drives one request: does what the handoff machine orders and tells it what happened."""

import asyncio
from dataclasses import replace

from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason
from pdcoord.protocol.headers import REQUEST_ID, SERVED
from pdcoord.protocol.plans import encode_served
from pdcoord.protocol.tickets import decode_prefill_answer
from pdcoord.resume.continuation import Continuation, Finished
from pdcoord.resume.errors import DivergedError, TornError
from pdcoord.resume.failure import was_given_up
from pdcoord.resume.opening import OPENING_BYTES_MAX, Opening, Seen
from pdcoord.resume.tape import Tape
from pdcoord.wire.asgi import Receive, Scope, Send, watch_disconnect
from pdcoord.wire.errors import WireError
from pdcoord.wire.response import Response, is_event_stream, is_plain_stream
from sidecar.bodies import Bodies
from sidecar.guard import Headers
from sidecar.handoff import Handoff
from sidecar.outgoing import ANSWER_BYTES_MAX, Answer, Outgoing, Piece
from sidecar.passing import shows_output
from sidecar.reports import RequestReport
from sidecar.resuming import Resumption, until_well
from sidecar.tools import Call, Tools, fault_of
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
    GraceEnding,
    NotResumed,
    Order,
    OrphanLease,
    PassOn,
    PrefillAnswered,
    PrefillLost,
    PrefillRejected,
    Progressed,
    Refuse,
    SendContinuation,
    SendDecode,
    SendPrefill,
    State,
    Unresumed,
)

# The machine's deadlines come first; the wire's own are there in case this module fails to cancel.
_BACKSTOP_S = 5.0
_LOOKS_PER_IDLE = 4
# For the head and body of an answer of our own, or for an error event, to a client that may not be reading.
_LAST_WORDS_S = 10.0
_EVENTS_MAX = 64
_ERROR_BODY_BYTES_MAX = 8 << 20

_MESSAGES = {
    RefuseReason.LADDER_EXHAUSTED: "No prefill target could be used and the engine may not prefill itself",
    RefuseReason.UPSTREAM_TIMEOUT: "The engine did not answer in time",
    RefuseReason.UPSTREAM_FAILED: "The engine could not be reached or broke off",
    RefuseReason.STREAM_LOST: "The stream broke off and could not be continued",
    RefuseReason.DRAINING: "This pod is going away and could not wait for the answer",
}
# How a stream that broke off is called towards the client, whatever broke it.
_LOST = frozenset({RefuseReason.UPSTREAM_FAILED, RefuseReason.UPSTREAM_TIMEOUT})
_RETRIED_SOON = frozenset({RefuseReason.LADDER_EXHAUSTED, RefuseReason.DRAINING})


class Exchange:
    """One request on its way.

    Attributes:
        handoff: the machine; read it when `run` has returned.
        trace: the spans of a generative call; None where nothing is traced.
        report: what coordinators are told of it; None where nobody is.
    """

    def __init__(
        self, tools: Tools, call: Call, order: Order, *, scope: Scope, send: Send, receive: Receive
    ) -> None:
        self.handoff = Handoff(order)
        self.trace: HandoffTrace | None = None
        self.report: RequestReport | None = None
        if tools.tracing is not None and call.body is not None:
            path = call.body.api.path
            self.trace = begin_handoff(tools.tracing, tools.now_s, call.headers, path, call.request_id)
        self._tools = tools
        self._call = call
        self._order = order
        self._out = Outgoing(scope, send, idle_timeout_s=order.idle_deadline_s * 2 + _BACKSTOP_S)
        self._receive = receive
        self._events: asyncio.Queue[Event] = asyncio.Queue(_EVENTS_MAX)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._bodies = Bodies(
            call.raw,
            call.body,
            order.dialect,
            tools.rng,
            bootstrap_port=tools.bootstrap_port,
            kv_port=tools.kv_port,
        )
        self._answers: dict[int, Answer] = {}
        self._committed = asyncio.Event()
        self._progress_s = 0.0
        self._resumption: Resumption | None = None
        self._seen_count = 0

    @property
    def status(self) -> int | None:
        """The status that the client got; None if none was sent."""
        return self._out.status

    def end_grace(self, *, is_over: bool) -> None:
        """The process is about to end; whatever was not begun or can be left to others is."""
        if self.handoff.outcome is None and not self._events.full():
            self._events.put_nowait(GraceEnding(is_over))

    async def run(self) -> None:
        """Serve the request to its end; the client has its answer, or what there was of it."""
        try:
            await self._run()
        finally:
            if self._resumption is not None:
                self._resumption.tape.close()

    async def _run(self) -> None:
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
                until_s = min(deadline_s, self._tools.now_s() + self._look_s())
            try:
                async with asyncio.timeout(until_s and until_s - self._tools.now_s()):
                    return await self._events.get()
            except TimeoutError:
                has_progressed = self._look_at_progress()
                if has_progressed and handoff.is_output_due:
                    return Progressed(self._progress_s)
                if until_s != deadline_s or deadline_s is None:
                    continue
                progress_s = self._progress_s
                is_silent = progress_s + handoff.quiet_s <= deadline_s
                if handoff.state is not State.RELAYING or is_silent:
                    return DeadlinePassed()
                return Progressed(progress_s)

    def _look_s(self) -> float:
        """How long after one look at a stream's progress the next is due."""
        resume, quiet_s = self._order.resume, self.handoff.quiet_s
        return (quiet_s if resume is None else min(quiet_s, resume.stall_s)) / _LOOKS_PER_IDLE

    def _look_at_progress(self) -> bool:
        """Note the time of progress; whether there was any since the last look."""
        count = self._out.step_count
        # Nothing is known of an engine while the client does not take what it has given already.
        has_progressed = count != self._seen_count
        if has_progressed or self._out.is_held_up:
            self._seen_count = count
            self._progress_s = self._tools.now_s()
        return has_progressed

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
            case SendContinuation():
                self._committed.clear()
                before = list(self._tasks.values())
                self._tasks[action.leg] = group.create_task(self._continue(action, before))
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
                        await self._out.pass_on(self._answers[leg], self._our_headers())
                    case Refuse(reason):
                        await self._refuse(reason)
                    case BreakOff(reason) if self.status is None:
                        await self._refuse(reason)
                    case BreakOff(is_told=False):
                        pass  # That the connection ends unfinished is the word for it.
                    case BreakOff(reason, why=why):
                        refusal = self._refusal(reason, why)
                        if reason in _LOST:
                            refusal = replace(refusal, reason=RefuseReason.STREAM_LOST)
                        await self._out.break_off(refusal)
        except TimeoutError:
            return

    async def _refuse(self, reason: RefuseReason) -> None:
        self._tools.metrics.count("refusals", reason)
        await self._out.refuse(self._refusal(reason), self._our_headers())

    def _refusal(self, reason: RefuseReason, why: str = "") -> Refusal:
        rungs = self.handoff.rungs
        because = why or (str(rungs[-1].reason) if rungs else "")
        shown = f" ({because})" if because else ""
        retry_after_s = RETRY_AFTER_S if reason in _RETRIED_SOON else None
        return Refusal(reason, f"{_MESSAGES[reason]}{shown}; try again.", retry_after_s=retry_after_s)

    def _our_headers(self) -> Headers:
        headers = [(REQUEST_ID, self._call.request_id)]
        if self._call.body is not None:
            headers.append((SERVED, encode_served(self.handoff.served())))
        return headers

    # Legs. Each runs in a task of its own and ends by putting one event, or by being cancelled.

    async def _prefill(self, action: SendPrefill) -> None:
        self._events.put_nowait(await self._ask_prefill(action))

    async def _ask_prefill(self, action: SendPrefill) -> Event:
        timeout_s = self._order.prefill_deadline_s + _BACKSTOP_S
        marks = self._tools.prefill_headers(self._call.target, self._call.request_id)
        has_head = False
        try:
            async with await self._tools.client.request(
                "POST",
                action.target.address,
                self._call.target,
                headers=[*self._leg_headers(action.leg), *marks],
                body=self._bodies.prefill(action),
                head_timeout_s=timeout_s,
            ) as response:
                has_head = True
                raw = await response.read_all(timeout_s=timeout_s, bytes_max=ANSWER_BYTES_MAX)
        except WireError as error:
            return PrefillLost(action.leg, fault_of(error, has_head=has_head))
        if response.status != 200:
            self._answers[action.leg] = Answer(response.status, response.headers, raw)
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
                body=self._bodies.decode(action),
                head_timeout_s=self._longest_wait_s(),
            ) as response:
                has_head = True
                if not 200 <= response.status < 300:
                    raw = await response.read_all(
                        timeout_s=self._longest_wait_s(), bytes_max=_ERROR_BODY_BYTES_MAX
                    )
                    self._answers[action.leg] = Answer(response.status, response.headers, raw)
                    self._events.put_nowait(DecodeRejected(action.leg, response.status))
                    return
                await self._serve_output(action, response)
        except TornError:
            self._events.put_nowait(DecodeLost(action.leg, Fault.TORN))
        except WireError as error:
            self._events.put_nowait(DecodeLost(action.leg, fault_of(error, has_head=has_head)))

    async def _continue(self, action: SendContinuation, before: list[asyncio.Task[None]]) -> None:
        if any(not task.done() for task in before):
            await asyncio.wait(before)  # What one of them still passes on is what this one begins behind.
        resumption = self._resumption
        if resumption is None:
            self._events.put_nowait(Unresumed(action.leg, NotResumed.NO_STREAM))
            return
        try:
            if action.target == self._order.engine:
                await until_well(self._tools.client, action.target)
            rest = await resumption.rest(action.target)
            match rest:
                case Continuation():
                    await self._go_on(action, resumption, rest)
                case Finished(data):
                    await self._out.end(data)
                    self._events.put_nowait(DecodeEnded(action.leg))
                case why:
                    self._events.put_nowait(Unresumed(action.leg, why))
        except DivergedError:
            self._events.put_nowait(DecodeLost(action.leg, Fault.DIVERGED))
        except TornError:
            self._events.put_nowait(DecodeLost(action.leg, Fault.TORN))
        except WireError as error:
            self._events.put_nowait(DecodeLost(action.leg, fault_of(error, has_head=True)))

    async def _go_on(self, action: SendContinuation, resumption: Resumption, rest: Continuation) -> None:
        """Have a stream continued and pass the rest on."""
        async with await resumption.send(action, rest, self._leg_headers(action.leg)) as response:
            if response.status != 200:
                self._events.put_nowait(DecodeRejected(action.leg, response.status))
                return
            if not is_event_stream(response):
                self._events.put_nowait(DecodeLost(action.leg, Fault.MALFORMED))
                return
            # Held back until it is known whether it goes on; the client has had its head and its preamble.
            piece, seen = await self._first_output(response, is_read=True)
            if seen is Seen.NOTHING:
                self._events.put_nowait(DecodeLost(action.leg, Fault.LOST_IN_BODY))
                return
            self._events.put_nowait(DecodeOpened(action.leg, is_error=seen is Seen.ERROR))
            await self._committed.wait()
            await self._out.go_on(piece, rest.splice, self._rewriter(), resumption.tape)
            self._events.put_nowait(DecodeEnded(action.leg))

    async def _first_output(self, response: Response, *, is_read: bool) -> tuple[Piece, Seen]:
        """Read until the first output, or the first byte if the body is not to be read."""
        opening = Opening((is_read and response.header(b"content-type")) or b"")
        seen = Seen.NOTHING
        has_ended = False
        while seen is Seen.NOTHING and not has_ended:
            chunk = await response.read_chunk(idle_timeout_s=self._longest_wait_s())
            has_ended = not chunk
            seen = opening.end() if has_ended else opening.feed(chunk)
        return Piece(response, bytes(opening.held), has_ended), seen

    async def _whole(self, piece: Piece) -> Piece:
        """An answer in one piece comes at once, when it is generated; a very long one is left as it is."""
        held, has_ended = piece.held, piece.has_ended
        while not has_ended and len(held) < OPENING_BYTES_MAX:
            chunk = await piece.response.read_chunk(idle_timeout_s=self._order.idle_deadline_s)
            held, has_ended = held + chunk, not chunk
        return Piece(piece.response, held, has_ended)

    async def _serve_output(self, action: SendDecode, response: Response) -> None:
        is_split = action.ticket is not None or action.peer is not None
        # A colocated stream is the engine's word from its first byte on, keep-alive comments included.
        piece, seen = await self._first_output(response, is_read=is_split)
        if not self._order.is_stream and self._call.body is not None:
            piece = await self._whole(piece)
            if was_given_up(piece.held):
                self._events.put_nowait(DecodeLost(action.leg, Fault.TORN))
                return
        if is_split and seen is Seen.NOTHING:
            self._events.put_nowait(DecodeLost(action.leg, Fault.LOST_IN_BODY))
            return
        tape = self._tape(piece)
        is_output_due = tape is not None and not is_split and not shows_output(piece.held)
        self._events.put_nowait(
            DecodeOpened(action.leg, is_error=seen is Seen.ERROR, is_output_due=is_output_due)
        )
        await self._committed.wait()  # The machine's deadline bounds it: it cancels this task.
        await self._out.relay(piece, self._our_headers(), self._rewriter(), tape)
        self._events.put_nowait(DecodeEnded(action.leg))

    def _tape(self, piece: Piece) -> Tape | None:
        """Keeps a stream that may have to be continued; None for any other answer."""
        if self._order.resume is None or not is_plain_stream(piece.response):
            return None
        tape = Tape(self._tools.shelf, self._call.raw)
        self._resumption = Resumption(self._tools, self._call, self._order, tape)
        return tape

    def _rewriter(self) -> UsageRewriter | None:
        cached_tokens, body = self.handoff.cached_tokens, self._call.body
        if cached_tokens is None or body is None:
            return None
        return UsageRewriter(body.api.path, cached_tokens)

    def _longest_wait_s(self) -> float:
        order = self._order
        split_s = order.prefill_deadline_s + order.transfer_deadline_s
        return max(order.answer_deadline_s, split_s) + _BACKSTOP_S
