"""KV events off the wire: batches of vLLM and SGLang turned into signals."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from pdcoord.core.fleet import EndpointId
from pdcoord.core.kvcache import Coverage, EngineHash, KvCleared, KvRemoved, KvSignal, KvStored, Tier

HASH_MASK = (1 << 64) - 1

BATCH_EVENTS_MAX = 16_384
"""SGLang with pages of one token tells one event for each token of a chunk, and for each that is evicted."""
EVENT_TOKENS_MAX = 65_536
"""More than an engine computes in one step."""
EVENT_PAIRS_MAX = 16_384
"""The same for pairs of tokens, which take longer to read."""
EVENT_BLOCKS_MAX = 16_384
EXTRA_BYTES_MAX = 4_096
"""Of what was hashed into one block besides its tokens."""

RUN_BLOCKS_MAX = 512
"""Blocks of one signal: a longer run is told in pieces, each about two milliseconds' work."""
RUN_TOKENS_MAX = 8_192
RUN_EXTRA_BYTES_MAX = 32 << 10
BLOCK_TOKENS = 16
"""A block of more tokens costs as much as several of so many."""
BLOCK_EXTRA_BYTES = 128
"""A block with more hashed into it likewise."""

_NIL = msgspec.Raw(b"\xc0")
_LORA_TAG, _SALT_TAG = "lora", "cache_salt"

# Media as vLLM 0.32 (GPU, CPU, STORAGE), SGLang 0.5 (GPU, CPU_PINNED, CPU_TIER1, DISK, EXTERNAL) and AMD's
# ATOM (GPU, CPU, DISK, REMOTE) name them; what is not listed is as far as the farthest.
_TIERS = {
    "": Tier.GPU,
    "GPU": Tier.GPU,
    "CPU": Tier.CPU,
    "CPU_PINNED": Tier.CPU,
    "CPU_TIER1": Tier.CPU,
    "CPU_TIER2": Tier.CPU,
    "HOST": Tier.CPU,
    "DISK": Tier.DISK,
    "STORAGE": Tier.DISK,
}

# vLLM 0.32, KVCacheSpecKind. `unknown` and kinds of later versions say nothing.
_COVERAGES = {
    "full_attention": Coverage.FULL,
    "mla_attention": Coverage.FULL,
    "sink_full_attention": Coverage.FULL,
    "sliding_window": Coverage.PARTIAL,
    "sliding_window_mla": Coverage.PARTIAL,
    "chunked_local_attention": Coverage.PARTIAL,
    "mamba": Coverage.PARTIAL,
    "encoder_only_attention": Coverage.PARTIAL,
    "cross_attention": Coverage.PARTIAL,
}


class BatchError(Exception):
    """A payload is not a batch of events."""


class BatchTooLargeError(BatchError):
    """A batch, or an event in it, is larger than the bounds allow."""


class RawBatch(NamedTuple):
    """One batch whose events are not read yet; at most BATCH_EVENTS_MAX.

    Attributes:
        rank: as in `Decoded`.
    """

    events: list[msgspec.Raw]
    rank: int | None


