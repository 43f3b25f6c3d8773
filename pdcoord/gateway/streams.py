"""One answer on its way to the client, from its first byte to its end, from however many engines it comes."""

from asyncio import Future
from collections.abc import Callable
from enum import Enum, auto

from pdcoord.front.outputs import OutputCounter, count_kept
from pdcoord.gateway.first import SIGNS_OF_LIFE
from pdcoord.protocol.errors import Refusal
from pdcoord.resume.errors import DivergedError, TornError, UnreadableError
from pdcoord.resume.failure import ends_in_error, next_sequence_number, tells_failure
from pdcoord.resume.passed import read_passed
from pdcoord.resume.splice import Splice
from pdcoord.resume.sse import whole_events
from pdcoord.resume.tape import Tape, seems_whole
from pdcoord.resume.unresumable import Unresumable
from pdcoord.wire.asgi import Scope, Send, send_head
from pdcoord.wire.errors import StalledError, StreamError
from pdcoord.wire.heads import Headers
from pdcoord.wire.relay import relay_body
from pdcoord.wire.response import Response, is_plain_stream

AGAIN_S = 5.0
"""A silent stream that could not go elsewhere is looked at again after so long."""
SOON_S = 0.1
"""The same where it is just being found out whether it could."""
_ERROR_EVENT = b'data: {"error"'
_TAIL_BYTES = 4_096
_LOOK_BYTES = 16 << 10


class Fate(Enum):
    """How a body that was relayed came to its end.

    DIVERGED: it did not go where the stream had gone; whoever made it did nothing wrong.
    OVER: no longer of interest, since the client has the end of its answer, or an error.
    """

    WHOLE = auto()
    BROKEN = auto()
    STALLED = auto()
    DIVERGED = auto()
    OVER = auto()


class Answer:
    """What of an answer goes to the client; parts pass through one function, which parses nothing.

    Args:
        first_response: its head says what the answer is.
        tape: keeps the stream and the client's request, so that it can be continued.
        why_not_kept: why there is no tape.

    Attributes:
        tape: likewise; None where nothing is kept.
        why_not_kept: likewise.
    """

    def __init__(
        self,
        scope: Scope,
        send: Send,
        first_response: Response,
        *,
        tape: Tape | None = None,
        why_not_kept: Unresumable = Unresumable.API,
    ) -> None:
        self.tape = tape
        self.why_not_kept = why_not_kept
        self._scope = scope
        self._send = send
        self._response = first_response
        self._is_plain = is_plain_stream(first_response)
        self._is_encoded = first_response.header(b"content-encoding") is not None
        self._counter: OutputCounter | None = None
        self._parts_before = 0
        self._splice: Splice | None = None
        self._error_event = b""
        self._last = b""
        self._has_output = False
        self._is_over = False
        if tape is not None:
            tape.after = self._count

    async def begin(self, headers: Headers) -> None:
        """Send the head."""
        if self.tape is not None:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        await send_head(self._send, self._response.status, headers)

    async def relay(
        self, response: Response, first: bytes, watch: "StreamWatch", *, splice: Splice | None = None
    ) -> Fate:
        """Pass a body on as it comes, its first part being here already; what came before has been passed on.

        Args:
            splice: of a continuing engine's stream.
        """
        if self._response is not response:
            self._parts_before += self._response.part_count
            self._response = response
        self._splice = splice
        self._error_event = b""
        self._last = first
        change = self._change_for(first)
        try:
            shown = first if change is None or not first else self._first_shown(first)
            if shown:
                await self._write(shown)
            if first:
                await relay_body(
                    self._scope,
                    self._send,
                    response,
                    idle_timeout_s=watch.idle_timeout_s,
                    change=change,
                    watch=watch if self.tape is not None else None,
                )
        except StalledError:
            return Fate.STALLED
        except StreamError:
            return Fate.BROKEN
        except DivergedError:
            return Fate.DIVERGED
        except TornError as error:
            self._error_event = error.error_event
            if self.tape is not None and self.tape.pending:
                await self._write(self.tape.pending)
            return Fate.BROKEN
        finally:
            self._last = response.last or first
        return Fate.BROKEN if self._has_told_failure() else Fate.WHOLE

    async def end(self, rest: bytes = b"") -> None:
        """Say that the answer is whole; `rest` comes before that."""
        self._is_over = True
        if self.tape is not None and not rest:
            rest = self.tape.pending  # An engine that leaves out the last blank line has ended all the same.
        if rest:
            await self._write(rest)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def break_off(self, refusal: Refusal) -> None:
        """End a broken answer so that it cannot pass for a whole one: its last chunk is never sent.

        The error goes out as an event only where an event may stand: behind a whole one, in a stream that
        is not compressed, and that the sidecar has not ended so already. Elsewhere it would be garbage.
        An engine's own word for what happened is passed on in place of ours. An answer that was ended
        already, be it that the client has not taken all of that, is left so.
        """
        if self._is_over:
            return
        self._is_over = True
        if self._error_event.startswith(_ERROR_EVENT):
            await self._write(self._error_event)
        elif self._is_plain and self._is_between_events() and not self._has_said_so():
            await self._write(self._event(refusal))

    def seems_whole(self) -> bool:
        """Whether a stream that ended without an error has in its tail what streams end with."""
        if self.tape is not None and self.tape.is_whole:
            return seems_whole(_lines_at_end(self.tape.passed) + self.tape.pending)
        return self._counter is not None and seems_whole(_lines_at_end(self._counter.tail))

    def why_unreadable(self) -> Unresumable | None:
        """Why nobody can say what the client was given; None where the tape has all of it."""
        if self.tape is None:
            return self.why_not_kept
        return None if self.tape.is_whole else Unresumable.TAPE_FULL

    def has_output(self) -> bool:
        """Whether a token was passed on; False where that cannot be told.

        Only the beginning and the end are looked at: whoever asks has the event loop.
        """
        if not self._has_output and self.tape is not None and self.tape.is_whole:
            passed = self.tape.passed
            self._has_output = _has_output(passed[:_LOOK_BYTES]) or _has_output(
                _lines_at_end(passed, _LOOK_BYTES)
            )
        return self._has_output

    def begin_again(self) -> None:
        """Forget the unfinished event of a stream that broke off; another one goes on."""
        if self.tape is not None:
            self.tape.begin_again()

    def output_tokens(self) -> int | None:
        """Tokens as far as they were passed on; None where nothing tells."""
        if self._counter is not None:
            return self._counter.count()
        return None if self.tape is None else count_kept(self.tape.passed)

    def close(self) -> None:
        """Let go of what was kept."""
        if self.tape is not None:
            self.tape.close()

    def _change_for(self, first: bytes) -> Callable[[bytes], bytes] | None:
        if self.tape is not None:
            return self.tape if self._splice is None else self._keep_spliced
        if not self._is_encoded:
            self._counter = OutputCounter(first, is_stream=self._is_plain)
        return self._counter

    def _first_shown(self, first: bytes) -> bytes:
        if self.tape is None:
            return first
        return self.tape(first) if self._splice is None else self._keep_spliced(first)

    def _keep_spliced(self, part: bytes) -> bytes:
        assert self._splice is not None
        assert self.tape is not None
        shown = self._splice(part)
        return self.tape(shown) if shown else b""

    def _count(self, part: bytes) -> bytes:
        """Count on in a stream that was let go of; what was kept of it had about one event in each part."""
        if self._counter is None:
            parts = self._parts_before + self._response.part_count
            self._counter = OutputCounter(part, is_stream=True, events_before=parts)
            return part
        return self._counter(part)

    def _is_between_events(self) -> bool:
        is_kept = self.tape is not None and self.tape.is_whole
        return is_kept or self._last.endswith((b"\n\n", b"\r\n\r\n"))

    def _has_told_failure(self) -> bool:
        """Whether a stream that is not kept has the engine's word in its tail that it failed."""
        return self._is_plain and self._counter is not None and tells_failure(self._counter.tail)

    def _has_said_so(self) -> bool:
        return ends_in_error(self._last if self._counter is None else self._counter.tail)

    def _event(self, refusal: Refusal) -> bytes:
        tail = self._last if self._counter is None else self._counter.tail
        return refusal.event(self._scope["path"], sequence_number=next_sequence_number(tail))

    async def _write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _lines_at_end(data: bytes, bytes_max: int = _TAIL_BYTES) -> bytes:
    """The last lines of an event stream, none of them without its beginning."""
    return data if len(data) <= bytes_max else data[-bytes_max:].partition(b"\n")[2]


