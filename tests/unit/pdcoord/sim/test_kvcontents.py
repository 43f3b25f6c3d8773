"""The numbers of an emulated model's KV."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.kvcontents import SHAPE, kv_of

ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=40)


@given(ids, ids)
def test_a_prefix_has_the_kv_it_has_alone(prefix: list[int], rest: list[int]) -> None:
    whole, alone = kv_of([*prefix, *rest], 1), kv_of(prefix, 1)
    assert np.array_equal(whole[:, : len(prefix)], alone)


@given(ids, st.integers(0, 39), st.integers(0, 2**31))
def test_every_token_before_it_counts(prompt: list[int], place: int, other: int) -> None:
    place %= len(prompt)
    changed = [*prompt[:place], other, *prompt[place + 1 :]]
    is_equal = np.array_equal(kv_of(prompt, 1)[:, -1], kv_of(changed, 1)[:, -1])
    assert is_equal == (changed == prompt)


def test_numbers_are_small_whole_and_of_the_models_shape() -> None:
    numbers = kv_of(range(500), 3)
    assert numbers.shape == (SHAPE.layer_count, 500, SHAPE.kv_heads, SHAPE.row_elements)
    assert set(np.unique(numbers)) == set(range(-4, 4))
    assert not np.array_equal(numbers, kv_of(range(500), 4))
