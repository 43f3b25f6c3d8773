"""KV events of an emulated engine on ZMQ, as vLLM publishes them.

Frames `[topic, sequence as 8 bytes big-endian, msgpack of [ts, events, data_parallel_rank]]`; events as maps
with `type` (vLLM 0.32) or as arrays with the type first (earlier). Replay: a request `[b"", first sequence]`
to the ROUTER is answered with `[b"", topic, sequence, payload]` for each batch kept, then with sequence -1.
"""

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from pdcoord.sim.kvpool import AllCleared, BlocksRemoved, BlocksStored, PoolEvent
from pdcoord.sim.tokens import BlockHash

BATCHES_KEPT = 10_000  # vLLM's buffer_steps.
HIGH_WATER_MARK = 100_000  # vLLM's hwm.
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_MEDIUM = "GPU"


@dataclass(frozen=True, slots=True)
class KvEventForm:
    """How events are written.

    Attributes:
        is_map: vLLM 0.32's form; arrays otherwise.
        has_int_hashes: the low 64 bits in place of the bytes.
    """

    is_map: bool = True
    has_int_hashes: bool = False

    def hash(self, block_hash: BlockHash) -> bytes | int:
        return int.from_bytes(block_hash[-8:], "big") if self.has_int_hashes else block_hash

    def encode(self, events: tuple[PoolEvent, ...], at_s: float) -> bytes:
        """The payload of one batch; `at_s` is wall-clock time."""
        return msgspec.msgpack.encode([at_s, [self._event(event) for event in events], 0])

    def _event(self, event: PoolEvent) -> Any:
        match event:
            case BlocksStored():
                parent = None if event.parent is None else self.hash(event.parent)
                fields: dict[str, Any] = {
                    "block_hashes": [self.hash(each) for each in event.hashes],
                    "parent_block_hash": parent,
                    "token_ids": list(event.token_ids),
                    "block_size": event.block_tokens,
                    "lora_id": None,
                    "medium": _MEDIUM,
                }
                return self._tagged("BlockStored", fields)
            case BlocksRemoved():
                hashes = [self.hash(each) for each in event.hashes]
                return self._tagged("BlockRemoved", {"block_hashes": hashes, "medium": _MEDIUM})
            case AllCleared():
                return self._tagged("AllBlocksCleared", {})

    def _tagged(self, kind: str, fields: dict[str, Any]) -> Any:
        if not self.is_map:
            return [kind, *fields.values()]
        # Optional fields that are not set are left out; the parent is not optional.
        set_fields = {n: v for n, v in fields.items() if v is not None or n == "parent_block_hash"}
        return {"type": kind, **set_fields}


class KvEventPublisher:
    """A PUB socket and, if asked for, a ROUTER that replays; used as `async with`.

    Attributes:
        address, replay_address: with the port that the kernel picked in place of 0.
        topic: first frame of what is published from now on.
    """

    def __init__(
        self, host: str, port: int, *, topic: str, form: KvEventForm, replay_port: int | None = None
    ) -> None:
        self.address = _zmq_address(host, port)
        self.replay_address = None if replay_port is None else _zmq_address(host, replay_port)
        self.topic = topic
        self._form = form
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=BATCHES_KEPT)
        self._sequence = 0
        self._context = zmq.asyncio.Context()
        self._publisher: zmq.Socket[bytes] | None = None
        self._router: zmq.asyncio.Socket | None = None

    async def __aenter__(self) -> Self:
        try:
            self._publisher = zmq.Context(self._context).socket(zmq.PUB)
            self._publisher.set(zmq.SNDHWM, HIGH_WATER_MARK)
            self._publisher.set(zmq.LINGER, 0)
            self._publisher.bind(self.address)
            self.address = _endpoint(self._publisher)
            if self.replay_address is not None:
                self._router = self._context.socket(zmq.ROUTER)
                self._router.set(zmq.LINGER, 0)
                self._router.bind(self.replay_address)
                self.replay_address = _endpoint(self._router)
        except zmq.ZMQError as error:
            self._close()
            raise OSError(f"cannot publish KV events on {self.address}: {error}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for socket in (self._publisher, self._router):
            if socket is not None:
                socket.close(linger=0)
        self._publisher = self._router = None
        self._context.term()

    def publish(self, events: tuple[PoolEvent, ...], at_s: float) -> None:
        """Send one batch; never blocks, a subscriber that is too slow loses batches."""
        payload = self._form.encode(events, at_s)
        sequence, self._sequence = self._sequence, self._sequence + 1
        self._kept.append((sequence, payload))
        if self._publisher is not None:
            frames = [self.topic.encode(), sequence.to_bytes(8, "big"), payload]
            self._publisher.send_multipart(frames, zmq.NOBLOCK)

    async def serve_replay(self) -> None:
        """Answer replay requests until cancelled; returns at once where replay is off."""
        router = self._router
        while router is not None:
            frames = await router.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue  # Not a request of ours; a ROUTER has nothing to answer it with.
            client, _, first = frames
            begin = int.from_bytes(first, "big")
            for sequence, payload in [each for each in self._kept if each[0] >= begin]:
                await router.send_multipart(
                    [client, b"", self.topic.encode(), sequence.to_bytes(8, "big"), payload]
                )
            await router.send_multipart([client, b"", self.topic.encode(), END_OF_REPLAY, b""])


def _endpoint(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> str:
    return str(socket.get_string(zmq.LAST_ENDPOINT))


def _zmq_address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
