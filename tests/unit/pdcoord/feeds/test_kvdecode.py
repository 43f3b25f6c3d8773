"""Batches as vLLM and SGLang write them, in every form, and as nobody should."""

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.fleet import EndpointId
from pdcoord.core.kvcache import Coverage, KvCleared, KvRemoved, KvSignal, KvStored, Tier
from pdcoord.feeds.kvdecode import (
    BATCH_EVENTS_MAX,
    EVENT_BLOCKS_MAX,
    EVENT_PAIRS_MAX,
    EVENT_TOKENS_MAX,
    EXTRA_BYTES_MAX,
    RUN_BLOCKS_MAX,
    RUN_EXTRA_BYTES_MAX,
    RUN_TOKENS_MAX,
    BatchError,
    BatchTooLargeError,
    Piece,
    decode_batch,
    open_batch,
    pieces,
)

E = EndpointId("e")
FIELDS = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": ("medium",),
}


def encode(events: list[Any], *, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([1.5, events, rank])


def as_map(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """vLLM 0.32: what is not set is left out, the parent excepted."""
    kept = {name: value for name, value in fields.items() if value is not None or name == "parent_block_hash"}
    return {"type": kind, **kept}


def as_array(kind: str, fields: dict[str, Any]) -> list[Any]:
    """Earlier ones: as many fields as that version had."""
    values = [fields.get(name) for name in FIELDS[kind]]
    while values and values[-1] is None:
        values.pop()
    return [kind, *values]


def decoded(*events: Any) -> tuple[KvSignal, ...]:
    batch = decode_batch(encode([*events]), E)
    assert batch.unreadable == 0
    return batch.signals


hashes = st.one_of(st.integers(0, 2**64 - 1), st.binary(min_size=32, max_size=32))
stored_fields = st.fixed_dictionaries(
    {
        "block_hashes": st.lists(hashes, min_size=1, max_size=3),
        "parent_block_hash": st.none() | hashes,
        "token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=8),
        "block_size": st.integers(1, 256),
        "lora_id": st.none() | st.integers(1, 9),
        "medium": st.sampled_from([None, "GPU", "CPU", "STORAGE", "elsewhere"]),
        "lora_name": st.none() | st.just("adapter"),
        "extra_keys": st.none() | st.lists(st.none() | st.lists(st.text(max_size=3), max_size=2), max_size=3),
        "group_idx": st.none() | st.integers(0, 3),
        "kv_cache_spec_kind": st.sampled_from([None, "full_attention", "mamba", "unknown"]),
    }
).filter(lambda fields: len(fields["extra_keys"] or ()) <= len(fields["block_hashes"]))
removed_fields = st.fixed_dictionaries(
    {
        "block_hashes": st.lists(hashes, max_size=3),
        "medium": st.sampled_from([None, "GPU", "CPU"]),
        "group_idx": st.none() | st.integers(0, 3),
    }
)
events = st.one_of(
    st.tuples(st.just("BlockStored"), stored_fields),
    st.tuples(st.just("BlockRemoved"), removed_fields),
    st.tuples(st.just("AllBlocksCleared"), st.just({})),
)


@given(st.lists(events, max_size=4))
def test_maps_and_arrays_mean_the_same(told: list[tuple[str, dict[str, Any]]]) -> None:
    maps = decode_batch(encode([as_map(kind, fields) for kind, fields in told]), E)
    arrays = decode_batch(encode([as_array(kind, fields) for kind, fields in told]), E)
    assert maps == arrays
    assert len(maps.signals) == len(told)
    assert maps.unreadable == 0


def low(value: bytes) -> int:
    return int.from_bytes(value[-8:], "big")


def test_a_stored_run_of_vllm() -> None:
    first, parent = bytes(range(32)), bytes(range(32, 64))
    event = {
        "type": "BlockStored",
        "block_hashes": [first],
        "parent_block_hash": parent,
        "token_ids": [5, 6],
        "block_size": 2,
        "medium": "CPU",
        "group_idx": 1,
        "kv_cache_spec_kind": "full_attention",
        "session_id": "later versions",
    }
    expected = KvStored(
        E, low(parent), (low(first),), (5, 6), 2, tier=Tier.CPU, group=1, coverage=Coverage.FULL
    )
    assert decoded(event) == (expected,)
    # With VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES the same blocks have the same names.
    numbers = event | {"block_hashes": [low(first)], "parent_block_hash": low(parent)}
    assert decoded(numbers) == (expected,)


def test_sglangs_hashes_may_be_negative_and_its_tokens_pairs() -> None:
    event = ["BlockStored", [-1], None, [[7, 8], [8, 9]], 2, None, "CPU_PINNED", "a field of later versions"]
    (stored,) = decoded(event[:-1])
    assert stored == KvStored(E, None, (2**64 - 1,), (7, 8), 2, tier=Tier.CPU)


@pytest.mark.parametrize(
    ("keys", "lora", "salt", "extras"),
    [
        (None, None, "", ()),
        ([None, None], None, "", ()),
        ([["s"], None], None, "s", ()),
        ([["a", "s"], ["a"]], "a", "s", ()),
        ([["a"], ["a"]], "a", "", ()),
        ([[["lora", "a"], ["cache_salt", "s"]], [["lora", "a"]]], "a", "s", ()),
        ([[["image", 0], "s"], [["image", 16]]], None, "s", ("[['image', 0]]", "[['image', 16]]")),
        ([None, ["image"]], None, "", ("", "['image']")),
        (["s", None], None, "s", ()),
    ],
)
def test_extra_keys(keys: Any, lora: str | None, salt: str, extras: tuple[str, ...]) -> None:
    event = {
        "type": "BlockStored",
        "block_hashes": [1, 2],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 1,
        "extra_keys": keys,
        "lora_name": lora,
    }
    (stored,) = decoded(event)
    assert isinstance(stored, KvStored)
    assert (stored.lora, stored.cache_salt, stored.extras) == (lora or "", salt, extras)


def test_an_adapter_without_a_name_is_not_the_base_model() -> None:
    (stored,) = decoded(["BlockStored", [1], None, [1], 1, 4])
    assert isinstance(stored, KvStored)
    assert stored.lora == "#4"


def test_removal_clearing_and_remote_blocks() -> None:
    assert decoded(
        {"type": "BlockRemoved", "block_hashes": [1, 2]},
        {"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU", "locality": "REMOTE"},
        ["BlockRemoved", [4], "DISK", 2],
        ["BlockRemoved", [4]],
        {"type": "AllBlocksCleared"},
        ["AllBlocksCleared", "CPU"],
    ) == (
        KvRemoved(E, (1, 2)),
        KvRemoved(E, (3,), Tier.REMOTE),
        KvRemoved(E, (4,), Tier.DISK, 2),
        KvRemoved(E, (4,)),
        KvCleared(E),
        KvCleared(E, Tier.CPU),
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"type": "BlockMoved", "block_hashes": [1]},
        {"type": "BlockStored", "block_hashes": [1]},
        {"type": "BlockRemoved", "block_hashes": ["hex"]},
        {
            "type": "BlockStored",
            "block_hashes": [1],
            "parent_block_hash": None,
            "token_ids": "x",
            "block_size": 1,
        },
        ["BlockStored"],
        ["BlockRemoved", 5],
        ["BlockStored", [1], None, [1], 1, None, None, None, [None, None]],
        [],
        {},
        None,
        7,
        "BlockRemoved",
    ],
)
def test_one_unreadable_event_does_not_hide_the_others(bad: Any) -> None:
    batch = decode_batch(encode([["AllBlocksCleared"], bad, {"type": "AllBlocksCleared"}]), E)
    assert batch.signals == (KvCleared(E), KvCleared(E))
    assert batch.unreadable == 1


