"""The side channel of an emulated engine: where consumers ask for KV, and SGLang's bootstrap server."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from pdcoord.sim.emulator_edge import run_while_connected
from pdcoord.sim.emulator_host import EngineHost, HostOf, Mailbox, ProducerWord
from pdcoord.sim.emulator_peers import (
    HANDSHAKE,
    HEARTBEAT,
    PULL,
    PULL_DONE,
    RELEASE,
    DenyLine,
    GrantLine,
    HeartbeatCall,
    Line,
    PullCall,
    PullDoneCall,
    ReleaseCall,
    ShareLine,
)
from pdcoord.sim.messages import (
    DenyPull,
    GrantPull,
    HeartbeatHeard,
    PullAsked,
    PullClosed,
    ReleaseHeard,
    TellShare,
)
from pdcoord.wire.asgi import ClientGoneError, Receive, Scope, Send, read_body, send_head, send_json
from pdcoord.wire.errors import BodyTooLargeError

_BODY_BYTES_MAX = 1 << 20
_BODY_S_MAX = 5.0
_NDJSON = [(b"content-type", b"application/x-ndjson")]
T = TypeVar("T")


class SideChannel:
    """An ASGI app over whichever host lives."""

    def __init__(self, host_of: HostOf) -> None:
        self._host_of = host_of
        self._posts: dict[str, Callable[[bytes, Receive, Send], Awaitable[None]]] = {
            PULL: self._pull,
            PULL_DONE: self._pull_done,
            HEARTBEAT: self._heartbeat,
            RELEASE: self._release,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] == "GET":
            await self._get(path, send)
            return
        handler = self._posts.get(path)
        if handler is None:
            await send_json(send, 404, b'{"error":"unknown path"}')
            return
        try:
            body = await read_body(receive, bytes_max=_BODY_BYTES_MAX, timeout_s=_BODY_S_MAX)
            await handler(body, receive, send)
        except ClientGoneError:
            return
        except BodyTooLargeError:
            await send_json(send, 413, b'{"error":"body too large"}')
        except msgspec.DecodeError:
            await send_json(send, 400, b'{"error":"malformed body"}')

    async def _get(self, path: str, send: Send) -> None:
        if path == HANDSHAKE:
            await send_json(send, 200, msgspec.json.encode(self._host_of().model.info))
        elif path == "/health":
            await send_json(send, 200, b"{}")
        else:
            await send_json(send, 404, b'{"error":"unknown path"}')

    async def _pull(self, body: bytes, receive: Receive, send: Send) -> None:
        call = msgspec.json.decode(body, type=PullCall)
        host = self._host_of()
        try:
            words = host.open_words(call.pull_id)
        except ValueError:
            await send_json(send, 409, b'{"error":"pull is open already"}')
            return
        try:
            host.post(PullAsked(call.pull_id, call.ask))
            await send_head(send, 200, _NDJSON)
            await run_while_connected(receive, _tell(host, words, send))
        finally:
            # One that was closed by /pull/done is unknown to the model by now.
            host.close_words(call.pull_id)
            host.post(PullClosed(call.pull_id, is_done=False))

    async def _pull_done(self, body: bytes, _receive: Receive, send: Send) -> None:
        call = msgspec.json.decode(body, type=PullDoneCall)
        host = self._host_of()
        host.post(PullClosed(call.pull_id, is_done=True))
        host.close_words(call.pull_id)
        await send_json(send, 200, b"{}")

    async def _heartbeat(self, body: bytes, _receive: Receive, send: Send) -> None:
        call = msgspec.json.decode(body, type=HeartbeatCall)
        self._host_of().post(HeartbeatHeard(call.engine_id, call.request_ids))
        await send_json(send, 200, b"{}")

    async def _release(self, body: bytes, _receive: Receive, send: Send) -> None:
        call = msgspec.json.decode(body, type=ReleaseCall)
        self._host_of().post(ReleaseHeard(call.engine_id, call.request_id))
        await send_json(send, 200, b"{}")


async def _tell(host: EngineHost, words: Mailbox[ProducerWord], send: Send) -> None:
    """Send the producer's words for one pull until the last."""
    patience_s = 2 * host.model.settings.pull_s_max
    while True:
        try:
            word = await words.get(timeout_s=patience_s)
        except TimeoutError:
            word = None  # Past every deadline of the models: this consumer is lost.
        line: Line | None = None
        match word:
            case GrantPull():
                line = GrantLine(word.grant)
            case TellShare():
                line = ShareLine(word.share_bytes_per_s)
            case DenyPull():
                line = DenyLine(word.reason)
            case None:
                pass
        is_last = not isinstance(line, GrantLine | ShareLine)
        body = b"" if line is None else msgspec.json.encode(line) + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})
        if is_last:
            return
