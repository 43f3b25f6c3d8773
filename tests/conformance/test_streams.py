"""Data planes that break off, come out of order or never end: each ends alone, in bounded time."""

import asyncio
import json
from typing import Any

import grpc
import pytest

WAIT_S = 60.0
HEAD = [{"key": ":path", "raw_value": b"/v1/completions"}, {"key": ":method", "raw_value": b"POST"}]
HEADERS = {"request_headers": {"headers": {"headers": HEAD}}}
BODY = {"request_body": {"body": b"{}", "end_of_stream": True}}
RESPONSE = {"response_headers": {"headers": {"headers": [{"key": ":status", "raw_value": b"200"}]}}}


def prompt(target: Any) -> bytes:
    return json.dumps({"model": target.model, "prompt": "word " * 400, "max_tokens": 8}).encode()


async def check_alive(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target))
    assert set(told.destinations) <= target.endpoints


DISORDER = {
    "a body before headers": [BODY],
    "an answer's body before its head": [HEADERS, {"response_body": {"body": b"x", "end_of_stream": True}}],
    "trailers first": [{"request_trailers": {}}],
    "headers twice": [HEADERS, HEADERS],
    "a body after its end": [HEADERS, BODY, BODY],
    "a message of no kind": [{}],
}


@pytest.mark.optional
@pytest.mark.parametrize("order", DISORDER)
async def test_messages_out_of_order_end_this_stream_only(envoy: Any, target: Any, order: str) -> None:
    async with envoy.stream() as stream:
        told = await stream.talk(DISORDER[order], lambda told: told.code is not None)
        if told.refusal is None:
            assert told.code is not grpc.StatusCode.OK, "an error is not taken for a stream that went well"
            assert told.code is not grpc.StatusCode.UNKNOWN, "an exception that nobody expected"
        else:
            assert 400 <= told.status < 600
    await check_alive(envoy, target)


@pytest.mark.parametrize("cut", ["nothing", "headers", "half a body", "a request", "half an answer"])
async def test_a_stream_that_is_half_closed_ends(envoy: Any, target: Any, cut: str) -> None:
    async with envoy.stream() as stream:
        await _go_to(stream, target, cut)
        await stream.end()  # Whatever the status: it comes.
    await check_alive(envoy, target)


@pytest.mark.parametrize("cut", ["nothing", "headers", "half a body", "a request", "half an answer"])
async def test_streams_that_are_reset_leave_nothing_behind(envoy: Any, target: Any, cut: str) -> None:
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(_reset(envoy, target, cut))
    await check_alive(envoy, target)


async def _reset(envoy: Any, target: Any, cut: str) -> None:
    async with envoy.stream() as stream:
        await _go_to(stream, target, cut)


async def _go_to(stream: Any, target: Any, cut: str) -> None:
    body = prompt(target)
    match cut:
        case "headers":
            await stream.send(**HEADERS)
        case "half a body":
            await stream.send(**HEADERS)
            await stream.send(request_body={"body": body[:100]})
        case "a request":
            assert (await stream.ask(body)).refusal is None
        case "half an answer":
            assert (await stream.ask(body)).refusal is None
            told = await stream.talk([RESPONSE], lambda told: bool(told.kinds))
            await stream.send(response_body={"body": b"data: {}\n\n"})
            await stream.hear(told, lambda told: bool(told.body))


@pytest.mark.optional
async def test_a_body_that_never_ends_is_given_up(envoy: Any, target: Any) -> None:
    target.need("has_body_deadline")
    async with envoy.stream() as stream:
        told = await stream.talk(
            [HEADERS, {"request_body": {"body": b'{"model": "'}}], lambda told: told.code is not None
        )
        assert told.status in {408, 503, 504} or told.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unknown_methods_and_headers_do_no_harm(envoy: Any, target: Any) -> None:
    sent = [
        *envoy.post_headers(),
        ("x-odd", "\x7f"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("x-long", "v" * 16_000),
    ]
    told = await envoy.ask(prompt(target), headers=sent)
    assert told.refusal is None or told.status < 500
    await check_alive(envoy, target)


async def test_headers_given_as_value_are_read_too(envoy: Any, target: Any) -> None:
    """Envoy before 1.29, and some other data planes, fill `value` and not `raw_value`."""
    headers = [{"key": ":path", "value": "/v1/completions"}, {"key": ":method", "value": "POST"}]
    async with envoy.stream() as stream:
        messages = [
            {"request_headers": {"headers": {"headers": headers}}},
            {"request_body": {"body": prompt(target), "end_of_stream": True}},
        ]
        told = await stream.talk(messages, lambda told: any(is_last for _, is_last in told.pieces))
        assert set(told.destinations) <= target.endpoints
