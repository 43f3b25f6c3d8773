"""KV events of an emulated engine, read by a subscriber as a coordinator reads them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client


class BlockStored(msgspec.Struct, tag="BlockStored", forbid_unknown_fields=True):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    medium: str


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", forbid_unknown_fields=True):
    block_hashes: list[bytes]
    medium: str


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class MapBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int


class ArrayBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[list[Any]]
    data_parallel_rank: int


ENGINE = {
    "name": "e",
    "profile": "nvidia-h100-8b",
    "port": 0,
    "kv_events_port": 0,
    "kv_events_replay_port": 0,
    "kv_blocks": 16,
    "context_tokens_max": 256,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
}


@asynccontextmanager
async def started(**fields: Any) -> AsyncIterator[tuple[EmulatedEngine, Client, zmq.asyncio.Context]]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": "demo/tiny",
                "engines": [{**ENGINE, **fields}],
            }
        )
    )
    context = zmq.asyncio.Context()
    try:
        async with AsyncExitStack() as stack:
            (engine,), _ = await stack.enter_async_context(running(fleet, fleet.engines))
            yield engine, await stack.enter_async_context(Client()), context
    finally:
        context.destroy(linger=0)


async def post(client: Client, engine: EmulatedEngine, path: str, body: dict[str, Any]) -> None:
    async with await client.request(
        "POST", engine.address, path, body=json.dumps(body).encode(), head_timeout_s=10.0
    ) as response:
        await response.read_all(timeout_s=10.0)
        assert response.status == 200


async def subscribe(
    engine: EmulatedEngine, context: zmq.asyncio.Context, client: Client
) -> zmq.asyncio.Socket:
    """A subscriber that is known to hear: a PUB drops what comes before it knows of a subscriber."""
    publisher = engine.host.publisher
    assert publisher is not None
    socket = context.socket(zmq.SUB)
    socket.subscribe("kv@")
    socket.connect(publisher.address)
    async with asyncio.timeout(10.0):
        while not await socket.poll(20):
            await post(client, engine, "/reset_prefix_cache", {})
        while await socket.poll(50):
            await socket.recv_multipart()
    return socket


async def receive(socket: zmq.asyncio.Socket) -> tuple[bytes, int, bytes]:
    async with asyncio.timeout(10.0):
        topic, sequence, payload = await socket.recv_multipart()
    return topic, int.from_bytes(sequence, "big"), payload


def completion(base: int, tokens: int = 40, count: int = 1) -> dict[str, Any]:
    return {"prompt": list(range(base, base + tokens)), "max_tokens": count}


async def test_blocks_are_told_as_they_come_and_go() -> None:
    async with started() as (engine, client, context):
        socket = await subscribe(engine, context, client)
        await post(client, engine, "/v1/completions", completion(1_000, 40))
        topic, first, payload = await receive(socket)
        assert topic == f"kv@{engine.address}@demo/tiny".encode()
        batch = msgspec.msgpack.decode(payload, type=MapBatch)
        (stored,) = batch.events
        assert isinstance(stored, BlockStored)
        assert stored.parent_block_hash is None
        assert stored.token_ids == list(range(1_000, 1_032))
        assert (len(stored.block_hashes), stored.block_size, stored.medium) == (2, 16, "GPU")
        assert {len(each) for each in stored.block_hashes} == {32}
        assert batch.ts > 1.7e9
        assert batch.data_parallel_rank == 0
        # A longer prompt of the same beginning names its parent.
        await post(client, engine, "/v1/completions", completion(1_000, 60))
        _, second, payload = await receive(socket)
        (more,) = msgspec.msgpack.decode(payload, type=MapBatch).events
        assert isinstance(more, BlockStored)
        assert more.parent_block_hash == stored.block_hashes[-1]
        assert second == first + 1
        # 16 blocks: a prompt of 240 tokens needs 15 and evicts the oldest.
        await post(client, engine, "/v1/completions", completion(5_000, 240))
        _, _, payload = await receive(socket)
        events = msgspec.msgpack.decode(payload, type=MapBatch).events
        removed = [each for event in events if isinstance(event, BlockRemoved) for each in event.block_hashes]
        assert set(removed) <= {*stored.block_hashes, *more.block_hashes}
        assert removed
        await post(client, engine, "/reset_prefix_cache", {})
        async with asyncio.timeout(10.0):
            while True:
                _, _, payload = await receive(socket)
                events = msgspec.msgpack.decode(payload, type=MapBatch).events
                if any(isinstance(event, AllBlocksCleared) for event in events):
                    break


async def test_the_array_form_with_numbers_for_hashes() -> None:
    async with started(kv_events_form="array", kv_events_hash="int", kv_events_topic="kv@x") as (
        engine,
        client,
        context,
    ):
        socket = await subscribe(engine, context, client)
        await post(client, engine, "/v1/completions", completion(1_000, 40))
        topic, _, payload = await receive(socket)
        assert topic == b"kv@x"
        (event,) = msgspec.msgpack.decode(payload, type=ArrayBatch).events
        kind, hashes, parent, tokens, size, lora, medium = event
        assert (kind, parent, size, lora, medium) == ("BlockStored", None, 16, None, "GPU")
        assert all(isinstance(each, int) and each < 2**64 for each in hashes)
        assert tokens == list(range(1_000, 1_032))


async def test_what_was_missed_is_replayed() -> None:
    async with started() as (engine, client, context):
        publisher = engine.host.publisher
        assert publisher is not None
        assert publisher.replay_address is not None
        for base in (1_000, 2_000, 3_000):
            await post(client, engine, "/v1/completions", completion(base))
        socket = context.socket(zmq.DEALER)
        socket.connect(publisher.replay_address)
        await socket.send_multipart([b"", b"malformed"])
        await socket.send_multipart([b"", (1).to_bytes(8, "big")])
        replayed = []
        async with asyncio.timeout(10.0):
            while True:
                _, _, sequence, payload = await socket.recv_multipart()
                if sequence == b"\xff" * 8:
                    break
                replayed.append((int.from_bytes(sequence, "big"), payload))
        assert [sequence for sequence, _ in replayed] == [1, 2]
        (stored,) = msgspec.msgpack.decode(replayed[0][1], type=MapBatch).events
        assert isinstance(stored, BlockStored)
        assert stored.token_ids[0] == 2_000


@pytest.mark.parametrize("key", ["kv_events_port", "kv_events_replay_port"])
async def test_a_port_that_is_taken_is_named(key: str) -> None:
    context = zmq.asyncio.Context()
    holder = context.socket(zmq.PUB)
    port = holder.bind_to_random_port("tcp://127.0.0.1")
    try:
        with pytest.raises(ExceptionGroup) as caught:
            async with started(**{key: port}):
                pass
        assert caught.group_contains(OSError, match="cannot publish KV events")
    finally:
        context.destroy(linger=0)
