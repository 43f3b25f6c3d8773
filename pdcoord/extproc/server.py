"""The gRPC server that Envoy asks: one task per call, from its first message to the end of its response."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

import grpc
from grpc import aio

from pdcoord.extproc.calls import PickedCall, Picker
from pdcoord.extproc.codec import UnknownMessageError, decode, encode
from pdcoord.extproc.stream import Stream
from pdcoord.extproc.vocabulary import (
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    Ask,
    Began,
    Closed,
    End,
    Ended,
    Event,
    Failed,
    Immediate,
    Moved,
    RequestBody,
    RequestHead,
    ResponseBody,
    ResponseHead,
    TimedOut,
)
from pdcoord.front.answers import internal_error
from pdcoord.protocol.errors import RETRY_AFTER_S, Refusal, RefuseReason

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LAST_WORDS_S_MAX = 5.0
"""How long the end of a stream may take to be sent, once what bounded the stream is over."""


class Meter(Protocol):
    """Counts what only this front has."""

    def stream_began(self) -> None: ...

    def stream_ended(self, request_bytes: int, response_bytes: int) -> None:
        """With the bytes of bodies that came."""
        ...

    def answered(self, reason: RefuseReason) -> None:
        """A client was answered at once."""
        ...

    def violated(self) -> None:
        """Envoy did what the protocol forbids, or did not end."""
        ...


class Processor:
    """Serves ExternalProcessor.Process."""

    def __init__(self, picker: Picker, meter: Meter) -> None:
        self.picker = picker
        self.meter = meter
        self._open: set[_Exchange] = set()

    def end_all(self) -> None:
        """End every stream that is open: calls with a route go on without us, the others are refused."""
        for exchange in self._open:
            exchange.cut()

    def handler(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`; messages come and go as bytes."""
        process: Any = grpc.stream_stream_rpc_method_handler(cast("Any", self.process))
        return grpc.method_handlers_generic_handler(SERVICE, {"Process": process})

    async def process(self, _requests: object, context: aio.ServicerContext[bytes, bytes]) -> None:
        """Serve one stream."""
        self.meter.stream_began()
        exchange = _Exchange(self, context)
        self._open.add(exchange)
        try:
            await exchange.run()
        except asyncio.CancelledError:
            # gRPC's own task ends here, and gRPC would log this as an error of ours.
            if not context.cancelled():
                raise
        finally:
            self._open.discard(exchange)
            exchange.close()
            self.meter.stream_ended(exchange.request_bytes, exchange.response_bytes)


