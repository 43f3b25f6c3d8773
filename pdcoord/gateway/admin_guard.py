"""Who may ask the admin listener: whoever shows its key."""

import hashlib
import hmac
from collections.abc import Callable

from pdcoord.front.keys import KeyFault, presented_key
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.wire.asgi import App, Receive, Scope, Send, send_json

_UNAUTHORIZED = Refusal(
    RefuseReason.UNAUTHORIZED,
    "The admin listener needs its key; send it as Authorization: Bearer KEY (commands: --admin-key-file).",
)


def guarded(app: App, key: Callable[[], bytes | None], refused: Callable[[KeyFault], None]) -> App:
    """An app that only answers those who show a key.

    Args:
        key: the key in force; None lets everybody in.
        refused: hears of everybody who was not let in.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        expected = key()
        if expected is not None and scope["type"] == "http":
            fault = _fault(scope, expected)
            if fault is not None:
                refused(fault)
                await send_json(send, _UNAUTHORIZED.status, _UNAUTHORIZED.body(), _UNAUTHORIZED.headers())
                return
        await app(scope, receive, send)

    return serve


def _fault(scope: Scope, expected: bytes) -> KeyFault | None:
    presented = presented_key(scope["headers"])
    if isinstance(presented, KeyFault):
        return presented
    # Of hashes, so that neither the key's length nor how much of it was right shows in the time it takes.
    digests = (hashlib.sha256(each).digest() for each in (presented, expected))
    return None if hmac.compare_digest(*digests) else KeyFault.UNKNOWN
