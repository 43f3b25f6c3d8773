"""Waits for the first of an answer that is more than a sign of life: until then another may serve."""

import asyncio

from pdcoord.resume.failure import was_given_up
from pdcoord.resume.opening import shows_first_token
from pdcoord.resume.sse import end_of_last, whole_events
from pdcoord.wire.errors import StreamError
from pdcoord.wire.response import Response, is_event_stream, is_plain_stream

SIGNS_OF_LIFE = (b":", b"event: ping")
"""How events begin that are no output: comments (vLLM's --sse-keep-alive-interval) and Anthropic's pings."""
UNFINISHED_BYTES_MAX = 64 << 10
"""Of a comment that does not end."""
WHOLE_BYTES_MAX = 1 << 20
"""An answer in one piece that is longer is passed on as it comes."""


def has_first_token(response: Response, first: bytes) -> bool:
    """Whether what `read_first` gave says that the engine has made a token; False where it cannot be read.

    An answer in one piece is not asked: it says nothing of when its first token was there.
    """
    return is_plain_stream(response) and shows_first_token(first)


async def read_first(response: Response, *, timeout_s: float, is_generated: bool = False) -> bytes:
    """The first of a body; of an event stream the first that has an event, without what came before it.

    An engine that hangs may send comments for ever, and as long as there is nothing else another may serve.

    Args:
        timeout_s: for all of it; comments do not make it longer.
        is_generated: of an answer in one piece all of it is read, up to WHOLE_BYTES_MAX: it comes at once,
            when it is generated, and only all of it tells whether its engine gave it up.

    Raises:
        StreamError: as `Response.read_chunk` does, or if an event stream ends, or may go on no longer,
            without an event, or if an engine gave an answer up.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    first = await response.read_chunk(idle_timeout_s=timeout_s)
    if not is_event_stream(response):
        is_read = is_generated and response.header(b"content-encoding") is None
        return await _read_whole(response, first, timeout_s) if is_read else first
    is_plain = is_plain_stream(response)
    part = first
    while part and is_plain and has_no_event(first):
        first = first[end_of_last(first) :]
        left_s = deadline_s - loop.time()
        if left_s <= 0.0 or len(first) > UNFINISHED_BYTES_MAX:
            raise StreamError(f"the stream had no event after {timeout_s:g} s, or a comment without an end")
        part = await response.read_chunk(idle_timeout_s=left_s)
        first += part
    if not part:
        raise StreamError("the stream ended without an event")
    return first


async def _read_whole(response: Response, first: bytes, timeout_s: float) -> bytes:
    parts, byte_count = [first], len(first)
    while byte_count < WHOLE_BYTES_MAX and (part := await response.read_chunk(idle_timeout_s=timeout_s)):
        parts.append(part)
        byte_count += len(part)
    whole = b"".join(parts)
    if was_given_up(whole):
        raise StreamError("the engine gave the answer up")
    return whole


def has_no_event(data: bytes) -> bool:
    """Whether the beginning of a stream is signs of life and nothing else, the last perhaps unfinished."""
    events, rest = whole_events(data)
    return all(_is_sign(event) for event in events) and _may_be_sign(rest)


def _is_sign(event: bytes) -> bool:
    if event.startswith(b"event: ping"):
        return True
    return all(not line or line.startswith(b":") for line in event.splitlines())


def _may_be_sign(rest: bytes) -> bool:
    rest = rest.lstrip(b"\r\n")
    return _is_sign(rest) or b"event: ping".startswith(rest)
