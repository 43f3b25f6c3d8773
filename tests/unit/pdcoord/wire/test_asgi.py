"""The server's edge: bodies read, clients missed, answers begun."""

import asyncio
from collections.abc import Sequence

import pytest

from pdcoord.wire.asgi import (
    BodyTimeoutError,
    ClientGoneError,
    Message,
    NoRoomError,
    Receive,
    read_body,
    send_head,
    send_json,
    watch_disconnect,
)
from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.room import ByteRoom

DISCONNECT = {"type": "http.disconnect"}


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def source(messages: Sequence[Message]) -> Receive:
    """An ASGI receive that gives these and then waits for ever."""
    left = list(messages)

    async def receive() -> Message:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    return receive


class Sent:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)


@pytest.mark.parametrize(
    ("messages", "body"),
    [
        ([part(b"abc")], b"abc"),
        ([part(b"a", more=True), part(b"", more=True), part(b"bc")], b"abc"),
        ([{"type": "http.request"}], b""),
    ],
)
async def test_reads_a_body_in_one_part_or_many(messages: list[Message], body: bytes) -> None:
    assert await read_body(source(messages), bytes_max=3, timeout_s=5.0) == body


async def test_a_body_past_its_limit_is_refused_before_its_end() -> None:
    endless = source([part(b"ab", more=True), part(b"cd", more=True)])
    with pytest.raises(BodyTooLargeError) as caught:
        await read_body(endless, bytes_max=3, timeout_s=5.0)
    assert caught.value.bytes_max == 3


async def test_a_client_that_leaves_inside_its_body_is_noticed() -> None:
    with pytest.raises(ClientGoneError) as caught:
        await read_body(source([part(b"ab", more=True), DISCONNECT]), bytes_max=9, timeout_s=5.0)
    assert not isinstance(caught.value, BodyTimeoutError)


async def test_a_body_that_never_ends_times_out() -> None:
    with pytest.raises(BodyTimeoutError, match=r"0\.01 s"):
        await read_body(source([part(b"ab", more=True)]), bytes_max=9, timeout_s=0.01)


async def test_a_body_holds_room_until_its_reader_gives_it_back() -> None:
    room = ByteRoom(4)
    messages = [part(b"ab", more=True), part(b"c")]
    body = await read_body(source(messages), bytes_max=9, timeout_s=5.0, room=room)
    assert room.held_bytes == 3
    with pytest.raises(NoRoomError):
        await read_body(source(messages), bytes_max=9, timeout_s=5.0, room=room)
    assert room.held_bytes == 3
    room.give(len(body))
    assert room.held_bytes == 0


@pytest.mark.parametrize("end", ["left", "large", "slow"])
async def test_a_body_that_did_not_come_whole_holds_no_room(end: str) -> None:
    room = ByteRoom(100)
    more = {"left": [DISCONNECT], "large": [part(b"x" * 9)], "slow": []}[end]
    with pytest.raises((ClientGoneError, BodyTooLargeError)):
        await read_body(source([part(b"ab", more=True), *more]), bytes_max=9, timeout_s=0.01, room=room)
    assert room.held_bytes == 0


async def test_watching_ends_with_the_disconnect_only() -> None:
    async with asyncio.timeout(5.0):
        await watch_disconnect(source([part(b""), part(b""), DISCONNECT]))


async def test_json_has_its_length_and_type() -> None:
    sent = Sent()
    await send_json(sent, 404, b"{}", [(b"x-a", b"1"), (b"content-length", b"7")])
    start, body = sent.messages
    assert start["status"] == 404
    assert start["headers"] == [
        (b"x-a", b"1"),
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
    ]
    assert (body["body"], body["more_body"]) == (b"{}", False)


async def test_a_content_type_that_is_given_stays_the_only_one() -> None:
    sent = Sent()
    await send_json(sent, 200, b"x", [(b"content-type", b"text/plain")])
    assert [v for n, v in sent.messages[0]["headers"] if n == b"content-type"] == [b"text/plain"]


async def test_a_head_begins_a_response() -> None:
    sent = Sent()
    await send_head(sent, 200, iter([(b"a", b"b")]))
    assert sent.messages == [{"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}]
