"""A generating call from its prompts to its last event: what runs between the API and the engine."""

import secrets
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from pdcoord.core.fleet import EngineKind
from pdcoord.protocol.headers import parse_host_port
from pdcoord.sim import text
from pdcoord.sim.emulator_call import CallError, Generation
from pdcoord.sim.emulator_edge import reset
from pdcoord.sim.emulator_host import Answer, EngineHost, Mailbox
from pdcoord.sim.emulator_shapes import (
    DONE_EVENT,
    Choice,
    Shape,
    Usage,
    error_body,
)
from pdcoord.sim.messages import (
    EngineRequest,
    FailReason,
    IssuedTicket,
    Rejected,
    RejectReason,
    RemoteTicket,
    RequestDone,
    RequestFailed,
    TokenOut,
)
from pdcoord.wire.asgi import Receive, Send, send_head, send_json

ANSWER_S_MAX = 3_600.0
"""Longest silence inside an answer; the model's own deadlines are shorter."""
SERVED_BY = b"x-emulated-engine"
FAILURE = b"x-emulated-failure"
KV = b"x-emulated-kv"
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

    def __init__(self, reason: FailReason) -> None:
        super().__init__(f"the engine failed the request: {reason}")
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
        reset_after_tokens: None lets the answer end.
    """

    reset_after_tokens: int | None = None
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
        item = await self._mailbox.get(timeout_s=ANSWER_S_MAX)
        while item.request_id not in self._open:  # A stop string has ended it meanwhile.
            item = await self._mailbox.get(timeout_s=ANSWER_S_MAX)
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
            item = await self._mailbox.get(timeout_s=ANSWER_S_MAX)
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
                part.text = part.text[:at]
                part.choice.finish = "stop"
                part.cached_tokens = self.host.model.cached_tokens_of(part.request.id)
                self.host.abort(part.request.id)
                self._open.discard(part.request.id)
                return

    def _show(self, part: _Part) -> str:
        """Text that has become certain since the last call."""
        held = max((len(stop) - 1 for stop in self.generation.stops), default=0)
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

    def _is_reset_due(self) -> bool:
        after = self.mishaps.reset_after_tokens
        return after is not None and sum(len(choice.ids) for choice in self._choices()) >= after

    async def answer_whole(self, receive: Receive, send: Send) -> None:
        """Run to the end, then answer in one piece."""
        try:
            while self._open:
                part, _ = await self._next()
                self._show(part)
        except AnswerFailedError as error:
            await self._send_failure(send, error.reason)
            return
        ticket = (
            None if self._ticket is None or self.mishaps.loses_ticket else self._ticket_body(self._ticket)
        )
        body = msgspec.json.encode(self.shape.whole(self._choices(), self.usage(), ticket))
        if self.mishaps.reset_after_tokens is None:
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
                if self._is_reset_due():
                    await reset(receive, send)
                    return
                part, ids = await self._next()
                await _send_events(send, opening)
                opening = []
                shown = self._show(part)
                if shown or part.choice.finish or self.generation.wants_ids:
                    usage = self.usage() if always else None
                    await _send_events(send, self.shape.delta(part.choice, shown, ids, usage))
        except AnswerFailedError:
            body = self._failure_body()
            # vLLM 0.32 opens on its first result, a failure too.
            await _send_events(send, [*opening, b"data: " + body + b"\n\n", DONE_EVENT])
        else:
            wants_usage = self.generation.wants_usage
            events = self.shape.closing(self._choices(), self.usage(), wants_usage=wants_usage)
            await _send_events(send, events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

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

    async def _send_failure(self, send: Send, reason: FailReason) -> None:
        headers = [*self._headers(), (FAILURE, reason.value.encode())]
        await send_json(send, 500, self._failure_body(), headers)

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
