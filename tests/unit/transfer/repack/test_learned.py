"""A probe finds known tilings, fits strange ones, and refuses writers that lose or change elements."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transfer.errors import LayoutError
from transfer.layout import LEARNED_PREFIX, GroupShape, KvDtype, KvLayout, KvSplit, Order
from transfer.repack.arrangement import AnyArrangement, Arrangement, Learned, last_position
from transfer.repack.learned import Finding, Writer, layout_of, learn
from transfer.repack.numbers import encode
from transfer.repack.tables import as_learned, learned_side, table_of
from transfer.repack.tilings import (
    CPU_AMX,
    CPU_VEC,
    ROCM_AITER_SHUFFLE,
    ROCM_ATTN,
    Strides,
    arrangement_of,
    dense_tensors,
)

SHAPE = GroupShape(2, 4, 32, 32)
HALVED = KvLayout(32, Order.HND, split=KvSplit.HALVED)
Floats = NDArray[np.float32]


def strides_of(layout: KvLayout, shape: GroupShape, heads: int, blocks: int = 1) -> tuple[Strides, ...]:
    return tuple(tensor.strides for tensor in dense_tensors(layout, shape, heads, blocks))


def writer_of(
    arrangement: AnyArrangement, dtype: KvDtype, spoil: Callable[[Floats], object] = lambda memory: None
) -> Writer:
    """An engine's writer that puts each element where an arrangement says."""

    def write(keys: Floats, values: Floats | None) -> Sequence[bytes]:
        memory = [
            np.zeros(last_position(arrangement, tensor) + 1, np.float32)
            for tensor in range(len(arrangement.block_strides))
        ]
        for side, numbers in zip(arrangement.sides, (keys, values), strict=False):
            assert numbers is not None
            memory[side.tensor][table_of(side)] = numbers
        spoil(memory[0])
        return [encode(part, dtype).tobytes() for part in memory]

    return write


@pytest.mark.parametrize(
    "layout",
    [
        KvLayout(16),
        KvLayout(16, Order.HND),
        KvLayout(32, Order.LHBNC),
        KvLayout(16, Order.HND, head_dim_multiple=48),
        KvLayout(16, split=KvSplit.SEPARATE),
        HALVED,
        replace(HALVED, tiling=CPU_VEC),
        replace(HALVED, tiling=CPU_AMX),
        replace(HALVED, tiling=ROCM_ATTN, order=Order.LHBNC),
        replace(HALVED, tiling=ROCM_AITER_SHUFFLE),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [KvDtype.BFLOAT16, KvDtype.FLOAT32, KvDtype.FP8_E5M2, KvDtype.FP8_E4M3FNUZ])
def test_a_known_tiling_is_found_whatever_was_declared(layout: KvLayout, dtype: KvDtype) -> None:
    layout = replace(layout, dtype=dtype)
    if layout.tiling == CPU_AMX and dtype.item_bytes != 2:
        layout = replace(layout, dtype=KvDtype.BFLOAT16)
    strides = strides_of(layout, SHAPE, 2, 3)
    real = arrangement_of(layout, SHAPE, 2, strides)
    declared = replace(layout, tiling="learned-0", split=KvSplit.PACKED)
    found = learn(declared, SHAPE, 2, strides, writer_of(real, layout.dtype))
    assert found == Finding(layout.tiling, layout.split, real)
    assert layout_of(declared, [found]) == layout


def test_a_latent_is_learned() -> None:
    shape, layout = GroupShape(1, 1, 48, 0), KvLayout(8)
    strides = strides_of(layout, shape, 1)
    real = arrangement_of(layout, shape, 1, strides)
    assert learn(layout, shape, 1, strides, writer_of(real, layout.dtype)).arrangement == real


def test_an_unknown_tiling_of_digits_is_fitted_and_named_by_its_positions() -> None:
    strides = strides_of(HALVED, SHAPE, 2)
    amx, vec = (arrangement_of(replace(HALVED, tiling=t), SHAPE, 2, strides) for t in (CPU_AMX, CPU_VEC))
    mixed = Arrangement((vec.sides[0], amx.sides[1]), amx.block_strides)
    found = learn(HALVED, SHAPE, 2, strides, writer_of(mixed, HALVED.dtype))
    assert found.tiling.startswith(LEARNED_PREFIX)
    assert isinstance(found.arrangement, Arrangement)
    for side, real in zip(found.arrangement.sides, mixed.sides, strict=True):
        assert np.array_equal(table_of(side), table_of(real))
    again = learn(
        replace(HALVED, dtype=KvDtype.FLOAT32), SHAPE, 2, strides, writer_of(mixed, KvDtype.FLOAT32)
    )
    assert again.tiling == found.tiling
    other = Arrangement((amx.sides[0], vec.sides[1]), amx.block_strides)
    assert learn(HALVED, SHAPE, 2, strides, writer_of(other, HALVED.dtype)).tiling != found.tiling


def test_digits_are_not_assumed_from_the_edges_of_a_block() -> None:
    strides = strides_of(HALVED, SHAPE, 2)
    vec = as_learned(arrangement_of(replace(HALVED, tiling=CPU_VEC), SHAPE, 2, strides))
    table = table_of(vec.sides[0]).copy()
    table[3, 1, 5], table[4, 1, 6] = table[4, 1, 6], table[3, 1, 5]
    odd = Learned((learned_side(0, table), vec.sides[1]), vec.block_strides)
    assert learn(HALVED, SHAPE, 2, strides, writer_of(odd, HALVED.dtype)).arrangement == odd


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.sampled_from(list(KvDtype)))
def test_any_bijection_is_learned(random: Random, dtype: KvDtype) -> None:
    shape, layout = GroupShape(1, 2, 4, 4), KvLayout(4, Order.HND, dtype)
    places = list(range(96))
    random.shuffle(places)
    table = np.array(places[:64], np.int64).reshape(2, 4, 2, 4)
    real = Learned((learned_side(0, table[0]), learned_side(0, table[1])), (64,))
    found = learn(layout, shape, 2, strides_of(layout, shape, 2), writer_of(real, dtype))
    assert as_learned(found.arrangement) == real


