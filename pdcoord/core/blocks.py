"""Keys of a prompt's blocks: chained hashes, so that equal keys mean equal prefixes."""

from array import array
from collections.abc import Sequence
from typing import cast

import xxhash

from pdcoord.core.request import BlockKey

PROMPT_BLOCKS_MAX = 8_192
"""Blocks hashed of one prompt; what lies behind them shares no more work than it costs to find out."""

TOKEN_BYTES = array("I").itemsize
"""Bytes of one packed token id."""


def block_keys(
    prompt: bytes, *, model: str, cache_salt: str = "", lora: str = "", block_bytes: int
) -> tuple[BlockKey, ...]:
    """Keys of the full blocks of a rendered prompt, in order.

    Each key is XXH3-64 of the block's bytes seeded by the key before it; the first is seeded by the
    model, its adapter and the cache salt, so that none of them share keys.

    Args:
        lora: name of the adapter, "" for none.
        block_bytes: bytes in one block, at least 1; a partial last block has no key.
    """
    seed = root_key(model, cache_salt, lora)
    end = min(len(prompt) // block_bytes, PROMPT_BLOCKS_MAX) * block_bytes
    return chain(seed, prompt[:end], block_bytes)


def token_keys(
    token_ids: Sequence[int], *, model: str, cache_salt: str = "", lora: str = "", block_tokens: int
) -> tuple[BlockKey, ...]:
    """Keys of the full blocks of a prompt's token ids, in order, chained like those of `block_keys`.

    They are ours alone: engines' own block sizes and hash functions need not agree with them nor with
    each other.

    Args:
        token_ids: each 0..2**32-1.
        lora: name of the adapter, "" for none.
        block_tokens: tokens in one block, at least 1; a partial last block has no key.

    Raises:
        OverflowError: if a token id is out of its range.
    """
    end = min(len(token_ids) // block_tokens, PROMPT_BLOCKS_MAX) * block_tokens
    seed = root_key(model, cache_salt, lora)
    return chain(seed, pack_tokens(token_ids[:end]), block_tokens * TOKEN_BYTES)


def root_key(model: str, cache_salt: str, lora: str) -> int:
    """What the first key of a prompt is seeded by; no two triples share one."""
    parts = (model, lora, cache_salt)
    named = "\0".join(f"{len(part)}:{part}" for part in parts)
    return xxhash.xxh3_64_intdigest(named.encode("utf-8", "surrogatepass"))


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as `chain` takes them.

    Raises:
        OverflowError: if one is not in 0..2**32-1.
    """
    return array("I", token_ids).tobytes()


def chain(key: int, data: bytes, block_bytes: int) -> tuple[BlockKey, ...]:
    """Keys of the full blocks of `data`, each seeded by the one before it, the first by `key`."""
    digest = xxhash.xxh3_64_intdigest
    starts = range(0, len(data) - block_bytes + 1, block_bytes)
    keys = [key := digest(data[start : start + block_bytes], key) for start in starts]
    # Converted all at once: for each by itself that took a sixth of the time.
    return cast("tuple[BlockKey, ...]", tuple(keys))