def test_ranks_and_batches_as_maps() -> None:
    assert decode_batch(encode([], rank=3), E).rank == 3
    assert decode_batch(msgspec.msgpack.encode([1.0, []]), E).rank is None
    as_a_map = {"ts": 1.0, "events": [["AllBlocksCleared"]], "data_parallel_rank": 2}
    batch = decode_batch(msgspec.msgpack.encode(as_a_map), E)
    assert (batch.signals, batch.rank) == ((KvCleared(E),), 2)


@given(st.binary(max_size=64))
def test_noise_is_refused_or_read_but_never_breaks(noise: bytes) -> None:
    with suppress(BatchError):
        decode_batch(noise, E)


def test_a_deep_payload_is_refused() -> None:
    with pytest.raises(BatchError):
        decode_batch(b"\x91" * 100_000 + b"\xc0", E)
    keys = b"\x91" * 5_000 + b"\xc0"
    event = b"\x99\xabBlockStored\x91\x01\xc0\x91\x01\x01\xc0\xc0\xc0" + keys
    with pytest.raises(BatchError):
        decode_batch(b"\x93\xcb" + bytes(8) + b"\x91" + event + b"\x00", E)


def pieces_of(*events: Any) -> list[Piece]:
    return list(pieces(open_batch(encode([*events])), E))


def run(blocks: int, block_tokens: int, extra_keys: list[Any] | None = None) -> list[Any]:
    tokens = list(range(blocks * block_tokens))
    return ["BlockStored", list(range(blocks)), None, tokens, block_tokens, None, None, None, extra_keys]


