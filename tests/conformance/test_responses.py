"""Answers in FULL_DUPLEX_STREAMED: all of it comes back, event by event where it is a stream."""

import asyncio
import json
from typing import Any

import pytest

PIECE_BYTES_MAX = 62_000
WAIT_S = 60.0
STREAM = [(":status", "200"), ("content-type", "text/event-stream")]
WHOLE = [(":status", "200"), ("content-type", "application/json")]


def prompt(target: Any) -> bytes:
    return json.dumps({"model": target.model, "prompt": "word " * 400, "max_tokens": 8}).encode()


def events(target: Any, count: int) -> list[bytes]:
    shown = [{"id": "cmpl-1", "model": target.model, "choices": [{"text": "w", "index": 0}]}] * count
    last = {"id": "cmpl-1", "choices": [], "usage": {"prompt_tokens": 400, "completion_tokens": count}}
    return [b"data: " + json.dumps(each).encode() + b"\n\n" for each in [*shown, last]] + [
        b"data: [DONE]\n\n"
    ]


def check_order(told: Any) -> None:
    assert told.refusal is None
    assert told.kinds == ["response_headers", *["response_body"] * len(told.pieces)]
    assert max(length for length, _ in told.pieces) <= PIECE_BYTES_MAX
    assert [is_last for _, is_last in told.pieces] == [False] * (len(told.pieces) - 1) + [True]


async def test_a_stream_comes_back_whole(envoy: Any, target: Any) -> None:
    sent = events(target, 50)
    async with envoy.stream() as stream:
        picked = (await stream.ask(prompt(target))).destinations
        told = await stream.answer([*sent, b""], headers=STREAM, served=picked[0])
        check_order(told)
        assert told.body == b"".join(sent)
        assert (await stream.end()).name == "OK"


async def test_each_event_comes_back_before_the_next_is_sent(envoy: Any, target: Any) -> None:
    """Streaming mode: a picker that holds events back until the end would take the stream's point away."""
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.talk([head(STREAM)], lambda told: told.kinds == ["response_headers"])
        for event in events(target, 5):
            before, until = len(told.body), len(told.body) + len(event)
            await stream.send(response_body={"body": event})
            await stream.hear(told, lambda told, until=until: len(told.body) >= until)
            assert told.refusal is None
            assert told.body[before:] == event
        await stream.send(response_body={"body": b"", "end_of_stream": True})
        await stream.hear(told, lambda told: told.pieces[-1][1])
        check_order(told)


def head(headers: list[tuple[str, str]], *, is_last: bool = False) -> dict[str, Any]:
    values = [{"key": key, "raw_value": value.encode()} for key, value in headers]
    return {"response_headers": {"headers": {"headers": values}, "end_of_stream": is_last}}


async def test_events_that_are_cut_anywhere_come_back(envoy: Any, target: Any) -> None:
    whole = b"".join(events(target, 20))
    chunks = [whole[start : start + 37] for start in range(0, len(whole), 37)]
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.answer(chunks, headers=STREAM, served=None)
        check_order(told)
        assert told.body == whole


@pytest.mark.parametrize("size", [2, 500, 61_999, 62_001, 65_536, 400_000])
async def test_a_whole_answer_comes_back_in_pieces_that_envoy_takes(
    envoy: Any, target: Any, size: int
) -> None:
    whole = json.dumps({"choices": [{"text": "w" * size}]}).encode()
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        chunks = [whole[start : start + 65_536] for start in range(0, len(whole), 65_536)]
        told = await stream.answer(chunks, headers=WHOLE, served=None)
        check_order(told)
        assert told.body == whole
        assert (await stream.end()).name == "OK"


@pytest.mark.parametrize(
    "body", [b"", b"not json", b"\xff\xfe\x00", b"data: {", b'{"usage": "none"}', b"[1, 2]"], ids=repr
)
@pytest.mark.parametrize("headers", [STREAM, WHOLE], ids=["stream", "whole"])
async def test_a_body_that_cannot_be_read_comes_back_too(
    envoy: Any, target: Any, headers: list[tuple[str, str]], body: bytes
) -> None:
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.answer([body], headers=headers, served=None)
        assert told.refusal is None
        assert told.body == body


async def test_trailers_are_answered_after_the_body(envoy: Any, target: Any) -> None:
    sent = events(target, 5)
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.answer(sent, headers=STREAM, served=None, has_trailers=True)
        assert told.refusal is None
        assert told.body == b"".join(sent)
        assert told.kinds[0] == "response_headers"
        assert told.kinds[-1] == "response_trailers"
        assert not any(is_last for _, is_last in told.pieces)


async def test_an_answer_without_a_body(envoy: Any, target: Any) -> None:
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.answer([], headers=[(":status", "204")], served=None)
        assert told.kinds == ["response_headers"]
        assert (await stream.end()).name == "OK"


@pytest.mark.parametrize("status", ["400", "429", "500", "503"])
async def test_an_engines_error_comes_back_as_it_is(envoy: Any, target: Any, status: str) -> None:
    """Once an engine answers, its answer is the client's."""
    body = b'{"error": {"message": "no", "type": "x", "param": null, "code": null}}'
    headers = [(":status", status), ("content-type", "application/json"), ("x-engine", "1")]
    async with envoy.stream() as stream:
        await stream.ask(prompt(target))
        told = await stream.answer([body], headers=headers, served=None)
        check_order(told)
        assert told.body == body
        assert told.headers(headers)["x-engine"] == "1"
        assert told.headers(headers)[":status"] == status


async def test_an_answer_without_a_request_comes_back(envoy: Any, target: Any) -> None:
    """Where a filter before ext_proc answers (authentication, a rate limit), Envoy shows only the answer."""
    body = b'{"error": {"message": "who are you?"}}'
    headers = [(":status", "401"), ("content-type", "application/json"), ("www-authenticate", "Bearer")]
    async with envoy.stream() as stream:
        told = await stream.answer([body], headers=headers, served=None)
        check_order(told)
        assert told.body == body
        assert told.headers(headers).items() >= dict(headers).items()
        assert (await stream.end()).name == "OK"


async def test_a_data_plane_may_skip_the_response(envoy: Any, target: Any) -> None:
    async with envoy.stream() as stream:
        assert (await stream.ask(prompt(target))).refusal is None
        assert (await stream.end()).name == "OK"


async def test_streams_beside_each_other_are_not_mixed_up(envoy: Any, target: Any) -> None:
    """Many calls at once on one connection, each with a body and an answer of its own."""
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        for index in range(100):
            group.create_task(_one(envoy, target, index))


async def _one(envoy: Any, target: Any, index: int) -> None:
    text = f"call {index} " * 3_000
    body = json.dumps({"model": target.model, "prompt": text, "max_tokens": 8}).encode()
    sent = [f"data: {index}-{number}\n\n".encode() for number in range(5)]
    async with envoy.stream() as stream:
        told = await stream.ask(body, chunks=[body[:9_000], body[9_000:]])
        assert told.body == body
        answered = await stream.answer(sent, headers=STREAM, served=told.destinations[0])
        assert answered.body == b"".join(sent)
        assert (await stream.end()).name == "OK"
