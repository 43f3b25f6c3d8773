"""What the exact prefix index costs: memory per million blocks, KV events a second, one match.

`python -m benchmarks.prefixes` measures on one core: batches as vLLM 0.32 writes them are decoded and taken
in by the coordinator, as the feed does it, sockets excepted.
"""

import argparse
import gc
import json
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from pdcoord.core.blocks import token_keys
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import ModelsReplaced
from pdcoord.core.exact import ExactIndex
from pdcoord.core.fleet import Endpoint, EndpointId, EndpointSeen, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.kvcache import EngineHash, KvCleared, KvStored
from pdcoord.core.model import Model, PrefixMode
from pdcoord.feeds.kvdecode import decode_batch
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Connector, Side

MODEL = ModelName("m")
OURS = 16
PROMPT_BLOCKS = 64
"""Blocks of one stored run: 1,024 tokens."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefixes", description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000, help="for the memory (default 1,000,000)")
    parser.add_argument("--events", type=int, default=50_000, help="for the rate (default 50,000)")
    parser.add_argument("--endpoints", type=int, default=20, help="that hold the blocks (default 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    if min(options.blocks, options.events, options.endpoints) <= 0:
        parser.error("every number must be positive")
    return options


def runs(rng: random.Random, block_tokens: int) -> Iterator[tuple[list[int], tuple[EngineHash, ...]]]:
    """Token ids and hashes of one prompt after another, none alike."""
    count = max(1, PROMPT_BLOCKS * OURS // block_tokens)
    while True:
        tokens = [rng.getrandbits(17) for _ in range(count * block_tokens)]
        yield tokens, tuple(EngineHash(rng.getrandbits(64)) for _ in range(count))


def bytes_per_block(blocks: int, endpoints: int, block_tokens: int) -> float:
    """Memory of the index alone, for one engine block of that size."""
    rng, index = random.Random(0), ExactIndex(MODEL, OURS, 2 * blocks)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    stored = 0
    for tokens, hashes in runs(rng, block_tokens):
        own = hashes[: blocks - stored]
        event = KvStored(EndpointId("e"), None, own, tuple(tokens[: len(own) * block_tokens]), block_tokens)
        index.store(stored * endpoints // blocks, event)
        stored += len(own)
        if stored >= blocks:
            break
    del event, tokens, hashes, own
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.block_count == blocks
    return (after - before) / blocks


def fleet(endpoints: int) -> Coordinator:
    side, speed = Side(Connector.NONE, None), SpeedFigures(0.0, 1e-4, 0.01)
    pool = Pool(PoolName("p"), MODEL, Role.BOTH, "x", EngineKind.VLLM, side, speed, 1, 1e9)
    coordinator = Coordinator()
    coordinator.handle(ModelsReplaced((Model(MODEL, (pool,), prefix_mode=PrefixMode.PRECISE),)), 0.0)
    for number in range(endpoints):
        own = EndpointId(f"e{number}")
        coordinator.handle(EndpointSeen(Endpoint(own, pool, HostPort(f"h{number}:1"))), 0.0)
        coordinator.handle(KvCleared(own), 0.0)
    return coordinator


def payloads(events: int, blocks_each: int) -> list[bytes]:
    """Batches of one engine with a cache of 20,000 blocks: each stores a run and removes an old one."""
    rng = random.Random(1)
    kept: list[list[bytes]] = []
    made: list[bytes] = []
    for _ in range(max(1, events // 2)):
        hashes = [rng.randbytes(32) for _ in range(blocks_each)]
        tokens = [rng.getrandbits(17) for _ in range(blocks_each * OURS)]
        batch: list[dict[str, Any]] = [
            {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": None,
                "token_ids": tokens,
                "block_size": OURS,
                "medium": "GPU",
            }
        ]
        kept.append(hashes)
        if len(kept) * blocks_each > 20_000:
            batch.append({"type": "BlockRemoved", "block_hashes": kept.pop(0), "medium": "GPU"})
        made.append(msgspec.msgpack.encode([1.0, batch, 0]))
    return made


def events_per_s(events: int, blocks_each: int) -> float:
    coordinator, own = fleet(1), EndpointId("e0")
    made = payloads(events, blocks_each)
    taken = 0
    began = time.process_time()
    for payload in made:
        for signal in decode_batch(payload, own).signals:
            coordinator.handle(signal, 0.0)
            taken += 1
    return taken / (time.process_time() - began)


def timed(call: Callable[[], object], repeats: int = 200) -> tuple[float, float]:
    """Median and 99th percentile of one call, in microseconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    times.sort()
    return statistics.median(times), times[len(times) * 99 // 100]


def match_us(endpoints: int) -> dict[str, tuple[float, float]]:
    """Times for a prompt of 30 KB, 7,500 tokens at 4 bytes each, that all endpoints hold to some depth."""
    rng, index = random.Random(2), ExactIndex(MODEL, OURS, 10_000_000)
    tokens = tuple(rng.getrandbits(17) for _ in range(7_500))
    hashes = tuple(EngineHash(rng.getrandbits(64)) for _ in range(7_500 // OURS))
    for ordinal in range(endpoints):
        depth = max(1, len(hashes) * (ordinal + 1) // endpoints)
        told = KvStored(EndpointId("e"), None, hashes[:depth], tokens[: depth * OURS], OURS)
        index.store(ordinal, told)
    keys = token_keys(tokens, model=MODEL, block_tokens=OURS)
    return {
        "keys of the prompt": timed(lambda: token_keys(tokens, model=MODEL, block_tokens=OURS)),
        "match": timed(lambda: index.match(keys)),
    }


def main() -> None:
    options = parse()
    found: dict[str, float] = {}
    for block_tokens in (16, 64, 1):
        # What matters is a block's share, which a smaller index shows as well for the odd sizes.
        blocks = options.blocks if block_tokens == OURS else max(1, options.blocks // 4)
        size = bytes_per_block(blocks, options.endpoints, block_tokens)
        name = f"MB per million blocks of {block_tokens} tokens"
        found[name] = size
        print(f"{name:<60} {size:10.0f}")
    for blocks_each in (1, 8, 64):
        name = f"events a second, {blocks_each} blocks each"
        found[name] = events_per_s(options.events // max(1, blocks_each // 4), blocks_each)
        print(f"{name:<60} {found[name]:10.0f}")
    for endpoints in (options.endpoints, 1_000):
        for part, (median, p99) in match_us(endpoints).items():
            name = f"{part}, us, 30 KB, {endpoints} endpoints"
            found[f"{name}, median"], found[f"{name}, p99"] = median, p99
            print(f"{name:<60} {median:10.0f} {p99:10.0f}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
