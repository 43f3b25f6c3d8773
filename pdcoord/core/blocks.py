"""Keys of a prompt's blocks: chained hashes, so that equal keys mean equal prefixes."""

import xxhash

from pdcoord.core.request import BlockKey

PROMPT_BLOCKS_MAX = 8_192
"""Blocks hashed of one prompt; what lies behind them shares no more work than it costs to find out."""


def block_keys(prompt: bytes, *, model: str, cache_salt: str, block_bytes: int) -> tuple[BlockKey, ...]:
    """Keys of the full blocks of a rendered prompt, in order.

    Each key is XXH3-64 of the block's bytes seeded by the key before it; the first is seeded by the
    model and the cache salt, so that neither models nor tenants share keys.

    Args:
        block_bytes: bytes in one block, at least 1; a partial last block has no key.
    """
    key = xxhash.xxh3_64_intdigest(f"{model}\0{cache_salt}".encode("utf-8", "surrogatepass"))
    digest = xxhash.xxh3_64_intdigest
    keys: list[BlockKey] = []
    end = min(len(prompt) // block_bytes, PROMPT_BLOCKS_MAX) * block_bytes
    for start in range(0, end, block_bytes):
        key = digest(prompt[start : start + block_bytes], key)
        keys.append(BlockKey(key))
    return tuple(keys)
