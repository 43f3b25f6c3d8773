"""Asks for the rest of a stream that its engine lost: of another decode endpoint, or of the own engine."""

import asyncio
from dataclasses import dataclass

import msgspec

from pdcoord.protocol.headers import PLAN, HostPort
from pdcoord.protocol.plans import DialectName, PlanHeader, encode_plan
from pdcoord.protocol.signing import Steering
from pdcoord.resume.continuation import Continuation, Finished, Unresumable
from pdcoord.resume.tape import Tape
from pdcoord.wire.client import Client, Response
from pdcoord.wire.errors import ResetError, WireError
from pdcoord.wire.reading import Known
from pdcoord.wire.tokenizing import Tokenizer
from sidecar.guard import Headers
from sidecar.handoff import OVERLOAD_STATUSES
from sidecar.tools import Call, Tools
from sidecar.vocabulary import Order, SendContinuation

HEALTH_S_MAX = 2.0
HEALTH_PAUSE_S = 0.25
"""Between two questions to the own engine, which may be starting again, or full."""
_ENCODINGS = b"accept-encoding"
TOKENIZE_S_MAX = 2.0
"""For each question of what an engine makes of a text or a chat; most take it some milliseconds."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """What one stream needs to be continued.

    Args:
        tape: what was passed on to the client so far.
    """

    tools: Tools
    call: Call
    order: Order
    tape: Tape

    async def rest(self, target: HostPort) -> Continuation | Finished | Unresumable:
        """What to send so that the stream goes on, or how it ends.

        Raises:
            WireError: if the target cannot be asked what only it knows, or cannot answer now.
        """
        if not self.tape.is_whole:
            return Unresumable.TAPE_FULL
        self.tape.begin_again()
        call = self.call
        path = call.body.api.path if call.body is not None else call.target
        known = Known(appends_itself=self.order.dialect is DialectName.SGLANG)
        reading = await self.tools.readers.read(path, self.tape, known=known)
        found, counted = reading.found, None
        headers = [pair for pair in call.headers if pair[0] != _ENCODINGS]  # The answer is for us.
        tokenizer = Tokenizer(self.tools.client, target, headers, TOKENIZE_S_MAX)
        if isinstance(found, Continuation) and found.proof is not None:
            proved = await tokenizer.prove(found)
            if proved.status >= 500 or proved.status in OVERLOAD_STATUSES:
                raise ResetError(f"{target} answered {proved.status} when it was asked to tokenize")
            if not proved.is_proved:
                return Unresumable.TEMPLATE
            counted = proved.counted_tokens
        elif reading.count_body is not None:
            counted = await tokenizer.count(reading.count_body)
        if reading.count_body is None or counted is None:
            return found
        again = await self.tools.readers.read(path, self.tape, counted_tokens=counted, known=known)
        return again.found

    async def send(self, action: SendContinuation, rest: Continuation, headers: Headers) -> Response:
        """Send a continuation; the response's head has come.

        The own engine is the last to be asked, so it is asked until it has room; whoever calls bounds that.

        Raises:
            WireError: as the client does.
        """
        response = await self._send(action, rest, headers)
        while response.status in OVERLOAD_STATUSES and action.target == self.order.engine:
            await response.aclose()
            await asyncio.sleep(HEALTH_PAUSE_S)
            response = await self._send(action, rest, headers)
        return response

    async def _send(self, action: SendContinuation, rest: Continuation, headers: Headers) -> Response:
        order = self.order
        if action.target != order.engine:
            plan = encode_plan(self._plan(action))
            what = Steering(b"POST", rest.path.encode("latin-1"), self.call.request_id, plan=plan)
            signature = self.tools.signed(what)
            headers = [*headers, (PLAN, plan), *signature]
        return await self.tools.client.request(
            "POST",
            action.target,
            rest.path,
            headers=headers,
            body=rest.body,
            head_timeout_s=order.idle_deadline_s,
        )

    def _plan(self, action: SendContinuation) -> PlanHeader:
        """What the sidecar at the other end is to do: answer, and leave what breaks off to us."""
        order, load = self.order, self.call.load
        return PlanHeader(
            prefills=(action.prefill,) if action.prefill is not None else (),
            dialect=order.dialect,
            # SGLang's decode engines refuse a call without a rendezvous.
            is_colocated_allowed=order.dialect is not DialectName.SGLANG,
            prefill_deadline_ms=order.prefill_deadline_s * 1e3,
            transfer_deadline_ms=order.transfer_deadline_s * 1e3,
            # Who planned it has it in its ledger at the first endpoint, and hears of it at this one.
            load=None if load is None else msgspec.structs.replace(load, replica=""),
            is_resumed_above=True,
        )


async def until_well(client: Client, engine: HostPort) -> None:
    """Ask an engine for its health until it is well; whoever calls bounds the wait."""
    while not await _is_well(client, engine):  # noqa: ASYNC110  # another process has no event to wait for
        await asyncio.sleep(HEALTH_PAUSE_S)


async def _is_well(client: Client, engine: HostPort) -> bool:
    try:
        async with (
            asyncio.timeout(HEALTH_S_MAX),
            await client.request("GET", engine, "/health", head_timeout_s=HEALTH_S_MAX) as response,
        ):
            return response.status == 200
    except (WireError, TimeoutError):
        return False
