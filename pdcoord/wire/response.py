"""One response while it arrives: fed by its connection, read or pumped on by the caller."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Protocol, Self

from pdcoord.resume.opening import names_event_stream
from pdcoord.wire.errors import BodyTooLargeError, StalledError, StreamError
from pdcoord.wire.heads import Headers

# Past this many unread bytes the socket is no longer read until the reader has caught up; one read of
# the event loop (256 KiB in uvloop) may come on top.
BUFFERED_BYTES_MAX = 256 * 1024

Sink = Callable[[bytes], Awaitable[None] | None]
"""Takes body bytes at once; what it returns, if anything, is awaited before it is given more."""


LOOKS_PER_TIMEOUT = 4
"""While a body is pushed on, time is told by looking so often; nothing is noted per part."""


class ProgressWatch(Protocol):
    """Says which parts of a body are progress, and how long it may be without."""

    def is_progress(self, part: bytes) -> bool:
        """Whether the last part before a look is more than a sign of life."""
        ...

    def silence_s_max(self, silent_s: float) -> float:
        """How long the body may be without progress; asked again when it has been so long.

        Args:
            silent_s: how long it has been; an answer of no more than this ends the body.
        """
        ...


class Response:
    """A response whose head has come; the body is read as it arrives.

    Leaving it with the body unread closes the connection, as does cancelling a read. One reader at a time.

    Attributes:
        status: 200..599; interim 1xx answers are never shown.
        headers: in order, hop-by-hop ones too; `heads.end_to_end` gives what a proxy may pass on.
        last: what `pump` handed on last; b"" before that.
        part_count: how often it did; who watches a stream's progress compares two looks at this.
        is_held_up: `pump` waits for its sink, so that what is not handed on says nothing of who sends it.
        chunks: body bytes not read yet; the parser appends to this list, so it is never replaced.
    """

    __slots__ = (
        "_abort",
        "_buffered_bytes",
        "_counted",
        "_error",
        "_has_ended",
        "_idle_deadline_s",
        "_idle_timeout_s",
        "_idle_timer",
        "_is_paused",
        "_loop",
        "_progress_s",
        "_silence_s_max",
        "_sink",
        "_sink_error",
        "_sink_pause",
        "_transport",
        "_waiter",
        "_watch",
        "chunks",
        "headers",
        "is_held_up",
        "last",
        "part_count",
        "status",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, abort: Callable[[], None]
    ) -> None:
        self.status = 0
        self.headers: Headers = []
        self.last = b""
        self.part_count = 0
        self.is_held_up = False
        self.chunks: list[bytes] = []
        self._loop = loop
        self._transport = transport
        self._abort = abort
        self._buffered_bytes = 0
        self._is_paused = False
        self._counted = 0
        self._has_ended = False
        self._error: StreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._idle_timeout_s = 0.0
        self._idle_deadline_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._sink: Sink | None = None
        self._sink_pause: Awaitable[None] | None = None
        self._sink_error: Exception | None = None
        self._watch: ProgressWatch | None = None
        self._progress_s = 0.0
        self._silence_s_max = 0.0

    # What the reader calls.

    def header(self, name: bytes) -> bytes | None:
        """The first value of a (lower-case) header."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    def has_ended(self) -> bool:
        """Whether the body has come whole, read or not."""
        return self._has_ended

    async def read_chunk(self, *, idle_timeout_s: float) -> bytes:
        """All that has arrived since the last read, waiting for the first byte; b"" at the body's end.

        Raises:
            StreamError: if the body breaks off, is malformed, or nothing comes for idle_timeout_s.
        """
        if self._must_wait():
            self._expect_within(idle_timeout_s)
            while self._must_wait():
                await self._wait()
        return self._take()

    async def read_all(self, *, timeout_s: float, bytes_max: int = 64 << 20) -> bytes:
        """The whole rest of the body; on any error the connection is closed.

        Raises:
            StreamError: if the body breaks off or has not ended within timeout_s.
            BodyTooLargeError: if it is longer than bytes_max.
        """
        parts: list[bytes] = []
        count = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    while self._must_wait():
                        await self._wait()
                    part = self._take()
                    if not part:
                        return parts[0] if len(parts) == 1 else b"".join(parts)
                    count += len(part)
                    if count > bytes_max:
                        self._abandon()
                        raise BodyTooLargeError(bytes_max)
                    parts.append(part)
        except TimeoutError as error:
            self._abandon()
            raise StreamError(f"the body had not ended after {timeout_s:g} s") from error

    async def pump(self, sink: Sink, *, idle_timeout_s: float, watch: ProgressWatch | None = None) -> None:
        """Hand the rest of the body to `sink` as it arrives, without waking a task for each part.

        The sink is called by the connection itself with all that one read has brought. While something
        that it returned is awaited it is given nothing: what arrives meanwhile is buffered, up to the bound.

        Silence is noticed after idle_timeout_s to 1.25 times that. Waiting for the sink is none.

        Args:
            watch: looks at the parts from time to time for progress.

        Raises:
            StalledError: if there is none for longer than the watch allows.
            StreamError: as `read_chunk` does. What the sink raises is raised here, the connection closed.
        """
        self._watch = watch
        self._progress()
        while data := await self.read_chunk(idle_timeout_s=idle_timeout_s):
            self.last = data
            self.part_count += 1
            if watch is not None and watch.is_progress(data):
                self._progress()
            try:
                pause = sink(data)
                if pause is None:
                    pause = await self._push_to(sink, idle_timeout_s)
                if pause is not None:
                    self.is_held_up = True
                    await pause
                    self.is_held_up = False
                    self._progress()
            except BaseException:
                self._abandon()
                raise

    async def aclose(self) -> None:
        """Close the connection unless the body has come whole, in which case it is back in the pool."""
        self._abandon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandon()

    # What the connection calls.

    def fed(self, byte_count: int) -> None:
        """Bytes went through the parser: hand them on, or stop reading if the reader is far behind."""
        sink, chunks = self._sink, self.chunks
        if sink is None:
            self._wake()
            self._buffered_bytes += byte_count
            if self._buffered_bytes > BUFFERED_BYTES_MAX and not self._is_paused:
                self._is_paused = True
                self._transport.pause_reading()
        elif chunks:
            # All that a token costs here: one call of the sink.
            self.part_count += 1
            self.last = data = chunks.pop() if len(chunks) == 1 else self._take()
            try:
                self._sink_pause = pause = sink(data)
            except Exception as error:  # noqa: BLE001  # the task that pumps gets it, not the event loop
                self._sink_error = error
            else:
                if pause is None:
                    return
            self._sink = None
            self._wake()

    def end(self) -> None:
        """The body has come whole; what of it is unread stays readable."""
        self._has_ended = True
        if self._is_paused and not self._transport.is_closing():
            # Whoever has the connection next must be able to read it.
            self._transport.resume_reading()
        self._is_paused = False
        self._finish()

    def fail(self, error: StreamError) -> None:
        """The body will not come whole; the reader gets what has come, then the error."""
        if not self._has_ended and self._error is None:
            self._error = error
            self._finish()

    # Inside.

    def _must_wait(self) -> bool:
        return not self.chunks and not self._has_ended and self._error is None

    async def _wait(self) -> None:
        """Until something has happened: bytes, the end, an error, or the sink's wish for a pause."""
        assert self._waiter is None, "a response has one reader at a time"
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        except BaseException:
            self._waiter = None
            self._abandon()
            raise

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def _take(self) -> bytes:
        chunks = self.chunks
        if not chunks:
            if self._error is not None:
                raise self._error
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._buffered_bytes = 0
        if self._is_paused:
            self._is_paused = False
            if self._error is None:
                self._transport.resume_reading()
        return data

    async def _push_to(self, sink: Sink, idle_timeout_s: float) -> Awaitable[None] | None:
        """Let the connection call the sink until it asks for a pause (returned) or nothing more comes."""
        if self._has_ended or self._error is not None:
            return None
        self._idle_timeout_s = idle_timeout_s
        self._counted = self.part_count
        self._sink = sink
        self._expect_within(idle_timeout_s)
        try:
            await self._wait()
        except BaseException:
            if isinstance(self._sink_pause, Coroutine):
                self._sink_pause.close()  # It will not be awaited.
            raise
        finally:
            self._sink = None
        pause, self._sink_pause = self._sink_pause, None
        if self._sink_error is not None:
            raise self._sink_error
        return pause

    def _finish(self) -> None:
        """Nothing more will come."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        self._wake()

    def _abandon(self) -> None:
        if not self._has_ended and self._error is None:
            self.fail(StreamError("the response was closed by its reader before its end"))
            self._abort()
        self.chunks.clear()

    def _expect_within(self, idle_timeout_s: float) -> None:
        """Fail the body if nothing comes for so long.

        One timer serves the whole response and is moved on when it fires: arming one for each chunk
        costs as much as the rest of a read.
        """
        self._idle_deadline_s = self._loop.time() + idle_timeout_s
        if (
            self._idle_timer is None
            or self._sink is not None
            or self._watch is not None
            or self._idle_timer.when() > self._idle_deadline_s
        ):
            self._arm_idle_timer()

    def _arm_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        when_s = self._idle_deadline_s
        # A push is counted, not timed, which is cheaper; so look often enough to know the time.
        if self._sink is not None:
            when_s = min(when_s, self._loop.time() + self._idle_timeout_s / LOOKS_PER_TIMEOUT)
        if self._watch is not None:
            when_s = min(when_s, self._loop.time() + self._silence_s_max / LOOKS_PER_TIMEOUT)
        self._idle_timer = self._loop.call_at(when_s, self._on_idle_timer)

    def _on_idle_timer(self) -> None:
        self._idle_timer = None
        if self._waiter is None:
            return  # Nobody waits; the next read arms it again.
        now_s = self._loop.time()
        if self._counted != self.part_count:
            self._counted = self.part_count
            self._idle_deadline_s = now_s + self._idle_timeout_s
            if self._watch is not None and self._watch.is_progress(self.last):
                self._progress()
        if now_s >= self._idle_deadline_s:
            self.fail(StreamError("the body fell silent for longer than its idle timeout"))
            self._abort()
        elif self._is_stalled(now_s):
            self.fail(StalledError("the body made no progress for longer than is allowed"))
            self._abort()
        else:
            self._arm_idle_timer()

    def _progress(self) -> None:
        if self._watch is not None:
            self._progress_s = self._loop.time()
            self._silence_s_max = self._watch.silence_s_max(0.0)

    def _is_stalled(self, now_s: float) -> bool:
        watch, silent_s = self._watch, now_s - self._progress_s
        if watch is None or silent_s < self._silence_s_max:
            return False
        try:
            self._silence_s_max = watch.silence_s_max(silent_s)
        except Exception as error:  # noqa: BLE001  # a defect of the watch's must not stop this body's clock
            self._loop.call_exception_handler({"message": "the watch of a body failed", "exception": error})
            return True
        return silent_s >= self._silence_s_max


def is_event_stream(response: Response) -> bool:
    """Whether a body is an event stream, compressed or not."""
    return names_event_stream(response.header(b"content-type"))


def is_plain_stream(response: Response) -> bool:
    """Whether a body is an event stream whose bytes can be read as they are."""
    return is_event_stream(response) and response.header(b"content-encoding") is None