class _Exchange:
    """One stream while it is served."""

    __slots__ = (
        "_bound",
        "_call",
        "_context",
        "_is_answered",
        "_is_cut",
        "_processor",
        "_stream",
        "request_bytes",
        "response_bytes",
    )

    def __init__(self, processor: Processor, context: aio.ServicerContext[bytes, bytes]) -> None:
        limits = processor.picker.limits
        self._processor = processor
        self._context = context
        self._stream = Stream(
            body_bytes_max=limits.body_bytes_max,
            body_timeout_s=limits.body_timeout_s,
            room=processor.picker.bodies,
        )
        self._call: PickedCall | None = None
        self._bound: asyncio.Timeout | None = None
        self._is_answered = False
        self._is_cut = False
        self.request_bytes = 0
        self.response_bytes = 0

    async def run(self) -> None:
        """Until Envoy, the machine or a deadline ends the stream."""
        limits = self._processor.picker.limits
        code = grpc.StatusCode.INVALID_ARGUMENT
        try:
            try:
                async with asyncio.timeout(limits.body_timeout_s) as self._bound:
                    await self._serve()
            except TimeoutError:
                code = grpc.StatusCode.DEADLINE_EXCEEDED
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORDS_S_MAX):
                        await self._end_early()
        except (UnknownMessageError, _ViolatedError) as error:
            self._processor.meter.violated()
            await self._abort(code, str(error))
        except (aio.UsageError, aio.InternalError) as error:
            await self._crash(error)
        except aio.BaseError:
            raise  # Our own abort, or the server has stopped: gRPC ends the stream.
        except Exception as error:  # noqa: BLE001  # A defect must not reach the client as a stack trace.
            await self._crash(error)

    def cut(self) -> None:
        """Have the stream end at once."""
        self._is_cut = True
        self._rebound(0.0)

    async def _end_early(self) -> None:
        stream = self._stream
        if not self._is_cut:
            await self._handle(TimedOut())
        elif not stream.is_routed and not self._is_answered:
            message = "The picker is stopping and could not wait for this call's turn; send it again."
            refusal = Refusal(RefuseReason.DRAINING, message, retry_after_s=RETRY_AFTER_S)
            await self._do(Immediate(refusal))

    def close(self) -> None:
        """Settle the accounts, whatever ended the stream; nothing can be sent any more."""
        self._stream.let_go()
        call = self._call
        if call is None:
            return
        for action in self._stream.handle(Closed()):
            if isinstance(action, Moved | Began | Failed | Ended):
                call.tell(action)
        call.answered(self._stream.status)
        call.close()

    async def _serve(self) -> None:
        stream = self._stream
        asked: PickedCall | None = None
        while True:
            if asked is None:
                message = await self._read()
            else:
                message = await self._ask_on(asked)
                if stream.is_over:
                    return
            event = _event(message)
            asked = await self._handle(event)
            if stream.is_over:
                return
            del message, event  # A body would be kept until the next one comes.

    async def _read(self) -> object:
        return await self._context.read()

    async def _ask_on(self, call: PickedCall) -> object:
        """Wait for a plan and for the next message at a time: Envoy may leave, or answer by itself."""
        stream = self._stream
        try:
            async with asyncio.TaskGroup() as group:
                deciding = group.create_task(call.ask_on())
                reading = group.create_task(self._read())
                while stream.is_asking:
                    await asyncio.wait((deciding, reading), return_when=asyncio.FIRST_COMPLETED)
                    if deciding.done():
                        await self._handle(deciding.result())
                    else:
                        await self._handle(_event(reading.result()))
                        if not stream.is_over:
                            reading = group.create_task(self._read())
                deciding.cancel()
                del deciding  # It has the route, and with it a body.
                if stream.is_over:
                    reading.cancel()
        except ExceptionGroup as errors:
            # Whether it was Envoy's fault or ours is told apart by what was raised, not by where.
            raise errors.exceptions[0] from None
        return None if stream.is_over else reading.result()

    async def _handle(self, event: Event) -> PickedCall | None:
        """Do what the machine says; the call whose plan takes a while, if it does."""
        match event:
            case ResponseBody(data):
                self.response_bytes += len(data)
            case RequestBody(data):
                self.request_bytes += len(data)
            case RequestHead() if self._call is None:
                self._call = self._processor.picker.open(event)
                event = replace(event, refusal=self._call.barred)
            case ResponseHead() if self._call is None:
                self._rebound(self._processor.picker.limits.request_deadline_s)
            case _:
                pass
        waiting: PickedCall | None = None
        for action in self._stream.handle(event):
            if isinstance(action, AnswerBody | AnswerHead | AnswerTrailers):
                await self._context.write(encode(action))
            else:
                waiting = await self._do(action) or waiting
        if not (self._stream.is_reading or self._stream.is_asking):
            self._stream.let_go()
        return waiting

    async def _do(self, action: Ask | Immediate | Moved | Began | Failed | Ended | End) -> PickedCall | None:
        call = self._call
        match action:
            case Ask(head, body):
                assert call is not None, "asked without a head"
                self._rebound(self._processor.picker.limits.request_deadline_s)
                asked = call.ask(head, body)
                if asked is None:
                    return call
                await self._handle(asked)
            case Immediate(refusal):
                if call is not None:
                    call.refused(refusal)
                self._is_answered = True
                self._processor.meter.answered(refusal.reason)
                await self._context.write(encode(action, call.record.path if call is not None else ""))
            case End(violation):
                if violation and not self._is_answered:
                    raise _ViolatedError(violation)
                if violation:
                    self._processor.meter.violated()
            case Moved() | Began() | Failed() | Ended():
                assert call is not None, "an account without a head"
                call.tell(action)
        return None

    def _rebound(self, wait_s: float) -> None:
        """The body has come; what bounds the stream from now on is the call's own deadline."""
        if self._bound is not None and not self._bound.expired():
            self._bound.reschedule(asyncio.get_running_loop().time() + wait_s)

    async def _crash(self, error: Exception) -> None:
        picker, call = self._processor.picker, self._call
        picker.observer.crashed(error, call.record.id if call is not None else "")
        if call is not None and not self._stream.is_routed and not self._is_answered:
            call.refused(internal_error())
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S_MAX):
                    await self._context.write(encode(Immediate(internal_error())))
            return
        await self._abort(grpc.StatusCode.INTERNAL, "pdcoord failed on this stream; its log has the cause")

    async def _abort(self, code: grpc.StatusCode, why: str) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S_MAX):
                await self._context.abort(code, why)


class _ViolatedError(Exception):
    """Envoy did what the protocol forbids, or did not end in time."""


def _event(message: object) -> Event:
    """A message as it was read; the end of the stream is one too."""
    return Closed() if message is aio.EOF else decode(cast("bytes", message))
