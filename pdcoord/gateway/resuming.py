"""Has a stream that broke off go on at another endpoint, on the same answer to the same client."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from pdcoord.core.events import DecodeFailed, Outcome, ResponseBegan, StreamBroke, StreamStalled
from pdcoord.core.fleet import EngineKind
from pdcoord.core.plan import Plan
from pdcoord.core.progress import LATE_FACTOR, LATE_S_MIN, LATE_SPREADS
from pdcoord.core.refusals import stream_lost
from pdcoord.front import upstream as wires
from pdcoord.front.account import Account
from pdcoord.front.ports import Break, BreakOutcome, CallRecord, Limits, Relaying
from pdcoord.front.tracing import CallTrace
from pdcoord.gateway.first import has_first_token, read_first
from pdcoord.gateway.streams import Answer, Fate, StreamWatch
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import Refusal, RefusedError, RungReason
from pdcoord.resume.continuation import Continuation, Finished, Unresumable
from pdcoord.wire.client import Client
from pdcoord.wire.errors import InvalidRequestError, StreamError, WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.reading import NOTHING_KNOWN, Known, Readers, Reading
from pdcoord.wire.response import Response, is_plain_stream
from pdcoord.wire.tokenizing import Tokenizer

_ENCODINGS = b"accept-encoding"
_AUTHORIZATION = b"authorization"
_JSON = (b"content-type", b"application/json")
FIRST_FACTOR = 4.0
"""A first token behind an event without one is waited for so many times longer than it takes to be late: the
prompt is computed meanwhile, and whoever waits for it elsewhere begins anew."""
_IN_DOUBT = frozenset({Unresumable.UNREADABLE, Unresumable.API, Unresumable.TAPE_FULL})


_REASONS = {Fate.STALLED: RungReason.DECODE_STALLED, Fate.DIVERGED: RungReason.DECODE_DIVERGED}


@dataclass(frozen=True, slots=True)
class Means:
    """What streams of a process are continued with.

    Attributes:
        headers: those that a plan's request is sent with: of the plan, the client's own, the request's id
            and the target.
        readers: read the streams that broke off.
    """

    coordination: Relaying
    upstream: Client
    limits: Limits
    clock: Callable[[], float]
    headers: Callable[[Plan, Headers, bytes, str], Headers]
    readers: Readers = field(default_factory=Readers)


@dataclass(frozen=True, slots=True)
class Call:
    """A client's call as its stream is continued.

    Attributes:
        path: of the API.
        headers: the client's.
        planned: the plan of a call that the core told to wait.
        group: where what is found out meanwhile runs; ends no later than the call.
    """

    path: str
    headers: Headers
    record: CallRecord
    account: Account
    trace: CallTrace | None
    planned: Callable[[], Awaitable[Plan]]
    group: asyncio.TaskGroup


class Resumer:
    """Continues one stream as often as it breaks off, within the core's bounds and `limits.attempts_max`."""

    def __init__(self, means: Means, call: Call, answer: Answer) -> None:
        self._means = means
        self._call = call
        self._answer = answer
        self._tried_count = 0
        self._read_last: Reading | None = None

    def watch(self) -> StreamWatch:
        """Watches the stream for progress, wherever it comes from just then."""
        request_id, coordination = self._call.record.id, self._means.coordination
        return StreamWatch(
            idle_timeout_s=self._means.limits.stream_idle_s,
            silence_s_max=lambda: coordination.silence_s_max(request_id),
            first_s_max=self._first_s_max,
            find_out=lambda: self._call.group.create_task(self._could_go_on()),
            has_output=self._answer.has_output,
            stands_still=lambda: coordination.handle(StreamStalled(request_id)),
        )

    def reason_of(self, fate: Fate) -> RungReason:
        """Why an attempt is given up whose body came to this end."""
        reason = _REASONS.get(fate, RungReason.DECODE_ERROR)
        return self._means.coordination.blamed(self._call.record.id, reason)

    async def run(self, fate: Fate) -> None:
        """From how a body came to its end to the end of the answer."""
        while fate is not Fate.OVER:
            if fate is Fate.WHOLE and await self.is_whole():
                self._call.record.outcome = Outcome.OK
                await self._answer.end()
                return
            fate = await self._go_on(fate)

    async def is_whole(self) -> bool:
        """Whether a body that ended well is a stream that did; one that cannot be read is given the doubt."""
        if self._answer.seems_whole():
            return True
        found = (await self._read()).found
        return isinstance(found, Unresumable) and found in _IN_DOUBT

    async def _could_go_on(self) -> bool:
        return not isinstance((await self._read()).found, Unresumable)

    def _first_s_max(self) -> float:
        """How long a stream may be without its first token, beyond what it may be without any other."""
        plan = self._call.record.plan
        assert plan is not None, "a stream of a call without a plan"
        figures = plan.chosen.figures
        return FIRST_FACTOR * max(LATE_S_MIN, LATE_FACTOR * figures.ttft_s + LATE_SPREADS * figures.spread_s)

    async def _read(self, plan: Plan | None = None, counted_tokens: int | None = None) -> Reading:
        """What can be done about what the client was given so far; read once unless more is known.

        Args:
            plan: of the endpoint that it would go to; without it that is taken to be as the last one.
        """
        tape, why = self._answer.tape, self._answer.why_unreadable()
        if tape is None or why is not None:
            return Reading(why or Unresumable.API)
        plan = plan or self._call.record.plan
        known = NOTHING_KNOWN if plan is None else _known_of(plan)
        last = self._read_last
        is_same = last is not None and last.known == known
        if last is not None and is_same and counted_tokens is None and last.passed_bytes == len(tape.passed):
            return last
        reading = await self._means.readers.read(
            self._call.path, tape, counted_tokens=counted_tokens, known=known
        )
        if counted_tokens is None:
            self._read_last = reading
        return reading

    async def _go_on(self, fate: Fate) -> Fate:
        """Deal with one break: how the continuing body came to its end."""
        noticed_s = self._means.clock()
        self._answer.begin_again()
        found = (await self._read()).found
        broke = self._note_break(fate, found, noticed_s)
        if isinstance(found, Finished):
            return await self._finish(found, broke)
        if isinstance(found, Unresumable):
            broke.outcome, broke.why = BreakOutcome.UNRESUMABLE, found
            return await self._end_lost(stream_lost(found.value))
        try:
            return await self._continue(broke)
        except RefusedError as error:
            broke.outcome = BreakOutcome.REFUSED if broke.why is None else BreakOutcome.UNRESUMABLE
            return await self._end_lost(error.refusal)

    def _note_break(
        self, fate: Fate, found: Continuation | Finished | Unresumable, noticed_s: float
    ) -> Break:
        record = self._call.record
        assert record.plan is not None, "a stream of a call without a plan"
        tokens = found.prompt_tokens_more if isinstance(found, Continuation) else None
        if tokens is None:
            tokens = self._answer.output_tokens() or 0
        reason = self.reason_of(fate)
        broke = Break(reason, record.plan.decode.id, tokens, noticed_s)
        record.breaks = (*record.breaks, broke)
        return broke

    async def _continue(self, broke: Break) -> Fate:
        """Try other endpoints until one goes on; how its body came to its end.

        Raises:
            RefusedError: if none does.
        """
        record = self._call.record
        event: StreamBroke | DecodeFailed = StreamBroke(record.id, broke.reason, broke.output_tokens)
        while self._tried_count < self._means.limits.attempts_max:
            self._tried_count += 1
            plan = self._call.account.ask(event) or await self._call.planned()
            result = await self._attempt(plan, broke)
            if not isinstance(result, RungReason):
                return result
            record.failures += (result,)
            event = DecodeFailed(record.id, result)
        raise RefusedError(stream_lost(f"{self._tried_count} endpoints failed to"))

    async def _attempt(self, plan: Plan, broke: Break) -> Fate | RungReason:
        """Send what is left to one endpoint: how its body came to its end, or why it never began."""
        trace = self._call.trace
        if trace is None:
            return await self._send_to(plan, broke, self._call.headers)
        with trace.attempt(plan) as attempt:
            result = await self._send_to(plan, broke, attempt.headers(self._call.headers))
            if isinstance(result, RungReason):
                attempt.error = result
            elif result in {Fate.BROKEN, Fate.STALLED, Fate.DIVERGED}:
                attempt.error = self.reason_of(result)
            return result

    async def _send_to(self, plan: Plan, broke: Break, client_headers: Headers) -> Fate | RungReason:
        found = await self._found_for(plan)
        if isinstance(found, RungReason):
            return found
        if isinstance(found, Unresumable):
            broke.why = found
            raise RefusedError(stream_lost(found.value))
        if isinstance(found, Finished):
            return await self._finish(found, broke)
        means = self._means
        try:
            response = await means.upstream.request(
                "POST",
                plan.decode.address,
                found.path,
                headers=self._headers(plan, client_headers, found.path),
                body=found.body,
                head_timeout_s=means.limits.head_timeout_s,
            )
        except InvalidRequestError as error:
            raise RefusedError(stream_lost(f"the request's {error}")) from error
        except WireError as error:
            return wires.failure_of_error(error)
        async with response:
            return await self._relay(response, found, broke)

    async def _found_for(self, plan: Plan) -> Continuation | Finished | Unresumable | RungReason:
        """What to send to an endpoint, now that it has been asked what it alone knows; or why it failed."""
        reading = await self._read(plan)
        found, counted = reading.found, None
        tokenizer = Tokenizer(
            self._means.upstream,
            plan.decode.address,
            self._headers_for_questions(),
            self._means.limits.count_timeout_s,
        )
        if isinstance(found, Continuation) and found.proof is not None:
            try:
                proved = await tokenizer.prove(found)
            except WireError as error:
                return wires.failure_of_error(error)
            if not proved.is_proved:
                return wires.failure_of_answer(proved.status, proved.reason) or Unresumable.TEMPLATE
            counted = proved.counted_tokens
        elif reading.count_body is not None:
            counted = await tokenizer.count(reading.count_body)
        if reading.count_body is None or counted is None:
            return found
        return (await self._read(plan, counted)).found

    async def _relay(self, response: Response, found: Continuation, broke: Break) -> Fate | RungReason:
        means, record = self._means, self._call.record
        reason = wires.failure_of_answer(response.status, response.header(names.REASON))
        if reason is not None:
            return reason
        if response.status >= 400:
            raise RefusedError(stream_lost(f"the engine answered {response.status} to what was left of it"))
        if not is_plain_stream(response):
            return RungReason.DECODE_ERROR
        try:
            first = await read_first(response, timeout_s=means.limits.head_timeout_s)
        except StreamError:
            return RungReason.DECODE_ERROR
        served = wires.served_of(response.header(names.SERVED))
        has_output = served is None and has_first_token(response, first)
        means.coordination.handle(ResponseBegan(record.id, served, has_output=has_output))
        broke.outcome = BreakOutcome.CONTINUED
        broke.gap_s = means.clock() - broke.noticed_s
        self._read_last = None  # Its splice has joined one stream, of which the client may have seen nothing.
        return await self._answer.relay(response, first, self.watch(), splice=found.splice)

    def _headers(self, plan: Plan, client_headers: Headers, path: str) -> Headers:
        """The client's, without what it takes in place of plain text: the head it has says that this is."""
        sent = self._means.headers(plan, client_headers, self._call.record.id.encode(), path)
        return [pair for pair in sent if pair[0] != _ENCODINGS]

    def _headers_for_questions(self) -> Headers:
        """What the engine wants to know of who asks, which is its key, and whose call it is for.

        vLLM 0.32 answers 400 to a body that is not called JSON.
        """
        kept = [pair for pair in self._call.headers if pair[0] == _AUTHORIZATION]
        return [*kept, _JSON, (names.REQUEST_ID, self._call.record.id.encode())]

    async def _finish(self, found: Finished, broke: Break) -> Fate:
        broke.outcome = BreakOutcome.FINISHED
        self._call.record.outcome = Outcome.OK
        await self._answer.end(found.rest)
        return Fate.OVER

    async def _end_lost(self, refusal: Refusal) -> Fate:
        record = self._call.record
        record.outcome, record.reason = Outcome.UPSTREAM_ERROR, refusal.reason
        await self._answer.break_off(refusal)
        return Fate.OVER


def _known_of(plan: Plan) -> Known:
    pool = plan.decode.pool
    return Known(pool.limits.context_tokens_max, appends_itself=pool.engine is EngineKind.SGLANG)
