"""What one client gets: an engine's answer as it comes, one of our own, or a stream in several pieces."""

from dataclasses import dataclass

from pdcoord.protocol.errors import Refusal
from pdcoord.resume.errors import TornError
from pdcoord.resume.failure import Tail, ends_in_error, next_sequence_number, tells_failure
from pdcoord.resume.splice import Splice
from pdcoord.resume.tape import Tape
from pdcoord.wire.asgi import Message, Scope, Send, send_head, send_json
from pdcoord.wire.errors import StreamError
from pdcoord.wire.heads import end_to_end
from pdcoord.wire.relay import Change, relay_body
from pdcoord.wire.response import Response, is_event_stream
from sidecar.guard import Headers, for_client
from sidecar.passing import Recorder
from sidecar.usage import UsageRewriter

ANSWER_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """An engine's whole answer, kept in case it must be passed on."""

    status: int
    headers: Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """An engine's answer with its head, and with what was read of its body.

    Attributes:
        held: the first bytes of the body.
        has_ended: they are all of it.
    """

    response: Response
    held: bytes
    has_ended: bool

    @property
    def is_event_stream(self) -> bool:
        return is_event_stream(self.response)


class Outgoing:
    """The response to one request.

    Attributes:
        status: of the head that was sent; None if none was.
    """

    def __init__(self, scope: Scope, send: Send, *, idle_timeout_s: float) -> None:
        self.status: int | None = None
        self._scope = scope
        self._send_now = send
        self._is_sending = False
        self._idle_timeout_s = idle_timeout_s
        self._is_event_stream = False
        self._held = b""
        self._relayed: Response | None = None
        self._recorder: Recorder | None = None
        self._tail: Tail | None = None

    @property
    def step_count(self) -> int:
        """How far the answer has come; to be compared with what it was."""
        if self._recorder is not None:
            return self._recorder.step_count
        return self._relayed.part_count if self._relayed is not None else 0

    @property
    def is_held_up(self) -> bool:
        """Whether the client must read before anything more can be written to it.

        The server bounds that: it gives up a connection that takes nothing for so long.
        """
        return self._is_sending or (self._relayed is not None and self._relayed.is_held_up)

    async def pass_on(self, answer: Answer, headers: Headers) -> None:
        """Give an answer as it came, with these headers of ours."""
        self.status = answer.status
        headers = [*for_client(end_to_end(answer.headers)), *headers]
        if self._scope["method"] == "HEAD" or answer.status in {204, 304}:
            await send_head(self._send, answer.status, headers)
            await self.end(b"")
            return
        await self._send_whole(answer.status, headers, answer.body)

    async def refuse(self, refusal: Refusal, headers: Headers) -> None:
        self.status = refusal.status
        await send_json(
            self._send, refusal.status, refusal.body(self._scope["path"]), [*refusal.headers(), *headers]
        )

    async def break_off(self, refusal: Refusal) -> None:
        """Say in a stream that it ends here.

        The response stays unfinished on purpose: the server closes the connection, and no client and no
        gateway can take what it has for the whole.
        """
        kept = self._recorder.last if self._recorder is not None else b""
        last = kept or (self._tail.data if self._tail is not None else b"") or self._held
        is_between = last.endswith((b"\n\n", b"\r\n\r\n"))  # Inside an event another would be garbage.
        if self._is_event_stream and is_between and not ends_in_error(last):
            event = refusal.event(self._scope["path"], sequence_number=next_sequence_number(last))
            await self._send_part(event)

    async def relay(
        self, piece: Piece, headers: Headers, rewriter: UsageRewriter | None, tape: Tape | None
    ) -> None:
        """Relay an answer to its end.

        Args:
            headers: ours.
            tape: keeps what is passed on of an event stream; None where nothing is kept.

        Raises:
            StreamError: if the body breaks off, or ends in the middle of a stream that is kept.
            TornError: if the engine itself said that it failed. In a stream that is not kept that is noticed
                at its end, and has been passed on.
        """
        self._is_event_stream = piece.is_event_stream
        headers = [*for_client(end_to_end(piece.response.headers)), *headers]
        if rewriter is not None and not self._is_event_stream:
            rest = await piece.response.read_all(timeout_s=self._idle_timeout_s, bytes_max=ANSWER_BYTES_MAX)
            body = rewriter.feed(piece.held + rest) + rewriter.finish()
            self.status = piece.response.status
            await self._send_whole(self.status, headers, body)
            return
        if rewriter is not None or tape is not None:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        self.status = piece.response.status
        await send_head(self._send, self.status, headers)
        await self._relay_body(piece, rewriter, tape)

    async def go_on(self, piece: Piece, splice: Splice, rewriter: UsageRewriter | None, tape: Tape) -> None:
        """Relay the rest of a stream that broke off; raises as `relay` does."""
        await self._relay_body(piece, rewriter, tape, splice)

    async def end(self, rest: bytes) -> None:
        """The last bytes of the body."""
        await self._send({"type": "http.response.body", "body": rest, "more_body": False})

    async def _relay_body(
        self, piece: Piece, rewriter: UsageRewriter | None, tape: Tape | None, splice: Splice | None = None
    ) -> None:
        changes: list[Change] = [] if splice is None else [splice]
        if rewriter is not None:
            changes.append(rewriter.feed)
        self._relayed = None
        self._recorder = None if tape is None else Recorder(tape, *changes)
        change: Change | None = self._recorder or (changes[0] if changes else None)
        if tape is None and self._is_event_stream:
            change = self._tail = Tail(change)
        try:
            self._held = piece.held if change is None else change(piece.held)
            await self._send_part(self._held)
            if not piece.has_ended:
                self._relayed = piece.response
                await relay_body(
                    self._scope,
                    self._send,
                    piece.response,
                    idle_timeout_s=self._idle_timeout_s,
                    change=change,
                )
            rest = b"" if rewriter is None else rewriter.finish()
            if self._recorder is not None:
                rest = self._recorder.end(rest)
                if self._recorder.is_cut_short:
                    await self._send_part(rest)
                    raise StreamError("the body ended before its stream did")
                rest += self._recorder.pending
        except TornError:
            if tape is not None:
                await self._send_part(tape.pending)  # What came before its word in the same part is good.
            raise
        if self._tail is not None and tells_failure(self._tail.data + rest):
            await self._send_part(rest)
            raise TornError
        await self.end(rest)

    async def _send(self, message: Message) -> None:
        self._is_sending = True
        try:
            await self._send_now(message)
        finally:
            self._is_sending = False

    async def _send_part(self, part: bytes) -> None:
        if part:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        headers = [pair for pair in headers if pair[0] != b"content-length"]
        await send_head(self._send, status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.end(body)
