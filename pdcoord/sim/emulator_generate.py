"""A generating call from its prompts to its last event: what runs between the API and the engine."""

import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from pdcoord.core.fleet import EngineKind
from pdcoord.protocol.headers import parse_host_port
from pdcoord.sim import text
from pdcoord.sim.emulator_call import CallError, Generation
from pdcoord.sim.emulator_edge import SILENCE_S_MAX, reset, stall
from pdcoord.sim.emulator_host import Answer, EngineHost, Mailbox
from pdcoord.sim.emulator_shapes import (
    Choice,
    Shape,
    Usage,
    error_body,
)
from pdcoord.sim.faults import FaultKind
from pdcoord.sim.messages import (
    EngineRequest,
    FailReason,
    FinishReason,
    IssuedTicket,
    Rejected,
    RejectReason,
    RemoteTicket,
    RequestDone,
    RequestFailed,
    TokenOut,
)
from pdcoord.wire.asgi import Receive, Send, send_head, send_json

SERVED_BY = b"x-emulated-engine"
FAILURE = b"x-emulated-failure"
KV = b"x-emulated-kv"
_SILENT: dict[FaultKind | None, Callable[[Receive, Send], Coroutine[Any, Any, None]]] = {
    FaultKind.RESET: reset,
    FaultKind.STALL: lambda receive, _send: stall(receive),
}
"""How an answer breaks off without a word."""
_SSE = (b"content-type", b"text/event-stream; charset=utf-8")

_REJECTED: dict[RejectReason, tuple[int, str]] = {
    RejectReason.QUEUE_FULL: (503, "ServiceUnavailableError"),
    RejectReason.CONTEXT_TOO_LONG: (400, "BadRequestError"),
    RejectReason.EMPTY_PROMPT: (400, "BadRequestError"),
    RejectReason.ROOM_REQUIRED: (400, "BadRequestError"),
    RejectReason.ROOM_TAKEN: (400, "BadRequestError"),
    RejectReason.ID_IN_USE: (500, "InternalServerError"),
}


def refusal(refused: Rejected) -> CallError:
    """The error that an engine's refusal is answered with."""
    status, kind = _REJECTED[refused.reason]
    return CallError(status, kind, f"The request was not taken: {refused.message}.")


class AnswerFailedError(Exception):
    """The engine gave up on a request that it had taken."""

    def __init__(self, reason: FailReason | None) -> None:
        """None for a failure that was switched on."""
        super().__init__(f"the engine failed the request: {reason or 'it was told to'}")
        self.reason = reason


@dataclass(slots=True)
class _Part:
    """One choice with the request that computes it.

    Attributes:
        text: all the tokens so far; what follows a stop string is cut off.
        shown: characters of it that may be shown: the beginning of a stop string may be at its end.
    """

    choice: Choice
    request: EngineRequest
    text: str = ""
    shown: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Mishaps:
    """Failures that befall this call.

    Attributes:
        break_kind: one of BREAKS, which befalls the answer after `break_tokens`; None lets it end.
    """

    break_kind: FaultKind | None = None
    break_tokens: int = 0
    loses_ticket: bool = False
    expires_lease: bool = False


