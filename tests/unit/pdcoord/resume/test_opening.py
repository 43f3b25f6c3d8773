"""When an answer has begun: not with a head, a comment or a preamble, and an error event is no output."""

import pytest

from pdcoord.resume.opening import OPENING_BYTES_MAX, Opening, Seen, shows_first_token

SSE = b"text/event-stream; charset=utf-8"


@pytest.mark.parametrize(
    ("event", "seen"),
    [
        (b'data: {"id":"x","choices":[]}\n\n', Seen.OUTPUT),
        (b'data:{"id":"x"}\n\n', Seen.OUTPUT),
        (b"data: [DONE]\n\n", Seen.OUTPUT),
        (b": keep-alive\n\n", Seen.NOTHING),
        (b"\n\n", Seen.NOTHING),
        (b'event: ping\ndata: {"type":"ping"}\n\n', Seen.NOTHING),
        (b'data: {"type":"ping"}\n\n', Seen.NOTHING),
        (b'event: response.created\ndata: {"response":{}}\n\n', Seen.NOTHING),
        (b'event: response.in_progress\ndata: {"response":{}}\n\n', Seen.NOTHING),
        (b'data: {"type":"response.created"}\n\n', Seen.NOTHING),
        (b'event: response.output_item.added\ndata: {"a":1}\n\n', Seen.OUTPUT),
        (b'event: message_start\ndata: {"type":"message_start"}\n\n', Seen.NOTHING),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n', Seen.NOTHING),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":"x"}}]}\n\n', Seen.OUTPUT),
        (b'data: {"error": {"message": "x"}}\n\n', Seen.ERROR),
        (b'data: { "error":{"message":"x"}}\n\n', Seen.ERROR),
        (b'data: {"object":"error","message":"x"}\n\n', Seen.ERROR),
        (b'event: error\ndata: {"type":"error"}\n\n', Seen.ERROR),
        (b'data: {"type":"error","error":{}}\n\n', Seen.ERROR),
        (b'event: response.failed\ndata: {"response":{}}\n\n', Seen.ERROR),
        (b'data: {"error": null, "choices": []}\n\n', Seen.OUTPUT),
        (b'data: {"choices":[{"delta":{"content":"\\"error\\""}}]}\n\n', Seen.OUTPUT),
        (b'data: {"id":"x"}\r\n\r\n', Seen.OUTPUT),
    ],
)
def test_the_first_event_tells(event: bytes, seen: Seen) -> None:
    assert Opening(SSE).feed(event) is seen
    by_byte = Opening(SSE)
    results = [by_byte.feed(event[i : i + 1]) for i in range(len(event))]
    assert results[-1] is seen
    assert set(results[:-1]) <= {Seen.NOTHING}
    assert bytes(by_byte.held) == event


def test_what_comes_before_output_is_held_with_it() -> None:
    opening = Opening(SSE)
    assert opening.feed(b": keep-alive\n\n: keep-al") is Seen.NOTHING
    assert (
        opening.feed(b'ive\n\nevent: ping\ndata: {}\n\ndata: {"id":1}\n\ndata: {"id":2}\n\n') is Seen.OUTPUT
    )
    assert bytes(opening.held) == (
        b': keep-alive\n\n: keep-alive\n\nevent: ping\ndata: {}\n\ndata: {"id":1}\n\ndata: {"id":2}\n\n'
    )


def test_an_error_after_the_preamble_is_seen() -> None:
    opening = Opening(SSE)
    assert opening.feed(b"event: response.created\ndata: {}\n\nevent: error\ndata: {}\n\n") is Seen.ERROR


def test_the_end_of_the_body_ends_the_event() -> None:
    opening = Opening(SSE)
    assert opening.feed(b'data: {"error":{}}') is Seen.NOTHING
    assert opening.end() is Seen.ERROR
    assert Opening(SSE).end() is Seen.NOTHING


def test_any_byte_of_another_body_is_output() -> None:
    assert Opening(b"application/json").feed(b"{") is Seen.OUTPUT
    assert Opening(b"").feed(b": keep-alive\n\n") is Seen.OUTPUT


def test_what_is_held_is_bounded() -> None:
    opening = Opening(SSE)
    assert opening.feed(b":" * OPENING_BYTES_MAX) is Seen.NOTHING
    assert opening.feed(b":") is Seen.OUTPUT


ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
STARTED = b'event: message_start\ndata: {"type":"message_start"}\n\n'
ERROR = b'data: {"error":{"message":"x"}}\n\n'


@pytest.mark.parametrize(
    ("beginning", "has_token"),
    [
        (TOKEN, True),
        (ROLE, True),
        (ROLE + TOKEN, True),
        (b": keep-alive\n\n" + ROLE, True),
        (STARTED + b"event: content_block_start\ndata: {}\n\n", True),
        (b"", False),
        (TOKEN[:-1], False),
        (b": keep-alive\n\n", False),
        (STARTED, False),
        (b"event: message_start\r\ndata: {}\r\n\r\n", False),
        (b"event: message_start\r\ndata: {}\r\n\r\ndata: {}\r\n\r\n", True),
        (b"event: response.created\ndata: {}\n\n" * 3, False),
        (b"event: response.created\ndata: {}\n\n" + b"event: response.failed\ndata: {}\n\n", False),
        (ERROR, False),
        (ERROR + TOKEN, False),
        (ROLE + ERROR, False),
        (b'data: {"choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n', False),
    ],
)
def test_a_first_token_is_shown_by_a_role_and_by_no_preamble_or_error(
    beginning: bytes, *, has_token: bool
) -> None:
    assert shows_first_token(beginning) is has_token


def test_preambles_of_any_length_show_no_token() -> None:
    long = b"event: response.created\ndata: " + b"x" * OPENING_BYTES_MAX + b"\n\n"
    assert not shows_first_token(long)
    assert not shows_first_token(b"data: " + b"x" * OPENING_BYTES_MAX)
