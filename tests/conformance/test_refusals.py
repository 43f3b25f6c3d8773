"""Calls that are not served: protocol 004 v1.0.0, "Destination Endpoint"; else statuses of llm-d's picker."""

import asyncio
import json
from typing import Any

import pytest

WAIT_S = 60.0


def call(model: str, **more: Any) -> bytes:
    return json.dumps({"model": model, "prompt": "word " * 100, "max_tokens": 8, **more}).encode()


async def test_overload_is_429_until_there_is_room(envoy: Any, target: Any) -> None:
    model = target.need("model_full")
    async with envoy.stream() as holder:
        first = await holder.ask(call(model))
        assert first.refusal is None
        second = await envoy.ask(call(model))
        assert second.status == 429
        assert second.kinds == ["immediate_response"]
    async with asyncio.timeout(WAIT_S):  # The first is over: its stream was reset.
        while (await envoy.ask(call(model))).status == 429:
            await asyncio.sleep(0.02)


async def test_an_answer_that_ended_makes_room(envoy: Any, target: Any) -> None:
    model = target.need("model_full")
    async with envoy.stream() as stream, asyncio.timeout(WAIT_S):
        first = await stream.ask(call(model))
        headers = [(":status", "200"), ("content-type", "application/json")]
        await stream.answer([b"{}"], headers=headers, served=first.destinations[0])
        await stream.end()
        while (await envoy.ask(call(model))).status == 429:
            await asyncio.sleep(0.02)


@pytest.mark.optional
@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff", b"[" * 100_000, b"null", b'"text"', b"[1]", b"", b"{} {}"],
    ids=lambda b: repr(b[:6]),
)
async def test_a_body_that_is_no_call_is_400(envoy: Any, target: Any, body: bytes) -> None:
    told = await envoy.ask(body)
    assert told.status == 400
    assert told.kinds == ["immediate_response"]


@pytest.mark.optional
async def test_a_body_that_is_too_long_is_413(envoy: Any, target: Any) -> None:
    """Refused as it comes, before its end."""
    size = target.need("body_bytes_max")
    piece = b" " * 65_536
    endless = [piece] * (size // len(piece) + 3)
    told = await envoy.ask(b"", chunks=endless)
    assert told.status == 413
    assert told.kinds == ["immediate_response"]


@pytest.mark.optional
async def test_a_model_that_nobody_serves_is_404(envoy: Any, target: Any) -> None:
    told = await envoy.ask(call("no/such-model"))
    assert told.status == 404


@pytest.mark.optional
async def test_a_refusal_is_openais_json(envoy: Any, target: Any) -> None:
    told = await envoy.ask(b"{")
    assert {"message", "type", "code"} <= set(json.loads(told.refusal.body)["error"])
    set_headers = told.refusal.headers.set_headers
    shown = {each.header.key.lower(): each.header.raw_value.decode() for each in set_headers}
    assert shown["content-type"] == "application/json"


async def test_a_refusal_does_not_show_the_prompt(envoy: Any, target: Any) -> None:
    secret = "xyzzy-plugh"
    body = json.dumps({"model": target.model, "prompt": secret, "max_tokens": "many"})
    for broken in (body, body[:-1]):
        told = await envoy.ask(broken.encode())
        assert told.refusal is None or secret not in str(told.refusal)
