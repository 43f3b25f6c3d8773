"""One attempt at a call: it is sent where a plan says, until there is something for the client."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from pdcoord.core.plan import Plan
from pdcoord.front import upstream as wires
from pdcoord.front.ports import Limits
from pdcoord.front.tracing import AttemptTrace, CallTrace
from pdcoord.gateway.arrival import Arrival
from pdcoord.gateway.first import has_first_token, read_first
from pdcoord.gateway.held import Held, hold
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason, RungReason
from pdcoord.protocol.plans import ServedHeader
from pdcoord.wire.client import Client
from pdcoord.wire.errors import InvalidRequestError, StreamError, WireError
from pdcoord.wire.heads import Headers
from pdcoord.wire.response import Response

_OK = 200


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that ended before a byte reached the client."""

    reason: RungReason
    served: ServedHeader | None = None
    answer: Held | None = None


@dataclass(slots=True)
class Opened:
    """One attempt that has something for the client.

    Attributes:
        first: the first part of its body.
        held: an error of the engine's about the call itself, whole, in place of all that.
        stack: what must be left when the answer is over, its connection among it.
        trace: the attempt's span; None where nothing is traced.
        has_output: `first` has the first output, as of `ResponseBegan`: the head of an engine's stream, and
            events of some APIs, come before there is any. Not looked at where a sidecar says what it did.
    """

    plan: Plan
    response: Response
    served: ServedHeader | None
    first: bytes = b""
    held: Held | None = None
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    trace: AttemptTrace | None = None
    has_output: bool = field(init=False)

    def __post_init__(self) -> None:
        is_untold = self.served is None and self.held is None
        self.has_output = is_untold and has_first_token(self.response, self.first)

    async def close(self) -> None:
        """Nobody wants it."""
        await self.stack.aclose()


class Sender:
    """Sends calls to engines; one for the whole process.

    Args:
        sign: signs plans; None where they are not signed.
    """

    def __init__(self, upstream: Client, limits: Limits, sign: wires.Sign | None = None) -> None:
        self._upstream = upstream
        self._limits = limits
        self._sign = sign

    def headers(
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
            self._sign,
            is_resumed_above=is_kept,
            is_ended_above=is_lost,
        )

    async def open(self, call: Arrival, plan: Plan, trace: CallTrace | None) -> Opened | Failure:
        """Send a call to a plan's decode endpoint, and read until there is something for the client.

        Args:
            trace: the call's spans; None where nothing is traced.

        Raises:
            RefusedError: if the call cannot be put on the wire.
        """
        async with AsyncExitStack() as stack:
            headers, attempt = call.headers, None
            if trace is not None:
                attempt = stack.enter_context(trace.attempt(plan))
                headers = attempt.headers(headers)
            opened = await self._reach(call, plan, headers, stack)
            if isinstance(opened, Failure):
                if attempt is not None:
                    attempt.error = opened.reason
                return opened
            opened.trace, opened.stack = attempt, stack.pop_all()
            return opened

    async def _reach(
        self, call: Arrival, plan: Plan, headers: Headers, stack: AsyncExitStack
    ) -> Opened | Failure:
        limits, path = self._limits, call.api.path
        wait_s = limits.head_timeout_s if call.is_stream else limits.answer_timeout_s
        try:
            response = await self._send(call, plan, headers, wait_s)
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
            is_generated = call.api.is_generative and response.status == _OK
            first = await read_first(response, timeout_s=wait_s, is_generated=is_generated)
        except StreamError:
            return Failure(RungReason.DECODE_ERROR, served)
        return Opened(plan, response, served, first)

    async def _send(self, call: Arrival, plan: Plan, headers: Headers, wait_s: float) -> Response:
        request_id, target = plan.request_id.encode(), call.target
        is_kept = call.is_kept
        is_lost = call.is_continued and not is_kept
        try:
            return await self._upstream.request(
                "POST",
                plan.decode.address,
                target,
                headers=self.headers(plan, headers, request_id, target, is_kept=is_kept, is_lost=is_lost),
                body=call.body.raw,
                head_timeout_s=wait_s,
            )
        except InvalidRequestError as error:
            raise RefusedError(Refusal(RefuseReason.INVALID_FIELD, f"The call's {error}.")) from error
