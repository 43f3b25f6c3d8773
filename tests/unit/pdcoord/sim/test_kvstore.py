"""An emulated engine's memory holds a prompt's KV whatever its vendor's layout, and says so by digest."""

import numpy as np
import pytest

from pdcoord.sim.kvpool import KvPool
from pdcoord.sim.kvstore import KvStore
from pdcoord.sim.profiles import PROFILES
from transfer.canonical import TokenRange
from transfer.layout import KvDtype, KvLayout, Order

PROMPT = [7 * token % 1_000 for token in range(300)]
LAYOUTS = [
    *(profile.layout for profile in PROFILES.values()),
    KvLayout(16, Order.HND, KvDtype.FP8_E4M3FN),
    KvLayout(32, Order.NHD, KvDtype.FLOAT16),
]


def blocks(layout: KvLayout) -> list[int]:
    count = -(-len(PROMPT) // layout.block_tokens)
    return list(range(2 * count, 0, -2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_written_is_what_every_layout_tells(layout: KvLayout) -> None:
    store = KvStore(layout, 2 * len(PROMPT), 5)
    table = blocks(layout)
    store.write(PROMPT, table)
    for tokens in (TokenRange(0, 300), TokenRange(17, 100), TokenRange(299, 1)):
        assert store.digest(tokens, table) == store.expected(PROMPT, tokens)
    assert store.digest(TokenRange(0, 300), table) != store.expected([*PROMPT[1:], 1], TokenRange(0, 300))


def test_one_wrong_element_shows() -> None:
    layout = KvLayout(16, dtype=KvDtype.FLOAT32)
    store = KvStore(layout, 600, 5)
    table = blocks(layout)
    store.write(PROMPT, table)
    flat = store.memory[0].layers[1][0]
    (written,) = np.nonzero(flat)
    flat[written[0]] ^= 1 << 22
    assert store.digest(TokenRange(0, 300), table) != store.expected(PROMPT, TokenRange(0, 300))


def test_every_block_of_a_pool_of_that_size_can_be_used() -> None:
    layout = KvLayout(16, dtype=KvDtype.FLOAT32)
    count = -(-len(PROMPT) // 16)
    table = KvPool(count, 16).allocate(count)
    assert table is not None
    store = KvStore(layout, count, 5)
    store.write(PROMPT, table)
    assert store.digest(TokenRange(0, 300), table) == store.expected(PROMPT, TokenRange(0, 300))
