"""The server's edge as ASGI sees it: read a body, notice a client that has gone, answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from pdcoord.wire.errors import BodyTooLargeError

# ASGI 3.0, HTTP specification 2.3.
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientGoneError(Exception):
    """The client closed its connection: nobody is left to answer."""


class BodyTimeoutError(ClientGoneError):
    """The client is still connected but did not send its whole body in time; 408 may be answered."""


async def read_body(receive: Receive, *, bytes_max: int, timeout_s: float) -> bytes:
    """The whole request body.

    Raises:
        BodyTooLargeError: as soon as more than bytes_max have come.
        ClientGoneError: if the client leaves first.
        BodyTimeoutError: if the body has not come whole within timeout_s.
    """
    parts: list[bytes] = []
    count = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client left before its body had come whole")
                part = message.get("body", b"")
                count += len(part)
                if count > bytes_max:
                    raise BodyTooLargeError(bytes_max)
                parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError as error:
        raise BodyTimeoutError(f"the body had not come whole after {timeout_s:g} s") from error


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
