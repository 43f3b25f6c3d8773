"""Relaying a body: through the server's writer where there is one, through `send` elsewhere."""

from collections.abc import Awaitable
from typing import Any, cast

import pytest

from pdcoord.wire.asgi import Message
from pdcoord.wire.relay import BODY_EXTENSION, relay_body
from pdcoord.wire.response import Response, Sink


class FakeResponse:
    """A body in given parts; what the sink returns is awaited between them."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts
        self.idle_timeout_s = 0.0

    async def pump(self, sink: Sink, *, idle_timeout_s: float, watch: object = None) -> None:
        self.idle_timeout_s = idle_timeout_s
        for part in self.parts:
            pause = sink(part)
            if pause is not None:
                await pause


class Writer:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> Awaitable[None] | None:
        self.written.append(data)
        return None


class Sent:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)


def response(*parts: bytes) -> Response:
    return cast("Response", FakeResponse(list(parts)))


async def test_parts_go_to_the_servers_writer_past_send() -> None:
    writer, sent = Writer(), Sent()
    scope: dict[str, Any] = {"extensions": {BODY_EXTENSION: writer}}
    await relay_body(scope, sent, response(b"a", b"b"), idle_timeout_s=1.0)
    assert writer.written == [b"a", b"b"]
    assert sent.messages == []


@pytest.mark.parametrize("scope", [{}, {"extensions": {}}])
async def test_without_the_extension_each_part_is_a_message(scope: dict[str, Any]) -> None:
    sent = Sent()
    await relay_body(scope, sent, response(b"a", b"b"), idle_timeout_s=1.0)
    assert [(m["body"], m["more_body"]) for m in sent.messages] == [(b"a", True), (b"b", True)]


async def test_a_change_is_applied_to_each_part_and_may_hold_one_back() -> None:
    writer = Writer()
    scope: dict[str, Any] = {"extensions": {BODY_EXTENSION: writer}}
    changes = {b"a": b"", b"b": b"B"}
    await relay_body(scope, Sent(), response(b"a", b"b"), idle_timeout_s=1.0, change=changes.__getitem__)
    assert writer.written == [b"B"]
