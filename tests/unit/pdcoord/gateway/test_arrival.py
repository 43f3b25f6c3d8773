"""A body has room for as long as it is held, and is refused by what is wrong with it."""

import asyncio
from typing import Any

import pytest

from pdcoord.front.ports import Limits
from pdcoord.gateway.arrival import Body
from pdcoord.protocol.errors import RefusedError, RefuseReason
from pdcoord.wire.room import ByteRoom

LIMITS = Limits(body_bytes_max=10, body_timeout_s=5.0)


async def receive() -> Any:
    await asyncio.sleep(0)
    return {"type": "http.request", "body": b"12345", "more_body": False}


async def test_a_body_holds_its_room_until_it_is_let_go_of() -> None:
    room = ByteRoom(8)
    body = Body(room)
    await body.read([], receive, LIMITS)
    assert (body.raw, room.held_bytes) == (b"12345", 5)
    body.raw = b"changed to something longer"
    with pytest.raises(RefusedError) as caught:
        await Body(room).read([], receive, LIMITS)
    assert caught.value.refusal.reason is RefuseReason.SATURATED
    for _ in range(2):
        body.let_go()
        assert (body.raw, room.held_bytes) == (b"", 0)


async def test_a_length_that_is_too_much_is_refused_unread() -> None:
    async def never() -> Any:
        raise AssertionError

    with pytest.raises(RefusedError) as caught:
        await Body(ByteRoom(8)).read([(b"content-length", b"11")], never, LIMITS)
    assert caught.value.refusal.reason is RefuseReason.BODY_TOO_LARGE