def _twice(memory: Floats) -> None:
    memory[1] = memory[0]


def _lost(memory: Floats) -> None:
    memory[7] = 0


def _changed(memory: Floats) -> None:
    memory[:] *= 1.5


def _shifted(memory: Floats) -> None:
    memory[memory > 0] += 0.25


def _negative(memory: Floats) -> None:
    memory[3] = -memory[3]


def _broken(memory: Floats) -> None:
    memory[3] = np.nan


@pytest.mark.parametrize("spoil", [_twice, _lost, _changed, _shifted, _negative, _broken])
def test_what_is_no_bijection_is_refused(spoil: Callable[[Floats], object]) -> None:
    strides = strides_of(HALVED, SHAPE, 2)
    real = arrangement_of(HALVED, SHAPE, 2, strides)
    with pytest.raises(LayoutError):
        learn(HALVED, SHAPE, 2, strides, writer_of(real, HALVED.dtype, spoil))


def test_a_writer_that_is_not_the_same_twice_is_refused() -> None:
    strides = strides_of(HALVED, SHAPE, 2)
    write = writer_of(arrangement_of(HALVED, SHAPE, 2, strides), HALVED.dtype)
    turns = iter(range(100))

    def moves(keys: Floats, values: Floats | None) -> Sequence[bytes]:
        raw = write(keys, values)[0]
        return [bytes(2 * (next(turns) % 2)) + raw + bytes(2)][:1]

    with pytest.raises(LayoutError):
        learn(HALVED, SHAPE, 2, strides, moves)
    with pytest.raises(LayoutError, match="1 tensors"):
        learn(HALVED, SHAPE, 2, strides, lambda keys, values: [*write(keys, values), b"\0\0"])


def test_groups_of_unlike_tilings_are_named_together() -> None:
    strides = strides_of(HALVED, SHAPE, 2)
    found = [
        learn(HALVED, SHAPE, 2, strides, writer_of(arrangement_of(layout, SHAPE, 2, strides), HALVED.dtype))
        for layout in (HALVED, replace(HALVED, tiling=CPU_VEC))
    ]
    assert [finding.tiling for finding in found] == ["plain", CPU_VEC]
    both = layout_of(HALVED, found)
    assert both.tiling.startswith(LEARNED_PREFIX)
    assert layout_of(HALVED, found[::-1]).tiling != both.tiling