def _has_output(part: bytes) -> bool:
    """Whether an event of a stream's part, which may be cut at either end, has a token."""
    for event in whole_events(part)[0]:
        try:
            if read_passed(event).has_output:
                return True
        except UnreadableError:
            continue
    return False


class StreamWatch:
    """Tells when a stream that makes no progress is better off elsewhere.

    Silence before the first token is allowed to be longer: an engine that is asked directly sends its first
    event before it has computed the prompt.

    Args:
        idle_timeout_s: longest silence, signs of life included, of a stream that has to be waited for.
        silence_s_max: how long the core has it wait for a token; None where it cannot go elsewhere.
        first_s_max: how much longer it waits for the first.
        find_out: begins to find out whether the stream could be continued.
        has_output: whether a token has come.
        stands_still: called, perhaps again and again, where it should go elsewhere and cannot.
    """

    def __init__(
        self,
        *,
        idle_timeout_s: float,
        silence_s_max: Callable[[], float | None],
        first_s_max: Callable[[], float],
        find_out: Callable[[], Future[bool]],
        has_output: Callable[[], bool],
        stands_still: Callable[[], object],
    ) -> None:
        self.idle_timeout_s = idle_timeout_s
        self._silence_s_max = silence_s_max
        self._first_s_max = first_s_max
        self._find_out = find_out
        self._has_output = has_output
        self._stands_still = stands_still
        self._usual_s: float | None = None
        self._verdict: Future[bool] | None = None

    def is_progress(self, part: bytes) -> bool:
        """Whether a part is more than a comment: where looks are as frequent as these, a token is seen."""
        return not part.startswith(SIGNS_OF_LIFE)

    def silence_s_max(self, silent_s: float) -> float:
        """As of wire.response.ProgressWatch; what it costs is only spent on a stream that is silent."""
        if silent_s <= 0.0:
            self._verdict = None
            if self._usual_s is not None:
                return self._usual_s
        allowed_s = self._silence_s_max()
        if allowed_s is None:
            # There may be somewhere to go by then.
            return silent_s + AGAIN_S
        self._usual_s = allowed_s
        if silent_s < allowed_s:
            return allowed_s
        if not self._has_output():
            allowed_s += self._first_s_max()
            if silent_s < allowed_s:
                return allowed_s
        if self._verdict is None:
            self._verdict = self._find_out()
        if not self._verdict.done():
            return silent_s + SOON_S
        if self._verdict.result():
            return silent_s
        self._stands_still()
        return silent_s + AGAIN_S
