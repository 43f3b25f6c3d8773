"""The server's edge as ASGI sees it: read a body, notice a client that has gone, answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from pdcoord.wire.errors import BodyTooLargeError
from pdcoord.wire.room import ByteRoom

# ASGI 3.0, HTTP specification 2.3.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientGoneError(Exception):
    """The client closed its connection: nobody is left to answer."""


class NoRoomError(Exception):
    """The bodies of all calls together are as large as they may be."""


class BodyTimeoutError(ClientGoneError):
    """The client is still connected but did not send its whole body in time; 408 may be answered."""


async def read_body(
    receive: Receive, *, bytes_max: int, timeout_s: float, room: ByteRoom | None = None
) -> bytes:
    """The whole request body.

    Args:
        room: what the body takes of it is the caller's to give back, `len` of what is returned.

    Raises:
        BodyTooLargeError: as soon as more than bytes_max have come.
        NoRoomError: as soon as there is no room for more.
        ClientGoneError: if the client leaves first.
        BodyTimeoutError: if the body has not come whole within timeout_s.
    """
    parts: list[bytes] = []
    is_whole = False
    try:
        async with asyncio.timeout(timeout_s):
            await _read_parts(receive, parts, bytes_max, room)
        is_whole = True
        return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError as error:
        raise BodyTimeoutError(f"the body had not come whole after {timeout_s:g} s") from error
    finally:
        if room is not None and not is_whole:
            room.give(sum(map(len, parts)))


async def _read_parts(receive: Receive, parts: list[bytes], bytes_max: int, room: ByteRoom | None) -> None:
    count = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left before its body had come whole")
        part = message.get("body", b"")
        count += len(part)
        if count > bytes_max:
            raise BodyTooLargeError(bytes_max)
        if room is not None and not room.take(len(part)):
            raise NoRoomError
        parts.append(part)
        if not message.get("more_body", False):
            return


async def watch_disconnect(receive: Receive) -> None:
    """Return when the client has gone, or the response has ended; call it after the body has been read."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


async def send_head(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Begin a response; without a content-length among the headers its body is sent chunked."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def send_json(
    send: Send, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A whole response; content-length is ours, content-type JSON unless the headers have one."""
    fields = [pair for pair in headers if pair[0] != b"content-length"]
    if all(name != b"content-type" for name, _ in fields):
        fields.append((b"content-type", b"application/json"))
    fields.append((b"content-length", b"%d" % len(body)))
    await send_head(send, status, fields)
    await send({"type": "http.response.body", "body": body, "more_body": False})
