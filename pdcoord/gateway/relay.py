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
from pdcoord.core.hedging import may_have_second
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.front import upstream as wires
from pdcoord.front.account import Account
from pdcoord.front.answers import internal_error, too_many_calls
from pdcoord.front.intake import client_request_id
from pdcoord.front.ports import CallRecord, Observer
from pdcoord.front.tracing import CallTrace, begin_call
from pdcoord.gateway.arrival import CONTINUED_PATHS, Arrival, Door
from pdcoord.gateway.attempts import Failure, Opened, Sender
from pdcoord.gateway.hedging import Race
from pdcoord.gateway.held import Held
from pdcoord.gateway.replies import Reply
from pdcoord.gateway.resuming import Call, Means, Resumer
from pdcoord.gateway.streams import Answer, Fate
from pdcoord.protocol import headers as names
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefusedError, RefuseReason
from pdcoord.protocol.openai import Api
from pdcoord.resume.tape import Shelf, Tape
from pdcoord.resume.unresumable import Unresumable
from pdcoord.wire.asgi import ClientGoneError, Receive, Scope, Send, watch_disconnect
from pdcoord.wire.client import Client
from pdcoord.wire.response import Response, is_plain_stream
from pdcoord.wire.tracing import Tracing

_OK = 200
_OWN_ID_CUT = 80
"""What is kept of an id that needs a suffix, so that sidecars still take it over (128 bytes at most)."""


@dataclass(frozen=True, slots=True)
class _Broken:
    """One attempt whose stream broke off, or whose end is in doubt, and that may go on elsewhere."""

    fate: Fate
    resumer: Resumer


class Relay:
    """Serves calls of the API; one for the whole process.

    Args:
        door: what calls come in by.
        clock: monotonic seconds.
        new_id: makes a request id for calls that bring none, unique for all practical purposes.
        sign: signs plans; None where they are not signed.
        tracing: makes spans of calls; None where nothing is traced.
    """

    def __init__(
        self,
        *,
        door: Door,
        upstream: Client,
        observer: Observer,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        sign: wires.Sign | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.door = door
        self.coordination = door.coordination
        self.limits = limits = door.limits
        self.observer = observer
        self.clock = clock
        self.new_id = new_id
        self.tracing = tracing
        self.sender = Sender(upstream, limits, sign)
        self.shelf = Shelf(limits.resume_bytes_max, limits.resume_stream_bytes_max)
        self.means = Means(self.coordination, upstream, limits, clock, self.sender.headers)
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
        is_taken = shown_id in self._live or not may_have_second(shown_id)
        own_id = f"{shown_id[:_OWN_ID_CUT]}-{self.new_id()}" if is_taken else shown_id
        self._live.add(own_id)
        record = CallRecord(id=RequestId(own_id), path=api.path, began_s=self.clock())
        trace = begin_call(self.tracing, self.clock, scope["headers"], record)
        self.observer.call_began()
        try:
            await _Exchange(
                relay=self,
                receive=receive,
                record=record,
                account=Account(self.coordination, record),
                arrival=Arrival(self.door, api, scope, record),
                reply=Reply(scope, send, record, shown_id, clock=self.clock),
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
        trace: the call's spans; None where nothing is traced.
        group: where what is done for the call runs; None before it is sent on.
    """

    relay: Relay
    receive: Receive
    record: CallRecord
    account: Account
    arrival: Arrival
    reply: Reply
    trace: CallTrace | None
    group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Serve the call; whatever happens, the client gets one answer and the core one end."""
        try:
            async with asyncio.timeout(self.relay.limits.request_deadline_s):
                await self._serve_watched(await self._prepare())
        except RefusedError as error:
            await self.reply.refuse(error.refusal)
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
        """Read and check the call, and have it planned; None for a call that must wait for its plan."""
        if self.relay.live_count > self.relay.limits.live_max:
            raise RefusedError(too_many_calls())
        return self.account.ask(RequestArrived(await self.arrival.read(self.receive)))

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
                await self.reply.give(held)
                return
        message = f"{self.relay.limits.attempts_max} endpoints failed this request; retry later."
        raise RefusedError(Refusal(RefuseReason.LADDER_EXHAUSTED, message))

    async def _attempt(self, plan: Plan) -> Failure | _Broken | None:
        """Send the call to one decode endpoint, or two; None if its answer went to the client to its end."""
        assert self.group is not None, "an attempt outside its call"
        assert self.arrival.visa is not None, "an attempt at a call that was not let in"
        self.arrival.visa.sent(plan)
        opened = await Race(self.account, self._open, self.group).run(plan)
        if isinstance(opened, Failure):
            return opened
        async with opened.stack:
            began = ResponseBegan(self.record.id, opened.served, has_output=opened.has_output)
            self.relay.coordination.handle(began)
            decision = wires.decision_header(opened.plan, opened.served)
            self.record.served = opened.served
            if opened.held is not None:
                await self.reply.give(opened.held, (names.DECISION, decision))
                return None
            self.record.began_plan = self.record.plan
            broken = await self._relay(opened.response, opened.first, decision)
            if broken is not None and opened.trace is not None:
                opened.trace.error = broken.resumer.reason_of(broken.fate)
            return broken

    async def _open(self, plan: Plan) -> Opened | Failure:
        return await self.relay.sender.open(self.arrival, plan, self.trace)

    async def _relay(self, response: Response, first: bytes, decision: bytes) -> _Broken | None:
        """Pass an answer on as it comes; per part there is only what `relay_body` does."""
        arrival = self.arrival
        is_continued = arrival.is_continued and response.status == _OK and is_plain_stream(response)
        tape = Tape(self.relay.shelf, arrival.body.raw) if is_continued and arrival.is_kept else None
        why_not_kept = arrival.why_not_kept or Unresumable.API
        arrival.body.let_go()
        answer = await self.reply.begin(response, decision, tape=tape, why_not_kept=why_not_kept)
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
        path = self.arrival.api.path
        is_told = path in CONTINUED_PATHS and response.status == _OK and is_plain_stream(response)
        return is_told and not self.arrival.is_continued and not answer.seems_whole()

    def _as_call(self) -> Call:
        assert self.group is not None, "an answer outside its call"
        return Call(
            path=self.arrival.api.path,
            headers=self.arrival.headers,
            record=self.record,
            account=self.account,
            trace=self.trace,
            planned=self._planned,
            group=self.group,
        )

    async def _time_out(self) -> None:
        limit_s = self.relay.limits.request_deadline_s
        what = f"The answer was not complete after {limit_s:g} s"
        if not self.reply.has_begun:
            what = f"No answer within {limit_s:g} s"
        message = f"{what}; ask for less output at a time."
        await self.reply.stop(Refusal(RefuseReason.UPSTREAM_TIMEOUT, message))

    async def _cut(self) -> None:
        message = "The gateway is stopping and could not wait for this answer; send the call again."
        await self.reply.stop(Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S))

    async def _crash(self, error: Exception) -> None:
        self.relay.observer.crashed(error, self.record.id)
        await self.reply.stop(internal_error())

    def _end(self) -> None:
        self.arrival.body.let_go()
        self.reply.close()
        self.account.end(self.record.outcome, self.record.output_tokens)
        self.arrival.settle()
