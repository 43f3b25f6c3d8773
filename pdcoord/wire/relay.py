"""Pass a response's body on to an ASGI client at the least cost per part."""

from collections.abc import Awaitable, Callable
from typing import Protocol, cast

from pdcoord.wire.asgi import Scope, Send
from pdcoord.wire.response import ProgressWatch, Response

BODY_EXTENSION = "pdcoord.body"
"""Key in an ASGI scope's `extensions` under which `server` offers a `BodyWriter`."""

Change = Callable[[bytes], bytes]


class BodyWriter(Protocol):
    """Writes body bytes of a begun response without a coroutine and a message for each part."""

    def write(self, data: bytes) -> Awaitable[None] | None:
        """Send one part, not empty; what is returned, if anything, is to be awaited before the next."""


async def relay_body(
    scope: Scope,
    send: Send,
    response: Response,
    *,
    idle_timeout_s: float,
    change: Change | None = None,
    watch: ProgressWatch | None = None,
) -> None:
    """Relay the rest of a body to a client whose head was sent; the last, empty part is the caller's to send.

    With pdcoord's own server the parts go straight from socket to socket, past any middleware's `send`;
    under another server each is sent as a message.

    Args:
        change: applied to each part, where one part is what one read has brought; b"" sends nothing.
        watch: looks at the parts from time to time for progress.

    Raises:
        StreamError: as `Response.pump` does; what was relayed stays relayed. What `change` raises is raised.
    """
    writer = cast("BodyWriter | None", scope.get("extensions", {}).get(BODY_EXTENSION))

    def send_part(data: bytes) -> Awaitable[None]:
        return send({"type": "http.response.body", "body": data, "more_body": True})

    write = writer.write if writer is not None else send_part
    if change is None:
        await response.pump(write, idle_timeout_s=idle_timeout_s, watch=watch)
        return

    def write_changed(data: bytes) -> Awaitable[None] | None:
        changed = change(data)
        return write(changed) if changed else None

    await response.pump(write_changed, idle_timeout_s=idle_timeout_s, watch=watch)
