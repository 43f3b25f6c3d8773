"""Asks for the rest of a stream that its engine lost: of another decode endpoint, or of the own engine."""

import asyncio
from dataclasses import dataclass

import msgspec

from pdcoord.protocol.headers import PLAN, HostPort
from pdcoord.protocol.plans import DialectName, PlanHeader, encode_plan
from pdcoord.protocol.signing import Steering
from pdcoord.resume.continuation import (
    Continuation,
    Finished,
    Unresumable,
    continue_stream,
    count_request,
)
from pdcoord.resume.tape import Tape
from pdcoord.wire.client import Client, Response
from pdcoord.wire.errors import BodyTooLargeError, WireError
from sidecar.guard import Headers
from sidecar.handoff import OVERLOAD_STATUSES
from sidecar.tools import Call, Tools
from sidecar.vocabulary import Order, SendContinuation

HEALTH_S_MAX = 2.0
HEALTH_PAUSE_S = 0.25
"""Between two questions to the own engine, which may be starting again, or full."""
COUNT_S_MAX = 2.0
"""For the text's tokens to be counted, where only that tells how many may still be generated."""
_COUNT_BYTES_MAX = 16 << 20
_TOKENIZE = "/tokenize"


class _Counted(msgspec.Struct):
    """What vLLM 0.32 answers to POST /tokenize, as far as it is read."""

    count: int


_count_decoder = msgspec.json.Decoder(_Counted)


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
        """What to send so that the stream goes on, or how it ends."""
        if not self.tape.is_whole:
            return Unresumable.TAPE_FULL
        self.tape.begin_again()
        call, passed = self.call, self.tape.passed
        path = call.body.api.path if call.body is not None else call.target
        counted = None
        asked = count_request(path, call.raw, passed)
        if asked is not None:
            counted = await count_tokens(self.tools.client, target, call.headers, asked)
        return continue_stream(path, call.raw, passed, counted_tokens=counted)

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


async def count_tokens(client: Client, target: HostPort, headers: Headers, body: bytes) -> int | None:
    """How many tokens an engine makes of a text; None if it does not say."""
    try:
        async with (
            asyncio.timeout(COUNT_S_MAX),
            await client.request(
                "POST", target, _TOKENIZE, headers=headers, body=body, head_timeout_s=COUNT_S_MAX
            ) as response,
        ):
            raw = await response.read_all(timeout_s=COUNT_S_MAX, bytes_max=_COUNT_BYTES_MAX)
            return _count_decoder.decode(raw).count if response.status == 200 else None
    except (WireError, BodyTooLargeError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError):
        return None