class Piece(NamedTuple):
    """What can be taken in at once.

    Attributes:
        signal: None for an event that could not be read or is of a kind not known here.
        blocks: what it costs to take in, as that many blocks of BLOCK_TOKENS; at least 1.
    """

    signal: KvSignal | None
    blocks: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One batch.

    Attributes:
        signals: of the events that could be read, in order.
        unreadable: events that could not, or that are of a kind not known here.
        rank: of the data-parallel rank that published it; None if it does not say.
    """

    signals: tuple[KvSignal, ...]
    unreadable: int
    rank: int | None


# Lists stay as they came until their length is known to be within bounds.
class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: msgspec.Raw
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: msgspec.Raw = _NIL
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    medium: str | None = None


class _StoredArray(_Stored, array_like=True, tag="BlockStored"):
    pass


class _RemovedArray(_Removed, array_like=True, tag="BlockRemoved"):
    pass


class _ClearedArray(_Cleared, array_like=True, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct):
    ts: float
    events: msgspec.Raw
    data_parallel_rank: int | None = None


class _BatchArray(_Batch, array_like=True):
    pass


_batch = msgspec.msgpack.Decoder(_Batch)
_batch_array = msgspec.msgpack.Decoder(_BatchArray)
_event = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
_event_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_items = msgspec.msgpack.Decoder(list[msgspec.Raw])
_block_hashes = msgspec.msgpack.Decoder(list[int | bytes])
_tokens = msgspec.msgpack.Decoder(tuple[int, ...])
_token_pairs = msgspec.msgpack.Decoder(tuple[tuple[int, int], ...])
_anything = msgspec.msgpack.Decoder()


def open_batch(payload: bytes) -> RawBatch:
    """Check that a payload is `[ts, events, data_parallel_rank]` in msgpack, and part its events.

    A mebibyte takes a few milliseconds at worst.

    Raises:
        BatchTooLargeError: if there are more than BATCH_EVENTS_MAX.
        BatchError: if the payload is not such a batch.
    """
    try:
        batch = (_batch if _is_map(payload) else _batch_array).decode(payload)
        _check_length(batch.events, BATCH_EVENTS_MAX, "events in a batch")
        return RawBatch(_items.decode(batch.events), batch.data_parallel_rank)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BatchError("the payload is not a batch of KV events") from error


def pieces(batch: RawBatch, endpoint_id: EndpointId) -> Iterator[Piece]:
    """The events of a batch in order, long ones in several signals; each step takes a few milliseconds.

    An event is a map with `type` (vLLM 0.32, SGLang 0.5.23) or an array with the type first (earlier
    ones). Fields that are missing at an array's end or left out of a map have their defaults; those of
    later versions are passed over. One event that cannot be read does not hide the others.

    Raises:
        BatchTooLargeError: at an event that is larger than the bounds allow; what it says is not known.
    """
    for raw in batch.events:
        try:
            event: _Stored | _Removed | _Cleared = (_event if _is_map(raw) else _event_array).decode(raw)
            match event:
                case _Stored():
                    yield from _stored(event, endpoint_id)
                case _Removed():
                    yield from _removed(event, endpoint_id)
                case _Cleared(medium=medium):
                    yield Piece(KvCleared(endpoint_id, None if medium is None else _tier(medium, None)), 1)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            yield Piece(None, 1)


def decode_batch(payload: bytes, endpoint_id: EndpointId) -> Decoded:
    """All events of one payload at once, where nobody else waits for a turn.

    Raises:
        BatchError: as `open_batch` and `pieces` do.
    """
    batch = open_batch(payload)
    found = [piece.signal for piece in pieces(batch, endpoint_id)]
    signals = tuple([signal for signal in found if signal is not None])
    return Decoded(signals, len(found) - len(signals), batch.rank)


def _is_map(data: bytes | msgspec.Raw) -> bool:
    view = memoryview(data)
    first = view[0] if view else 0
    return first >> 4 == 0x8 or first in {0xDE, 0xDF}


def _check_length(raw: msgspec.Raw, length_max: int, what: str) -> None:
    """Bound a list by its msgpack header alone; what is no list is left to its decoder."""
    view = memoryview(raw)
    first = view[0]
    width = {0xDC: 2, 0xDD: 4}.get(first, 0)
    length = int.from_bytes(view[1 : 1 + width], "big") if width else first & 0xF if first >> 4 == 0x9 else 0
    if length > length_max:
        raise BatchTooLargeError(f"{length} {what}, expected at most {length_max}")


def _stored(event: _Stored, endpoint_id: EndpointId) -> Iterator[Piece]:
    """The blocks as one run, or as several of which each is the next one's parent."""
    parent = None if event.parent_block_hash is None else _hash(event.parent_block_hash)
    lora = event.lora_name or ("" if event.lora_id is None else f"#{event.lora_id}")
    hashes, token_ids, size = _hashes(event.block_hashes), _token_ids(event.token_ids), event.block_size
    extra_keys = _extra_keys(event.extra_keys, len(hashes))
    tier, group = _tier(event.medium, event.locality), event.group_idx or 0
    coverage = _COVERAGES.get(event.kv_cache_spec_kind or "", Coverage.UNSAID)
    # What does not add up is told as it is, for the index to count and refuse.
    adds_up = size > 0 and len(token_ids) in {0, len(hashes) * size}
    extra_keys = extra_keys if adds_up else []
    for begin, end in _runs(len(hashes), size, extra_keys) if adds_up else [(0, len(hashes))]:
        salt, extras = _extras(extra_keys[begin:end], lora, is_first=parent is None)
        own, tokens = hashes[begin:end], token_ids[begin * size : end * size] if adds_up else token_ids
        signal = KvStored(endpoint_id, parent, own, tokens, size, lora, salt, extras, tier, group, coverage)
        extra_bytes = sum(len(memoryview(each)) for each in extra_keys[begin:end])
        blocks = max(1, len(own), len(tokens) // BLOCK_TOKENS, extra_bytes // BLOCK_EXTRA_BYTES)
        yield Piece(signal, blocks)
        parent = own[-1] if own else parent


def _removed(event: _Removed, endpoint_id: EndpointId) -> Iterator[Piece]:
    hashes, tier, group = (
        _hashes(event.block_hashes),
        _tier(event.medium, event.locality),
        event.group_idx or 0,
    )
    for begin, end in _runs(len(hashes), 1, []):
        yield Piece(KvRemoved(endpoint_id, hashes[begin:end], tier, group), max(1, end - begin))


def _runs(blocks: int, block_tokens: int, extra_keys: list[msgspec.Raw]) -> Iterator[tuple[int, int]]:
    """Where to cut a run of blocks so that each part is little work; at least one, which may be empty."""
    length = max(1, min(RUN_BLOCKS_MAX, RUN_TOKENS_MAX // block_tokens))
    if extra_keys:
        largest = max(len(memoryview(each)) for each in extra_keys)
        length = max(1, min(length, RUN_EXTRA_BYTES_MAX // largest))
    for begin in range(0, max(1, blocks), length):
        yield begin, min(begin + length, blocks)


def _token_ids(raw: msgspec.Raw) -> tuple[int, ...]:
    _check_length(raw, EVENT_TOKENS_MAX, "tokens in an event")
    try:
        return _tokens.decode(raw)
    except msgspec.ValidationError:
        # SGLang with EAGLE tells pairs of neighbours; the first of each is the token.
        _check_length(raw, EVENT_PAIRS_MAX, "pairs of tokens in an event")
        return tuple([first for first, _ in _token_pairs.decode(raw)])


def _hashes(raw: msgspec.Raw) -> tuple[EngineHash, ...]:
    """The low 64 bits of each, which is what VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES tells of a longer hash."""
    _check_length(raw, EVENT_BLOCKS_MAX, "blocks in an event")
    # Written out, since there are more of these than of anything else.
    return tuple(
        [
            EngineHash(each & HASH_MASK if isinstance(each, int) else int.from_bytes(each[-8:], "big"))
            for each in _block_hashes.decode(raw)
        ]
    )


def _hash(told: int | bytes) -> EngineHash:
    return EngineHash(told & HASH_MASK if isinstance(told, int) else int.from_bytes(told[-8:], "big"))


def _extra_keys(raw: msgspec.Raw, blocks: int) -> list[msgspec.Raw]:
    """One entry for each block, unread; empty where there are none.

    Raises:
        msgspec.DecodeError: if there are more entries than blocks.
    """
    if raw == _NIL:
        return []
    _check_length(raw, EVENT_BLOCKS_MAX, "extra keys in an event")
    found = _items.decode(raw)
    if len(found) > blocks:
        raise msgspec.ValidationError("more extra keys than blocks")
    for each in found:
        if len(memoryview(each)) > EXTRA_BYTES_MAX:
            raise BatchTooLargeError(f"extra keys of more than {EXTRA_BYTES_MAX} bytes")
    return found + [_NIL] * (blocks - len(found)) if found else []


def _tier(medium: str | None, locality: str | None) -> Tier:
    if locality is not None and locality.upper() == "REMOTE":
        return Tier.REMOTE
    return _TIERS.get((medium or "").upper(), Tier.REMOTE)


def _extras(found: list[msgspec.Raw], lora: str, *, is_first: bool) -> tuple[str, tuple[str, ...]]:
    """The prompt's cache salt, and what else was hashed into each block.

    vLLM lists for each block, without tags: the adapter's name, images' identifiers with offsets, on a
    prompt's first block its cache salt, hashes of prompt embeddings. A lone text on the first block that
    is not the adapter's name is taken as the salt; were it an image's, no plain prompt would match.
    """
    salt = ""
    extras: list[str] = []
    for index, raw in enumerate(found):
        entry: Any = None if raw == _NIL else _anything.decode(raw)
        items = list(entry) if isinstance(entry, list | tuple) else [entry]
        items = [item for item in items if item is not None and not _is_lora(item, lora)]
        if index == 0 and is_first and items:
            last = items[-1]
            if isinstance(last, list | tuple) and len(last) == 2 and last[0] == _SALT_TAG:
                salt = str(last[1])
                items.pop()
            elif isinstance(last, str):
                salt = last
                items.pop()
        extras.append(repr(items) if items else "")
    return salt, tuple(extras) if any(extras) else ()


def _is_lora(item: object, lora: str) -> bool:
    if not lora:
        return False
    return item == lora or (isinstance(item, list | tuple) and list(item) == [_LORA_TAG, lora])
