"""What is waited for before an answer begins, and what becomes of one that its engine gave up."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from pdcoord.core.events import Outcome, RequestEnded, ResponseBegan
from pdcoord.core.model import Fallback
from pdcoord.gateway.first import UNFINISHED_BYTES_MAX, WHOLE_BYTES_MAX, has_no_event, read_first
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.wire.errors import StreamError
from pdcoord.wire.response import Response

SSE, JSON = b"text/event-stream", b"application/json"
ALIVE = b": alive\n\n"
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
FIRST, SECOND = "10.0.0.2:8000", "10.0.0.4:8000"
DONE = b"data: [DONE]\n\n"
MESSAGES, RESPONSES, CHAT = "/v1/messages", "/v1/responses", "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
ENGINES_ERROR = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"x"}}\n\n'


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


async def test_of_an_answer_in_one_piece_as_much_is_read_first_as_may_be_kept() -> None:
    half = b"x" * (WHOLE_BYTES_MAX // 2)

    async def read(parts: list[bytes], encoding: bytes | None = None) -> bytes:
        upstream = cast("Response", Upstream(parts, JSON, encoding))
        return await read_first(upstream, timeout_s=1.0, is_generated=True)

    assert await read([b'{"a":', b"1}"]) == b'{"a":1}'
    assert await read([half, half, b"y"]) == half + half
    assert await read([b"\x1f", b"\x8b"], b"gzip") == b"\x1f"
    with pytest.raises(StreamError, match="gave the answer up"):
        await read([b'{"type":"message",', b'"stop_reason":null}'])


def event(name: str | None = None, **fields: object) -> bytes:
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(fields).encode() + b"\n\n"


def body(path: str, **changes: object) -> bytes:
    prompts: dict[str, dict[str, object]] = {RESPONSES: {"input": "x"}, COMPLETIONS: {"prompt": "x"}}
    turns = prompts.get(path, {"messages": [{"role": "user", "content": "x"}]})
    return json.dumps({"model": "org/model", "max_tokens": 6, **turns, **changes}).encode()


DELTA = event(
    "content_block_delta", type="content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}
)
STOPPED = event("message_delta", type="message_delta", delta={"stop_reason": "end_turn"}, usage={})
ABORTED = event("message_delta", type="message_delta", delta={"stop_reason": None}, usage={})
STOP = event("message_stop", type="message_stop")
SAID = event("response.output_text.delta", type="response.output_text.delta", delta="a", sequence_number=4)
CANCELLED = event(
    "response.completed", response={"status": "cancelled"}, sequence_number=5, type="response.completed"
)
HALF = event(choices=[{"index": 0, "delta": {"content": "a"}, "finish_reason": None}])
GIVEN_UP = event(choices=[{"index": 1, "delta": {"content": ""}, "finish_reason": "abort"}])


def errors_of(answer: bytes) -> list[dict[str, Any]]:
    """The data of events that say `error`."""
    data = [part.rpartition(b"data: ")[2] for part in answer.split(b"\n\n") if part]
    return [said for said in (json.loads(each) for each in data if each != b"[DONE]") if "error" in said]


@pytest.mark.parametrize("is_continued", [True, False])
@pytest.mark.parametrize(
    ("path", "changes", "chunks", "told"),
    [
        (MESSAGES, {}, [DELTA, ABORTED, STOP], ["stream-lost"]),
        (MESSAGES, {}, [DELTA, ENGINES_ERROR], [None]),
        (MESSAGES, {}, [DELTA, event(error={"message": "x"}), DONE], [None]),
        (RESPONSES, {}, [SAID, CANCELLED], ["stream-lost"]),
        (RESPONSES, {}, [SAID, event("error", type="error", error={}, sequence_number=5)], [None]),
        (CHAT, {"n": 2}, [HALF, GIVEN_UP, event(choices=[], usage={}), DONE], ["stream-lost"]),
        (CHAT, {"n": 2}, [HALF, event(error={"message": "x"}), DONE], [None]),
    ],
)
async def test_a_stream_that_its_engine_gave_up_is_no_whole_one(
    stage: Any, reply: Any, path: str, changes: Any, chunks: Any, told: Any, *, is_continued: bool
) -> None:
    if not is_continued:
        stage.coordination.served = replace(stage.coordination.served, fallback=Fallback(rungs=()))
    stage.upstream.script = [reply(headers=STREAM, chunks=chunks)]
    answer = await stage.call(path, body(path, stream=True, **changes))
    assert answer.body.startswith(b"".join(chunks))
    assert not answer.is_complete
    assert [said["error"].get("code") for said in errors_of(answer.body)] == told, "one error, and no more"
    (record,) = stage.observer.records
    assert (record.outcome, record.reason) == (Outcome.UPSTREAM_ERROR, RefuseReason.STREAM_LOST)
    ended = stage.coordination.events[-1]
    assert isinstance(ended, RequestEnded)
    assert ended.outcome is Outcome.UPSTREAM_ERROR


@pytest.mark.parametrize(
    ("path", "chunks"),
    [
        (MESSAGES, [DELTA, STOPPED, STOP]),
        (RESPONSES, [SAID, CANCELLED.replace(b"cancelled", b"completed")]),
        (CHAT, [HALF, GIVEN_UP.replace(b"abort", b"length"), DONE]),
    ],
)
async def test_a_stream_that_was_not_is_whole(stage: Any, reply: Any, path: str, chunks: list[bytes]) -> None:
    stage.upstream.script = [reply(headers=STREAM, chunks=chunks)]
    answer = await stage.call(path, body(path, stream=True, **({"n": 2} if path == CHAT else {})))
    assert (answer.body, answer.is_complete) == (b"".join(chunks), True)
    assert stage.observer.records[0].outcome is Outcome.OK


@pytest.mark.parametrize(
    ("path", "given_up"),
    [
        (MESSAGES, {"type": "message", "content": []}),
        (RESPONSES, {"object": "response", "status": "cancelled"}),
        (CHAT, {"choices": [{"finish_reason": "abort"}]}),
    ],
)
async def test_an_answer_in_one_piece_that_was_given_up_comes_from_elsewhere(
    stage: Any, reply: Any, path: str, given_up: object
) -> None:
    stage.coordination.script = [FIRST, SECOND]
    half = json.dumps(given_up).encode()
    stage.upstream.script = [reply(chunks=[half[:9], half[9:]]), reply(chunks=[b'{"ok":', b"true}"])]
    answer = await stage.call(path, body(path))
    assert (answer.status, answer.body, answer.is_complete) == (200, b'{"ok":true}', True)
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed", "ResponseBegan", "RequestEnded"]
    assert stage.coordination.events[1].reason is RungReason.DECODE_ERROR


async def test_an_answer_in_one_piece_that_breaks_off_comes_from_elsewhere(stage: Any, reply: Any) -> None:
    stage.coordination.script = [FIRST, SECOND]
    stage.upstream.script = [reply(chunks=[b'{"o', StreamError("gone")]), reply(chunks=[b"{}"])]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"{}", True)


async def test_a_broken_message_ends_in_anthropics_error_event(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=STREAM, chunks=[DELTA, StreamError("gone")])]
    answer = await stage.call(MESSAGES, body(MESSAGES, stream=True))
    name, _, data = answer.body.removeprefix(DELTA).partition(b"\ndata: ")
    said = json.loads(data)
    assert (name, said["type"], said["error"]["type"]) == (b"event: error", "error", "api_error")
    assert said["error"]["code"] == "stream-lost"


async def test_a_broken_response_ends_in_a_numbered_error_event(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=STREAM, chunks=[SAID, StreamError("gone")])]
    answer = await stage.call(RESPONSES, body(RESPONSES, stream=True))
    name, _, data = answer.body.removeprefix(SAID).partition(b"\ndata: ")
    said = json.loads(data)
    assert (name, said["type"], said["code"], said["sequence_number"]) == (
        b"event: error",
        "error",
        "stream-lost",
        5,
    )


async def test_a_refusal_of_a_message_is_in_anthropics_form(stage: Any, reply: Any) -> None:
    stage.coordination.script = [Refusal(RefuseReason.QUEUE_FULL, "full", retry_after_s=2)]
    answer = await stage.call(MESSAGES, body(MESSAGES))
    said = json.loads(answer.body)
    assert (answer.status, said["type"], said["error"]["type"]) == (429, "error", "rate_limit_error")
    assert (said["error"]["code"], said["error"]["message"]) == ("queue-full", "full")
    stage.coordination.script = [FIRST]
    stage.upstream.script = [reply(status=404, chunks=[b'{"detail":"Not Found"}'])]
    said = json.loads((await stage.call(MESSAGES, body(MESSAGES))).body)
    assert (said["type"], said["error"]["code"]) == ("error", "not-served")


TOKEN = b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
CREATED = b'event: response.created\ndata: {"sequence_number":0,"type":"response.created"}\n\n'
STARTED = b'event: message_start\ndata: {"type":"message_start"}\n\n'
FAILED = b'data: {"error":{"message":"x","code":500}}\n\n'
GZIPPED = [*STREAM, (b"content-encoding", b"gzip")]


@pytest.mark.parametrize(
    ("path", "headers", "chunks", "has_output"),
    [
        (COMPLETIONS, STREAM, [TOKEN, DONE], True),
        (COMPLETIONS, STREAM, [ALIVE, TOKEN, DONE], True),
        (COMPLETIONS, STREAM, [FAILED, DONE], False),
        (COMPLETIONS, GZIPPED, [TOKEN, DONE], False),
        (CHAT, STREAM, [ROLE, DONE], True),
        (RESPONSES, STREAM, [CREATED, SAID], False),
        (RESPONSES, STREAM, [CREATED + SAID], True),
        (MESSAGES, STREAM, [STARTED, DELTA], False),
        (MESSAGES, STREAM, [STARTED + DELTA], True),
        (MESSAGES, STREAM, [ENGINES_ERROR], False),
    ],
)
async def test_the_core_hears_of_output_where_the_first_of_a_stream_shows_some(
    stage: Any,
    reply: Any,
    path: str,
    headers: list[tuple[bytes, bytes]],
    chunks: list[bytes],
    *,
    has_output: bool,
) -> None:
    stage.upstream.script = [reply(headers=headers, chunks=chunks)]
    await stage.call(path, body(path, stream=True))
    assert stage.coordination.events[1] == ResponseBegan("made-1", None, has_output=has_output)


@pytest.mark.parametrize("status", [200, 400])
async def test_an_answer_in_one_piece_tells_the_core_of_no_output(
    stage: Any, reply: Any, status: int
) -> None:
    stage.upstream.script = [reply(status=status)]
    assert (await stage.call()).status == status
    assert stage.coordination.events[1] == ResponseBegan("made-1", None, has_output=False)


async def test_an_error_answer_to_a_stream_tells_the_core_of_no_output(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(status=400, headers=STREAM, chunks=[TOKEN])]
    assert (await stage.call(body=body(COMPLETIONS, stream=True))).status == 400
    assert stage.coordination.events[1] == ResponseBegan("made-1", None, has_output=False)
