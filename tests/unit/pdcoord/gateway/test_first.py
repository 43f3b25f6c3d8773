"""What is waited for before an answer begins: an event, and no mere sign of life."""

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from pdcoord.gateway.first import UNFINISHED_BYTES_MAX, has_no_event, read_first
from pdcoord.wire.errors import StreamError
from pdcoord.wire.response import Response

SSE, JSON = b"text/event-stream", b"application/json"
ALIVE = b": alive\n\n"


class Upstream:
    """A body whose parts come one at a time, and then its end."""

    def __init__(self, parts: Sequence[bytes], kind: bytes, encoding: bytes | None) -> None:
        self._parts = list(parts)
        self._headers = {b"content-type": kind, b"content-encoding": encoding}
        self.waits: list[float] = []

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)

    async def read_chunk(self, *, idle_timeout_s: float) -> bytes:
        self.waits.append(idle_timeout_s)
        await asyncio.sleep(0)
        return self._parts.pop(0) if self._parts else b""


async def first_of(
    parts: Sequence[bytes], kind: bytes = SSE, encoding: bytes | None = None, timeout_s: float = 5.0
) -> bytes:
    return await read_first(cast("Response", Upstream(parts, kind, encoding)), timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        ([b"data: 1\n\n", b"data: 2\n\n"], b"data: 1\n\n"),
        ([ALIVE, b": al", b"ive\n\nda", b"ta: 1\n\n"], b": alive\n\nda"),
        ([ALIVE, ALIVE, b"data: 1\n\n"], b"data: 1\n\n"),
        (
            [b"event: ping\ndata: {}\n\n", b"event: pi", b"ng\n", b"data: {}\n\n", b"data: 1\n\n"],
            b"data: 1\n\n",
        ),
        ([b": a\r\n\r\n", b"\r\n", b"data: 1\r\n\r\n"], b"\r\ndata: 1\r\n\r\n"),
        ([b": a\ndata: 1\n\n"], b": a\ndata: 1\n\n"),
    ],
)
async def test_an_event_is_waited_for(parts: list[bytes], first: bytes) -> None:
    assert await first_of(parts) == first


@pytest.mark.parametrize("parts", [[], [ALIVE], [ALIVE, b": al"]])
async def test_a_stream_that_ends_without_an_event_has_failed(parts: list[bytes]) -> None:
    with pytest.raises(StreamError, match="without an event"):
        await first_of(parts)


async def test_only_streams_that_can_be_read_are_looked_into() -> None:
    assert await first_of([], JSON) == b""
    assert await first_of([ALIVE], SSE, b"gzip") == ALIVE
    with pytest.raises(StreamError):
        await first_of([], SSE, b"gzip")


async def test_comments_make_the_wait_no_longer() -> None:
    with pytest.raises(StreamError, match="no event after 0 s"):
        await first_of([ALIVE, b"data: 1\n\n"], timeout_s=0.0)


async def test_a_comment_without_an_end_is_not_kept_for_ever() -> None:
    with pytest.raises(StreamError):
        await first_of([b":" + b"x" * UNFINISHED_BYTES_MAX, b"x", b"\n\ndata: 1\n\n"])


@pytest.mark.parametrize("data", [b"", b"\n", b":", b"event: p", ALIVE + b"ev", b"event: ping\ndata: {}\n\n"])
def test_signs_of_life_are_known_before_they_end(data: bytes) -> None:
    assert has_no_event(data)


@pytest.mark.parametrize("data", [b"d", b"event: m", ALIVE + b"data: 1\n\n", b"id: 1\n\n"])
def test_anything_else_is_more(data: bytes) -> None:
    assert not has_no_event(data)
