"""KV events off the wire: batches of vLLM and SGLang turned into signals."""

from dataclasses import dataclass
from typing import Any

import msgspec

from pdcoord.core.fleet import EndpointId
from pdcoord.core.kvcache import Coverage, EngineHash, KvCleared, KvRemoved, KvSignal, KvStored, Tier

EVENTS_MAX = 8_192
"""Of one batch, which is one step of an engine; a longer one is not read, so that its reading ends soon."""
HASH_MASK = (1 << 64) - 1

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


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
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
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _BatchArray(_Batch, array_like=True):
    pass


_batch = msgspec.msgpack.Decoder(_Batch)
_batch_array = msgspec.msgpack.Decoder(_BatchArray)
_event = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
_tokens = msgspec.msgpack.Decoder(tuple[int, ...])
_token_pairs = msgspec.msgpack.Decoder(tuple[tuple[int, int], ...])
_event_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)


def decode_batch(payload: bytes, endpoint_id: EndpointId) -> Decoded:
    """The events of one payload, `[ts, events, data_parallel_rank]` in msgpack.

    An event is a map with `type` (vLLM 0.32, SGLang 0.5.23) or an array with the type first (earlier
    ones). Fields that are missing at an array's end or left out of a map have their defaults; those of
    later versions are passed over. One event that cannot be read does not hide the others.

    Raises:
        BatchError: if the payload is not such a batch.
    """
    try:
        batch = (_batch if _is_map(payload) else _batch_array).decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BatchError("the payload is not a batch of KV events") from error
    if len(batch.events) > EVENTS_MAX:
        raise BatchError(f"a batch of {len(batch.events)} events, expected at most {EVENTS_MAX}")
    signals: list[KvSignal] = []
    unreadable = 0
    for raw in batch.events:
        signal = _signal(raw, endpoint_id)
        if signal is None:
            unreadable += 1
        else:
            signals.append(signal)
    return Decoded(tuple(signals), unreadable, batch.data_parallel_rank)


def _is_map(data: bytes | msgspec.Raw) -> bool:
    view = memoryview(data)
    first = view[0] if view else 0
    return first >> 4 == 0x8 or first in {0xDE, 0xDF}


def _signal(raw: msgspec.Raw, endpoint_id: EndpointId) -> KvSignal | None:
    try:
        event: _Stored | _Removed | _Cleared = (_event if _is_map(raw) else _event_array).decode(raw)
        match event:
            case _Stored():
                return _stored(event, endpoint_id)
            case _Removed():
                tier = _tier(event.medium, event.locality)
                return KvRemoved(endpoint_id, _hashes(event.block_hashes), tier, event.group_idx or 0)
            case _Cleared(medium=medium):
                return KvCleared(endpoint_id, None if medium is None else _tier(medium, None))
    except (msgspec.DecodeError, RecursionError):
        return None


def _stored(event: _Stored, endpoint_id: EndpointId) -> KvStored:
    parent = event.parent_block_hash
    lora = event.lora_name or ("" if event.lora_id is None else f"#{event.lora_id}")
    salt, extras = _extras(event.extra_keys, lora, is_first=parent is None)
    return KvStored(
        id=endpoint_id,
        parent=None if parent is None else _hashes([parent])[0],
        hashes=_hashes(event.block_hashes),
        token_ids=_token_ids(event.token_ids),
        block_tokens=event.block_size,
        lora=lora,
        cache_salt=salt,
        extras=extras,
        tier=_tier(event.medium, event.locality),
        group=event.group_idx or 0,
        coverage=_COVERAGES.get(event.kv_cache_spec_kind or "", Coverage.UNSAID),
    )


def _token_ids(raw: msgspec.Raw) -> tuple[int, ...]:
    try:
        return _tokens.decode(raw)
    except msgspec.ValidationError:
        # SGLang with EAGLE tells pairs of neighbours; the first of each is the token.
        return tuple([first for first, _ in _token_pairs.decode(raw)])


def _hashes(found: list[int | bytes]) -> tuple[EngineHash, ...]:
    """The low 64 bits of each, which is what VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES tells of a longer hash."""
    # Written out, since there are more of these than of anything else.
    return tuple(
        [
            EngineHash(each & HASH_MASK if isinstance(each, int) else int.from_bytes(each[-8:], "big"))
            for each in found
        ]
    )


def _tier(medium: str | None, locality: str | None) -> Tier:
    if locality is not None and locality.upper() == "REMOTE":
        return Tier.REMOTE
    return _TIERS.get((medium or "").upper(), Tier.REMOTE)


def _extras(found: list[Any] | None, lora: str, *, is_first: bool) -> tuple[str, tuple[str, ...]]:
    """The prompt's cache salt, and what else was hashed into each block.

    vLLM lists for each block, without tags: the adapter's name, images' identifiers with offsets, on a
    prompt's first block its cache salt, hashes of prompt embeddings. A lone text on the first block that
    is not the adapter's name is taken as the salt; were it an image's, no plain prompt would match.
    """
    salt = ""
    extras: list[str] = []
    for index, entry in enumerate(found or ()):
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
