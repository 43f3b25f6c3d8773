"""KV between engine ranks, each a process with a real agent and a real backend: the bytes that arrive."""

import itertools
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from transfer.layout import GroupShape, KvDtype, KvLayout, KvSplit, LayerScales, Order

Ranks = Callable[..., Any]

GROUP = (GroupShape(2, 4, 32, 32),)
TOKENS = 150
_requests = itertools.count()


def blocks_of(rank: Any, tokens: int, first: int = 3) -> list[int]:
    """Blocks for so many tokens, not in order of memory."""
    count = -(-tokens // rank.layout.layout.block_tokens)
    return list(range(first + count - 1, first - 1, -1))


class Handover:
    """One prompt's KV on its way."""

    def __init__(self, tokens: int = TOKENS, seed: int | None = None) -> None:
        self.tokens = tokens
        self.seed = next(_requests) if seed is None else seed
        self.request = f"request-{next(_requests)}"
        self.proof = {
            "transfer": secrets.token_hex(16),
            "nonce": secrets.token_hex(16),
            "hash": secrets.token_hex(16),
        }

    def open(self, *producers: Any) -> None:
        for producer in producers:
            producer.ask("fill", seed=self.seed, tokens=self.tokens, blocks=blocks_of(producer, self.tokens))
            producer.ask("open", request=self.request, tokens=self.tokens, **self.proof)

    def stage(self, producer: Any, first: int = 0, end: int | None = None) -> None:
        end = self.tokens if end is None else end
        producer.ask(
            "stage",
            first=first,
            count=end - first,
            blocks=blocks_of(producer, self.tokens),
            is_last=end == self.tokens,
            **self.proof,
        )

    def load(self, consumer: Any, producer: Any, first: int = 0, wait_s: float = 20.0) -> None:
        consumer.ask(
            "load",
            request=self.request,
            tokens=self.tokens,
            first=first,
            address=producer.address,
            epoch=producer.epoch,
            blocks=blocks_of(consumer, self.tokens),
            wait_s=wait_s,
            **self.proof,
        )

    def is_right(self, consumer: Any, producer: Any, first: int = 0) -> bool:
        right: bool = consumer.ask(
            "is_right",
            seed=self.seed,
            tokens=self.tokens,
            first=first,
            blocks=blocks_of(consumer, self.tokens),
            dtype=str(producer.layout.layout.dtype),
            scales=[[[s.key, s.value] for s in group] for group in producer.layout.scales],
        )
        return right


FP8_SCALES = ((LayerScales(0.05, 0.25), LayerScales(0.5, 0.07)),)

PAIRS = {
    "native": (KvLayout(16), KvLayout(16), GROUP, (), ()),
    "regroup": (KvLayout(16, Order.NHD), KvLayout(32, Order.HND), GROUP, (), ()),
    "convert": (KvLayout(32, dtype=KvDtype.BFLOAT16), KvLayout(16, dtype=KvDtype.FLOAT32), GROUP, (), ()),
    "three-vendors": (
        KvLayout(128, Order.NHD, KvDtype.FLOAT16, split=KvSplit.SEPARATE),
        KvLayout(32, Order.HND, KvDtype.BFLOAT16, split=KvSplit.HALVED, tiling="cpu-vec"),
        GROUP,
        (),
        (),
    ),
    "tiled": (
        KvLayout(32, Order.HND, split=KvSplit.HALVED, tiling="cpu-vec"),
        KvLayout(128, Order.HND, split=KvSplit.HALVED, tiling="cpu-vec"),
        GROUP,
        (),
        (),
    ),
    "mla": (KvLayout(64), KvLayout(16), (GroupShape(3, 1, 72, 0),), (), ()),
    "two-groups": (
        KvLayout(16),
        KvLayout(32, Order.HND),
        (GroupShape(1, 4, 16, 16), GroupShape(2, 2, 32, 16)),
        (),
        (),
    ),
    "fp8-scales": (
        KvLayout(16, dtype=KvDtype.FP8_E4M3FN),
        KvLayout(32, dtype=KvDtype.FP8_E4M3FNUZ),
        GROUP,
        FP8_SCALES,
        ((LayerScales(0.1, 0.5), LayerScales(0.25, 0.125)),),
    ),
    "fp8-to-bf16": (KvLayout(16, dtype=KvDtype.FP8_E5M2), KvLayout(16), GROUP, FP8_SCALES, ()),
}


@pytest.mark.parametrize(
    ("pair", "kind"),
    [(pair, "tcp") for pair in PAIRS] + [("native", "nixl"), ("three-vendors", "nixl"), ("mla", "nixl")],
)
def test_the_blocks_hold_what_the_producer_computed(rank_process: Ranks, pair: str, kind: str) -> None:
    theirs, ours, groups, their_scales, our_scales = PAIRS[pair]
    producer = rank_process(theirs, groups, kind=kind, scales=their_scales, settings={"chunk_tokens_max": 48})
    consumer = rank_process(ours, groups, kind=kind, scales=our_scales)
    first = 0
    for tokens, first in ((TOKENS, 0), (TOKENS, 37), (1, 0), (128, 127)):
        handover = Handover(tokens)
        handover.open(producer)
        handover.stage(producer)
        handover.load(consumer, producer, first)
        assert consumer.report(handover.request) == "", pair
        assert handover.is_right(consumer, producer, first)
    assert not Handover(TOKENS).is_right(consumer, producer, first), "the comparison can fail"
    stats = producer.drained()
    assert (stats["offers"], stats["offer_failures"]) == (4, {})
    assert len(set(producer.ask("poll")["free"])) == 4
    assert consumer.drained()["loads"] == 4


@pytest.mark.parametrize("kind", ["tcp", "nixl"])
def test_chunks_are_pulled_while_later_ones_are_computed(rank_process: Ranks, kind: str) -> None:
    producer = rank_process(KvLayout(16), GROUP, kind=kind, settings={"chunk_tokens_max": 32})
    consumer = rank_process(KvLayout(32, Order.HND), GROUP, kind=kind)
    handover = Handover(200)
    handover.load(consumer, producer)  # Both legs at once: the consumer may be the first.
    handover.open(producer)
    read_bytes = 0
    for first in range(0, 160, 40):
        handover.stage(producer, first, first + 40)
        read_bytes = consumer.until("stats", lambda told, before=read_bytes: told["read_bytes"] > before)[
            "read_bytes"
        ]
    told = consumer.ask("poll")
    assert handover.request not in told["reports"]
    assert producer.ask("poll")["free"] == []
    handover.stage(producer, 160)
    assert consumer.report(handover.request) == ""
    assert handover.is_right(consumer, producer)
    producer.drained()
    assert producer.ask("poll")["free"] == [handover.request]


def test_a_load_of_no_token_releases_the_producer(rank_process: Ranks) -> None:
    producer = rank_process(KvLayout(16), GROUP)
    consumer = rank_process(KvLayout(16), GROUP)
    handover = Handover()
    handover.open(producer)
    handover.stage(producer)
    handover.load(consumer, producer, first=TOKENS)
    assert consumer.report(handover.request) == ""
    stats = producer.until("stats", lambda told: told["offers"] == 1)
    assert (stats["offer_failures"], stats["staging_used_bytes"]) == ({}, 0)
    assert consumer.drained()["read_bytes"] == 0


def test_two_producers_of_other_vendors_feed_one_consumer_at_once(rank_process: Ranks) -> None:
    first = rank_process(KvLayout(128, split=KvSplit.SEPARATE), GROUP, settings={"chunk_tokens_max": 32})
    second = rank_process(KvLayout(16, Order.HND, KvDtype.FLOAT16), GROUP, settings={"chunk_tokens_max": 32})
    consumer = rank_process(KvLayout(16), GROUP, blocks=128)
    handovers = [Handover(), Handover()]
    for handover, producer in zip(handovers, (first, second), strict=True):
        handover.open(producer)
    # Their blocks must not be the same.
    places = [blocks_of(consumer, TOKENS, first=3), blocks_of(consumer, TOKENS, first=60)]
    for handover, producer, blocks in zip(handovers, (first, second), places, strict=True):
        order = {"request": handover.request, "tokens": TOKENS, "first": 0, "blocks": blocks, "wait_s": 20.0}
        consumer.ask("load", address=producer.address, epoch=producer.epoch, **order, **handover.proof)
    for begin in range(0, TOKENS, 50):
        for handover, producer in zip(handovers, (first, second), strict=True):
            handover.stage(producer, begin, begin + 50)
    for handover, producer, blocks in zip(handovers, (first, second), places, strict=True):
        assert consumer.report(handover.request) == ""
        dtype = str(producer.layout.layout.dtype)
        order = {"seed": handover.seed, "tokens": TOKENS, "first": 0, "blocks": blocks}
        assert consumer.ask("is_right", dtype=dtype, scales=[], **order)
        producer.drained()
    consumer.drained()


MLA = (GroupShape(2, 1, 40, 0),)


@pytest.mark.parametrize(
    ("theirs", "ours", "groups"),
    [(1, 2, GROUP), (2, 1, GROUP), (2, 2, GROUP), (2, 4, GROUP), (1, 2, MLA), (2, 1, MLA)],
)
def test_ranks_of_unlike_counts(
    rank_process: Ranks, theirs: int, ours: int, groups: tuple[GroupShape, ...]
) -> None:
    def engine(layout: KvLayout, name: str) -> list[Any]:
        identity = (name, secrets.token_hex(8))
        settings = {"head_runs": 2}
        ranks = [
            rank_process(layout, groups, rank=rank, engine=identity, settings=settings)
            for rank in range(layout.tensor_parallel)
        ]
        for rank in ranks:
            rank.ask("ranks", addresses=[each.address for each in ranks])
        return ranks

    producers = engine(KvLayout(16, tensor_parallel=theirs), "prefill")
    consumers = engine(KvLayout(32, Order.HND, tensor_parallel=ours), "decode")
    handover = Handover()
    handover.open(*producers)
    for consumer in consumers:
        handover.load(consumer, producers[0])
    for producer in producers:
        handover.stage(producer)
    for consumer in consumers:
        assert consumer.report(handover.request) == ""
        assert handover.is_right(consumer, producers[0])
    for producer in producers:
        assert producer.drained()["offer_failures"] == {}
        producer.until("poll", lambda told: told["free"] == [handover.request])


@pytest.mark.parametrize("kind", ["tcp", "nixl"])
def test_a_probe_tells_of_a_live_producer(rank_process: Ranks, kind: str) -> None:
    producer = rank_process(KvLayout(16), GROUP, kind=kind)
    consumer = rank_process(KvLayout(32), GROUP, kind=kind, settings={"transports": ["rc_mlx5"]})
    for _ in range(2):
        told = consumer.ask("probe", address=producer.address, timeout_s=10.0)
        assert (told["failure"], told["verdict"], told["backend"]) == ("", "regroup", kind), told
        assert told["epoch"] == producer.epoch
        assert told["is_degraded"] is True, "the transport that was counted on is not there"
        assert told["latency_s"] > 0
        assert told["bytes_per_s"] > 0
    assert consumer.drained()["loads"] == 0


def test_an_idle_agent_costs_nothing_and_its_end_leaves_nothing_open(rank_process: Ranks) -> None:
    settings = {"heartbeat_s": 0.2}
    producer = rank_process(KvLayout(16), GROUP, settings=settings)
    consumer = rank_process(KvLayout(16), GROUP, settings=settings)
    handover = Handover()
    handover.open(producer)
    handover.stage(producer)
    handover.load(consumer, producer)
    assert consumer.report(handover.request) == ""
    producer.drained()
    before = consumer.ask("usage")
    # Heartbeats go on meanwhile; in a busy loop as much time would be spent as another process spends.
    start_s = producer.ask("usage")["cpu_s"]
    producer.until("usage", lambda told: told["cpu_s"] > start_s + 0.2)
    after = consumer.ask("usage")
    assert after["cpu_s"] - before["cpu_s"] < 0.1
    consumer.ask("close")
    assert consumer.ask("usage")["fds"] < before["fds"]
