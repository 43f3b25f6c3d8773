"""How an emulated engine reaches the side channels of others: one HTTP call for each word it has to say."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.counters import EngineCounters
from pdcoord.sim.messages import (
    AskHandshake,
    AskPull,
    ClosePull,
    DenyReason,
    EngineEvent,
    HandshakeAnswered,
    HandshakeFailed,
    PeerInfo,
    PullAsk,
    PullBroken,
    PullCancelled,
    PullDenied,
    PullGrant,
    PullGranted,
    PullShareChanged,
    SendHeartbeat,
    SendRelease,
)
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError
from transfer.errors import TransferError

HANDSHAKE = "/handshake"
PULL = "/pull"
PULL_DONE = "/pull/done"
HEARTBEAT = "/heartbeat"
RELEASE = "/release"

_CALL_S_MAX = 5.0  # vLLM 0.32 waits as long for a handshake.
_ANSWER_BYTES_MAX = 1 << 20


class PullCall(msgspec.Struct, frozen=True):
    """Body of a pull: the answer is a stream of lines until it is over."""

    pull_id: str
    ask: PullAsk


class PullDoneCall(msgspec.Struct, frozen=True):
    """Body of the word that everything has arrived."""

    pull_id: str


class HeartbeatCall(msgspec.Struct, frozen=True):
    """Body of a heartbeat."""

    engine_id: str
    request_ids: tuple[str, ...]


class ReleaseCall(msgspec.Struct, frozen=True):
    """Body of the word that a ticket will not be used."""

    engine_id: str
    request_id: str


class GrantLine(msgspec.Struct, frozen=True, tag="granted"):
    """The producer consents."""

    grant: PullGrant


class ShareLine(msgspec.Struct, frozen=True, tag="share"):
    """The producer's NIC gives more or less now."""

    share_bytes_per_s: float


class DenyLine(msgspec.Struct, frozen=True, tag="denied"):
    """The producer refuses; the last line."""

    reason: DenyReason


Line = GrantLine | ShareLine | DenyLine
_line_decoder = msgspec.json.Decoder(Line)
_info_decoder = msgspec.json.Decoder(PeerInfo)


class Peers:
    """The consumer's end of every side channel."""

    def __init__(
        self,
        client: Client,
        post: Callable[[EngineEvent], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        counters: EngineCounters,
        *,
        patience_s: float,
        admit: Callable[[str], Awaitable[bool]],
    ) -> None:
        """Nothing is dialled yet.

        Args:
            admit: fetches the real bytes of a pull that was granted, where there are any; False if they
                did not come, so that the pull fails.
            post: where answers go.
            counters: where notifications that nobody took are counted.
            patience_s: longest silence of a producer inside a pull; past the model's own deadlines.
        """
        self._client = client
        self._post = post
        self._spawn = spawn
        self._patience_s = patience_s
        self._admit = admit
        self._pulls: dict[str, tuple[HostPort, asyncio.Task[None]]] = {}
        self._counters = counters

    def do(self, effect: AskHandshake | AskPull | ClosePull | SendHeartbeat | SendRelease) -> None:
        """Carry out what the engine asks of a peer; answers come as events."""
        match effect:
            case AskHandshake():
                self._spawn(self._greet(effect.address))
            case AskPull():
                task = self._spawn(self._pull(effect))
                self._pulls[effect.pull_id] = (effect.address, task)
            case ClosePull():
                self._close(effect)
            case SendHeartbeat():
                body = HeartbeatCall(effect.engine_id, effect.request_ids)
                self._spawn(self._notify(effect.address, HEARTBEAT, body))
            case SendRelease():
                released = ReleaseCall(effect.engine_id, effect.request_id)
                self._spawn(self._notify(effect.address, RELEASE, released))

    async def _greet(self, address: HostPort) -> None:
        try:
            async with await self._client.request(
                "GET", address, HANDSHAKE, head_timeout_s=_CALL_S_MAX
            ) as answer:
                body = await answer.read_all(timeout_s=_CALL_S_MAX, bytes_max=_ANSWER_BYTES_MAX)
            if answer.status != 200:
                self._post(HandshakeFailed(address))
                return
            info = _info_decoder.decode(body)
        except (WireError, ValueError, TransferError):
            self._post(HandshakeFailed(address))
        else:
            self._post(HandshakeAnswered(address, info))

    async def _pull(self, asked: AskPull) -> None:
        body = msgspec.json.encode(PullCall(asked.pull_id, asked.ask))
        is_over = False
        try:
            async with await self._client.request(
                "POST", asked.address, PULL, body=body, head_timeout_s=_CALL_S_MAX
            ) as answer:
                rest = b""
                while answer.status == 200 and not is_over:
                    chunk = await answer.read_chunk(idle_timeout_s=self._patience_s)
                    if not chunk:
                        break
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        is_over = is_over or await self._hear(asked.pull_id, line)
        except asyncio.CancelledError:
            is_over = True  # By `_close`, or with the host: the model knows, or hears nothing any more.
            self._post(PullCancelled(asked.pull_id))
            raise
        except (WireError, ValueError):
            pass  # Gone, or no producer of ours: a decode error is a ValueError.
        finally:
            self._pulls.pop(asked.pull_id, None)
            if not is_over:
                self._post(PullBroken(asked.pull_id))

    async def _hear(self, pull_id: str, raw: bytes) -> bool:
        """Pass on one line; whether it is the last."""
        line: Line = _line_decoder.decode(raw)
        match line:
            case GrantLine():
                if not await self._admit(pull_id):
                    self._post(PullDenied(pull_id, DenyReason.BYTES_FAILED))
                    return True
                self._post(PullGranted(pull_id, line.grant))
            case ShareLine():
                self._post(PullShareChanged(pull_id, line.share_bytes_per_s))
            case DenyLine():
                self._post(PullDenied(pull_id, line.reason))
                return True
        return False

    def _close(self, effect: ClosePull) -> None:
        found = self._pulls.get(effect.pull_id)
        if found is None:
            return  # Broken already: the model has heard or will hear.
        address, task = found
        if effect.is_done:
            self._spawn(self._finish(address, effect.pull_id, task))
        else:
            task.cancel()

    async def _finish(self, address: HostPort, pull_id: str, task: asyncio.Task[None]) -> None:
        try:
            await self._notify(address, PULL_DONE, PullDoneCall(pull_id))
        finally:
            task.cancel()

    async def _notify(self, address: HostPort, target: str, body: msgspec.Struct) -> None:
        try:
            async with await self._client.request(
                "POST", address, target, body=msgspec.json.encode(body), head_timeout_s=_CALL_S_MAX
            ) as answer:
                await answer.read_all(timeout_s=_CALL_S_MAX, bytes_max=_ANSWER_BYTES_MAX)
                is_heard = answer.status == 200
        except (WireError, ValueError):
            is_heard = False
        if not is_heard:
            self._counters.failed_notifications += 1
