"""Has a stream that broke off go on at another endpoint, on the same answer to the same client."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from pdcoord.core.events import DecodeFailed, Outcome, ResponseBegan, StreamBroke, StreamStalled
from pdcoord.core.plan import Plan
from pdcoord.core.refusals import stream_lost
from pdcoord.front import upstream as wires
from pdcoord.front.account import Account
from pdcoord.front.ports import Break, BreakOutcome, CallRecord, Limits, Relaying
from pdcoord.front.tracing import CallTrace
from pdcoord.gateway.streams import Answer, Fate, StreamWatch, is_plain_stream
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import Refusal, RefusedError, RungReason
from pdcoord.resume.continuation import Continuation, Finished, Unresumable
from pdcoord.wire.client import Client
from pdcoord.wire.errors import InvalidRequestError, StreamError, WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.response import Response

COUNT_PATH = "/tokenize"
_COUNT_BYTES_MAX = 16 << 20
_ENCODINGS = b"accept-encoding"


def reason_of(fate: Fate) -> RungReason:
    """Why an attempt is given up whose body came to this end."""
    return RungReason.DECODE_STALLED if fate is Fate.STALLED else RungReason.DECODE_ERROR


class _Count(msgspec.Struct):
    """What vLLM 0.32 answers at /tokenize; its token ids are not read."""

    count: int


_count_decoder = msgspec.json.Decoder(_Count)


@dataclass(frozen=True, slots=True)
class Means:
    """What streams of a process are continued with.

    Attributes:
        headers: those that a plan's request is sent with: of the plan, the client's own, the request's id.
    """

    coordination: Relaying
    upstream: Client
    limits: Limits
    clock: Callable[[], float]
    headers: Callable[[Plan, Headers, bytes], Headers]


@dataclass(frozen=True, slots=True)
class Call:
    """A client's call as its stream is continued.

    Attributes:
        path: of the API.
        headers: the client's.
        planned: the plan of a call that the core told to wait.
    """

    path: str
    headers: Headers
    record: CallRecord
    account: Account
    trace: CallTrace | None
    planned: Callable[[], Awaitable[Plan]]


class Resumer:
    """Continues one stream as often as it breaks off, within the core's bounds and `limits.attempts_max`."""

    def __init__(self, means: Means, call: Call, answer: Answer) -> None:
        self._means = means
        self._call = call
        self._answer = answer
        self._tried_count = 0

    def watch(self) -> StreamWatch:
        """Watches the stream for progress, wherever it comes from just then."""
        request_id, path, coordination = self._call.record.id, self._call.path, self._means.coordination
        return StreamWatch(
            idle_timeout_s=self._means.limits.stream_idle_s,
            silence_s_max=lambda: coordination.silence_s_max(request_id),
            continuation=lambda: self._answer.continuation(path),
            has_output=self._answer.has_output,
            stands_still=lambda: coordination.handle(StreamStalled(request_id)),
        )

    async def run(self, fate: Fate) -> None:
        """From how a body came to its end to the end of the answer."""
        while fate is not Fate.OVER:
            if fate is Fate.WHOLE and self.is_whole():
                self._call.record.outcome = Outcome.OK
                await self._answer.end()
                return
            fate = await self._go_on(fate)

    def is_whole(self) -> bool:
        """Whether a body that ended well is a stream that did; one that cannot be read is given the doubt."""
        if self._answer.seems_whole():
            return True
        return isinstance(self._answer.continuation(self._call.path), Unresumable)

    async def _go_on(self, fate: Fate) -> Fate:
        """Deal with one break: how the continuing body came to its end."""
        answer = self._answer
        answer.begin_again()
        found = answer.continuation(self._call.path)
        broke = self._note_break(fate, found)
        if isinstance(found, Finished):
            return await self._finish(found, broke)
        if isinstance(found, Unresumable) and answer.count_request(self._call.path) is None:
            broke.outcome, broke.why = BreakOutcome.UNRESUMABLE, found
            return await self._end_lost(stream_lost(found.value))
        try:
            return await self._continue(broke)
        except RefusedError as error:
            broke.outcome = BreakOutcome.REFUSED if broke.why is None else BreakOutcome.UNRESUMABLE
            return await self._end_lost(error.refusal)

    def _note_break(self, fate: Fate, found: Continuation | Finished | Unresumable) -> Break:
        record = self._call.record
        assert record.plan is not None, "a stream of a call without a plan"
        tokens = found.prompt_tokens_more if isinstance(found, Continuation) else None
        if tokens is None:
            tokens = self._answer.output_tokens() or 0
        broke = Break(reason_of(fate), record.plan.decode.id, tokens, self._means.clock())
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
            elif result in {Fate.BROKEN, Fate.STALLED}:
                attempt.error = reason_of(result)
            return result

    async def _send_to(self, plan: Plan, broke: Break, client_headers: Headers) -> Fate | RungReason:
        counted = await self._count(plan)
        context_tokens_max = plan.decode.pool.limits.context_tokens_max
        found = self._answer.continuation(self._call.path, counted, context_tokens_max)
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
                headers=self._headers(plan, client_headers),
                body=found.body,
                head_timeout_s=means.limits.head_timeout_s,
            )
        except InvalidRequestError as error:
            raise RefusedError(stream_lost(f"the request's {error}")) from error
        except WireError as error:
            return wires.failure_of_error(error)
        async with response:
            return await self._relay(response, found, broke)

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
            first = await response.read_chunk(idle_timeout_s=means.limits.head_timeout_s)
        except StreamError:
            return RungReason.DECODE_ERROR
        means.coordination.handle(ResponseBegan(record.id, wires.served_of(response.header(names.SERVED))))
        broke.outcome = BreakOutcome.CONTINUED
        broke.gap_s = means.clock() - broke.noticed_s
        return await self._answer.relay(response, first, self.watch(), splice=found.splice)

    def _headers(self, plan: Plan, client_headers: Headers) -> Headers:
        """The client's, without what it takes in place of plain text: the head it has says that this is."""
        sent = self._means.headers(plan, client_headers, self._call.record.id.encode())
        return [pair for pair in sent if pair[0] != _ENCODINGS]

    async def _count(self, plan: Plan) -> int | None:
        """Tokens of the text so far, as an engine counts them; None where it need not, or does not say."""
        body = self._answer.count_request(self._call.path)
        if body is None:
            return None
        timeout_s = self._means.limits.count_timeout_s
        try:
            response = await self._means.upstream.request(
                "POST",
                plan.decode.address,
                COUNT_PATH,
                headers=self._headers(plan, self._call.headers),
                body=body,
                head_timeout_s=timeout_s,
            )
            async with response:
                raw = await response.read_all(timeout_s=timeout_s, bytes_max=_COUNT_BYTES_MAX)
                return _count_decoder.decode(raw).count if response.status == 200 else None
        except (WireError, msgspec.DecodeError, UnicodeDecodeError):
            return None

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
