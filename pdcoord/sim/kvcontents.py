"""The KV of an emulated model as numbers: what a prompt's keys and values are, on whatever engine.

As with a real model, a token's KV depends on all tokens up to it, and all engines of a model agree. The
numbers are small and whole, so that every dtype holds them exactly and a hand-over can be proved by digest.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transfer.layout import GroupShape

SHAPE = GroupShape(layer_count=2, kv_heads=2, key_dim=16, value_dim=16)
"""Much smaller than a real model's, so that a pool of hundreds of thousands of tokens fits in memory."""

_SMALLEST = -4
_SPREAD_BITS = 3
_ODD = np.uint64(0x9E3779B97F4A7C15)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: neighbouring inputs give unrelated outputs."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return scrambled


def kv_of(ids: Sequence[int], model_seed: int) -> NDArray[np.float32]:
    """Keys and values of a prompt, `[layer][token][head][key, value]` of SHAPE, whole numbers in -4..3."""
    tokens = np.asarray(ids, dtype=np.uint64)
    places = np.arange(len(tokens), dtype=np.uint64)
    drawn = _scramble(tokens * _ODD + places + np.uint64(model_seed & (2**64 - 1)))
    # A running sum: each token's number depends on all before it.
    prefixes = np.cumsum(drawn, dtype=np.uint64)
    element_count = SHAPE.layer_count * SHAPE.kv_heads * SHAPE.row_elements
    elements = np.arange(element_count, dtype=np.uint64) * _ODD
    numbers = _scramble(prefixes[:, None] + elements[None, :]) >> np.uint64(64 - _SPREAD_BITS)
    shaped = numbers.reshape(len(tokens), SHAPE.layer_count, SHAPE.kv_heads, SHAPE.row_elements)
    return np.ascontiguousarray(shaped.transpose(1, 0, 2, 3)).astype(np.float32) + np.float32(_SMALLEST)