@pytest.mark.parametrize(
    ("blocks", "block_tokens", "has_extras"),
    [
        (1, 16, True),
        (1_500, 1, False),
        (1_500, 16, False),
        (1_500, 0, False),
        (9, 7_000, False),
        (40, 4, True),
    ],
)
def test_a_long_run_comes_in_pieces_that_make_up_the_whole(
    blocks: int, block_tokens: int, *, has_extras: bool
) -> None:
    keys = [["x" * 4_000, index] for index in range(blocks)] if has_extras else None
    event = run(blocks, block_tokens, keys)
    if not block_tokens:
        event[4] = 16  # Blocks known from another tier.
    found = pieces_of(event)
    runs = [piece.signal for piece in found if isinstance(piece.signal, KvStored)]
    assert len(runs) == len(found)
    hashes = [each for run in runs for each in run.hashes]
    assert hashes == event[1]
    assert [token for run in runs for token in run.token_ids] == event[3]
    assert [run.parent for run in runs] == [None, *(run.hashes[-1] for run in runs[:-1])]
    assert [each for run in runs for each in run.extras] == (
        [repr(key) for key in keys] if keys is not None else []
    )
    for piece, stored in zip(found, runs, strict=True):
        assert len(stored.hashes) <= RUN_BLOCKS_MAX
        assert len(stored.token_ids) <= RUN_TOKENS_MAX
        assert sum(map(len, stored.extras)) <= RUN_EXTRA_BYTES_MAX
        extra_bytes = sum(map(len, stored.extras))
        assert piece.blocks >= max(1, len(stored.hashes), len(stored.token_ids) // 16, extra_bytes // 150)


def test_a_salt_is_the_first_pieces_alone() -> None:
    keys = [["s"], *([["not a salt"]] * 1_499)]
    first, second, *_ = (piece.signal for piece in pieces_of(run(1_500, 1, keys)))
    assert isinstance(first, KvStored)
    assert isinstance(second, KvStored)
    assert (first.cache_salt, first.extras[0], second.cache_salt) == ("s", "", "")
    assert second.extras[0] == "['not a salt']"


def test_a_long_removal_comes_in_pieces() -> None:
    found = pieces_of(["BlockRemoved", list(range(2_000))])
    assert all(piece.blocks <= RUN_BLOCKS_MAX for piece in found)
    gone = [each for piece in found if isinstance(piece.signal, KvRemoved) for each in piece.signal.hashes]
    assert gone == list(range(2_000))


def test_what_does_not_add_up_is_told_as_it_is() -> None:
    (piece,) = pieces_of(["BlockStored", list(range(2_000)), None, [1], 16])
    assert isinstance(piece.signal, KvStored)
    assert (len(piece.signal.hashes), piece.signal.token_ids) == (2_000, (1,))


def test_unreadable_events_cost_as_well() -> None:
    assert pieces_of(None, ["BlockMoved"]) == [Piece(None, 1), Piece(None, 1)]


@pytest.mark.parametrize(
    "event",
    [
        ["BlockRemoved", [0] * (EVENT_BLOCKS_MAX + 1)],
        {"type": "BlockRemoved", "block_hashes": [0] * (EVENT_BLOCKS_MAX + 1)},
        ["BlockStored", [0] * (EVENT_BLOCKS_MAX + 1), None, [], 16],
        ["BlockStored", [0], None, [0] * (EVENT_TOKENS_MAX + 1), 16],
        ["BlockStored", [0], None, [[0, 0]] * (EVENT_PAIRS_MAX + 1), 16],
        ["BlockStored", [0], None, [0], 1, None, None, None, [["x" * EXTRA_BYTES_MAX]]],
        ["BlockStored", [0], None, [0], 1, None, None, None, [None] * (EVENT_BLOCKS_MAX + 1)],
    ],
)
def test_an_event_over_its_bounds_is_not_read(event: Any) -> None:
    found = pieces(open_batch(encode([["AllBlocksCleared"], event])), E)
    assert next(found).signal == KvCleared(E)
    with pytest.raises(BatchTooLargeError):
        next(found)


@pytest.mark.parametrize("event", [None, ["AllBlocksCleared"]])
def test_a_batch_of_too_many_events_is_not_read(event: Any) -> None:
    assert len(open_batch(encode([event] * BATCH_EVENTS_MAX)).events) == BATCH_EVENTS_MAX
    with pytest.raises(BatchTooLargeError, match="16385 events"):
        open_batch(encode([event] * (BATCH_EVENTS_MAX + 1)))