@dataclass(slots=True)
class Run:
    """One call while it is answered; `close` whatever happens."""

    host: EngineHost
    generation: Generation
    shape: Shape
    public_id: str
    mishaps: Mishaps
    _parts: dict[str, _Part] = field(default_factory=dict)
    _open: set[str] = field(default_factory=set)
    _mailbox: Mailbox[Answer] = field(default_factory=Mailbox)
    _ticket: IssuedTicket | None = None

    def begin(self) -> None:
        """Submit every choice.

        Raises:
            CallError: if the engine turns one away.
        """
        for request in self._requests():
            part = _Part(Choice(len(self._parts)), request)
            self._parts[request.id] = part
            self._open.add(request.id)
            refused = self.host.submit(request, self._mailbox)
            if refused is not None:
                raise refusal(refused)

    def _requests(self) -> list[EngineRequest]:
        generation = self.generation
        requests: list[EngineRequest] = []
        for prompt_index, prompt in enumerate(generation.prompts):
            for choice_index in range(generation.choices_each):
                is_first = prompt_index == 0 and choice_index == 0
                kv = generation.kv if is_first and generation.is_prefill_leg else None
                requests.append(
                    EngineRequest(
                        id=f"{self.public_id}-{len(requests)}-{secrets.token_hex(4)}",
                        prompt=prompt.ids,
                        output_tokens_max=generation.output_tokens_max,
                        ignores_eos=generation.ignores_eos,
                        cache_salt=generation.call.cache_salt,
                        choice_index=choice_index,
                        is_prefill_leg=generation.is_prefill_leg and is_first,
                        ticket=self._ticket_meant() if is_first else None,
                        transfer="" if kv is None else kv.transfer,
                        kv=kv,
                        has_bytes=generation.wants_bytes and is_first and generation.is_prefill_leg,
                        room=prompt.room,
                        lease_s=0.0 if self.mishaps.expires_lease else None,
                    )
                )
        return requests

    def close(self) -> None:
        """Abort what has not ended."""
        for request_id in self._open:
            self.host.abort(request_id)
        self._open.clear()

    async def _next(self) -> tuple[_Part, list[int]]:
        """The next piece of an answer: its tokens, and whether it was the last in `choice.finish`.

        Raises:
            AnswerFailedError: if the engine gave up.
        """
        item = await self._mailbox.get(timeout_s=SILENCE_S_MAX)
        while item.request_id not in self._open:  # A stop string has ended it meanwhile.
            item = await self._mailbox.get(timeout_s=SILENCE_S_MAX)
        part = self._parts[item.request_id]
        ids: list[int] = []
        if isinstance(item, TokenOut):
            ids = [item.token_id]
            part.choice.ids.append(item.token_id)
            self._extend(part, item.token_id)
            # The end of an answer belongs to its last token, as in vLLM's last chunk.
            follows = self._mailbox.peek()
            if not isinstance(follows, RequestDone) or follows.request_id != item.request_id:
                return part, ids
            item = await self._mailbox.get(timeout_s=SILENCE_S_MAX)
        match item:
            case RequestDone():
                self._open.discard(item.request_id)
                part.cached_tokens = item.cached_tokens + item.external_tokens
                part.choice.finish = part.choice.finish or item.finish.value
                self._ticket = self._ticket or item.ticket
            case RequestFailed():
                self._open.discard(item.request_id)
                raise AnswerFailedError(item.reason)
            case _:
                pass
        return part, ids

    def _extend(self, part: _Part, token_id: int) -> None:
        """Add a token's text; a stop string ends the choice and the request behind it."""
        stops = self.generation.stops
        searched = len(part.text)
        part.text += text.decode([token_id])
        for stop in stops:
            at = part.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                part.text = part.text[: at + len(stop) * self.generation.shows_stop]
                part.choice.finish = "stop"
                part.cached_tokens = self.host.model.cached_tokens_of(part.request.id)
                self.host.abort(part.request.id)
                self._open.discard(part.request.id)
                return

    def _show(self, part: _Part) -> str:
        """Text that has become certain since the last call."""
        # As vLLM 0.32: what is shown in any case is not held back.
        stops = () if self.generation.shows_stop else self.generation.stops
        held = max((len(stop) - 1 for stop in stops), default=0)
        end = len(part.text) if part.choice.finish else max(part.shown, len(part.text) - held)
        shown, part.shown = part.text[part.shown : end], end
        part.choice.text += shown
        return shown

    def usage(self) -> Usage:
        """Tokens of the call so far."""
        first_choices = list(self._parts.values())[:: self.generation.choices_each]
        return Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in self.generation.prompts),
            output_tokens=sum(len(part.choice.ids) for part in self._parts.values()),
            # The last token of a prompt is computed in any case, for its logits.
            cached_tokens=sum(min(p.cached_tokens, len(p.request.prompt) - 1) for p in first_choices),
        )

    def _choices(self) -> list[Choice]:
        return [part.choice for part in self._parts.values()]

    def _is_break_due(self) -> bool:
        if self.mishaps.break_kind is None or not self._open:
            return False
        return sum(len(choice.ids) for choice in self._choices()) >= self.mishaps.break_tokens

    async def answer_whole(self, receive: Receive, send: Send) -> None:
        """Run to the end, then answer in one piece."""
        try:
            while self._open and not self._is_break_due():
                part, _ = await self._next()
                self._show(part)
            if self._is_break_due():
                if self.mishaps.break_kind is FaultKind.STALL:
                    await stall(receive)
                    return
                self._give_up()
        except AnswerFailedError as error:
            await self._send_failure(send, error.reason)
            return
        ticket = (
            None if self._ticket is None or self.mishaps.loses_ticket else self._ticket_body(self._ticket)
        )
        body = msgspec.json.encode(self.shape.whole(self._choices(), self.usage(), ticket))
        if self.mishaps.break_kind is not FaultKind.RESET:
            await send_json(send, 200, body, [*self._headers(), *self._kv_header()])
            return
        await send_head(send, 200, [*self._headers(), (b"content-length", b"%d" % len(body))])
        await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
        await reset(receive, send)

    async def answer_stream(self, receive: Receive, send: Send) -> None:
        """Send one event for each token as it comes."""
        always = self.generation.wants_usage_always
        await send_head(send, 200, [*self._headers(), _SSE])
        opening = self.shape.opening(len(self._parts), self.usage() if always else None)
        try:
            if self.shape.opens_at_once:
                await _send_events(send, opening)
                opening = []
            while self._open:
                pieces: list[tuple[_Part, list[int]]]
                if not self._is_break_due():
                    pieces = [await self._next()]
                elif self.mishaps.break_kind in _SILENT:
                    await _SILENT[self.mishaps.break_kind](receive, send)
                    return
                else:
                    pieces = [(part, []) for part in self._give_up()]
                for part, ids in pieces:
                    await _send_events(send, [*opening, *self._events(part, ids)])
                    opening = []
        except AnswerFailedError:
            # vLLM 0.32 opens on its first result, a failure too.
            failing = self.shape.failing(self._failure_body())
            await _send_events(send, [*opening, *(failing or ())])
            if failing is None:
                await reset(receive, send)
                return
        else:
            wants_usage = self.generation.wants_usage
            events = self.shape.closing(self._choices(), self.usage(), wants_usage=wants_usage)
            await _send_events(send, events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _events(self, part: _Part, ids: list[int]) -> list[bytes]:
        """What one more piece of an answer makes visible."""
        shown = self._show(part)
        if not shown and not part.choice.finish and not self.generation.wants_ids:
            return []
        usage = self.usage() if self.generation.wants_usage_always else None
        return self.shape.delta(part.choice, shown, ids, usage)

    def _give_up(self) -> list[_Part]:
        """Fail the answer in its middle, or abort what has not ended of it, if either is what befalls it.

        Returns:
            What was aborted.

        Raises:
            AnswerFailedError: if it is to fail.
        """
        if self.mishaps.break_kind is FaultKind.STREAM_ERROR:
            raise AnswerFailedError(None)
        if self.mishaps.break_kind is not FaultKind.ABORT:
            return []
        aborted = [part for request_id, part in self._parts.items() if request_id in self._open]
        for part in aborted:
            part.choice.finish = FinishReason.ABORT.value
        self.close()
        return aborted

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(SERVED_BY, self.host.model.settings.name.encode())]

    def _ticket_meant(self) -> RemoteTicket | None:
        """The ticket with the emulator's own side channel in it, and without bytes that nobody wants."""
        ticket = self.host.meant(self.generation.ticket)
        return ticket if ticket is None or self.generation.wants_bytes else replace(ticket, kv=None)

    def _kv_header(self) -> list[tuple[bytes, bytes]]:
        """How real KV arrived for this answer, if it did."""
        arrivals = [self.host.arrival(request_id) for request_id in self._parts]
        return [(KV, str(arrival).encode()) for arrival in arrivals if arrival is not None]

    async def _send_failure(self, send: Send, reason: FailReason | None) -> None:
        headers = self._headers() if reason is None else [*self._headers(), (FAILURE, reason.value.encode())]
        await send_json(send, 500, self.shape.error(self._failure_body()), headers)

    def _failure_body(self) -> bytes:
        is_sglang = self.host.model.settings.engine is EngineKind.SGLANG
        return error_body(500, "InternalServerError", "Internal server error", None, is_sglang=is_sglang)

    def _ticket_body(self, ticket: IssuedTicket) -> dict[str, Any]:
        """`kv_transfer_params` as vLLM 0.32 answers a prefill leg."""
        host, port = parse_host_port(self.host.side_address)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": ticket.block_ids,
            "remote_engine_id": ticket.engine_id,
            "remote_request_id": ticket.request_id,
            "remote_host": host,
            "remote_port": port,
            "tp_size": self.host.model.settings.layout.tensor_parallel,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": ticket.token_count,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": ticket.cached_tokens,
            **self.host.kv_member(ticket.request_id),
        }


async def _send_events(send: Send, events: list[bytes]) -> None:
    """One write for each event, as vLLM does."""
    for each in events:
        await send({"type": "http.response.body", "body": each, "more_body": True})
