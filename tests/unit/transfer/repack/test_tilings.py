"""Known pages against their formulas, and what cannot be."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from transfer.errors import LayoutError
from transfer.layout import GroupShape, KvDtype, KvLayout, KvSplit, Order
from transfer.presets import PRESETS
from transfer.repack.arrangement import Axis, check
from transfer.repack.tables import table_of
from transfer.repack.tilings import (
    CPU_AMX,
    CPU_VEC,
    CPU_VEC16,
    KNOWN_TILINGS,
    ROCM_AITER_SHUFFLE,
    ROCM_ATTN,
    Strides,
    arrangement_of,
    dense_tensors,
)

N, D, H = 32, 48, 3
SHAPE = GroupShape(2, 6, D, D)
HALVED = KvLayout(N, Order.HND, split=KvSplit.HALVED)
X = 8  # elements of bfloat16 in 16 bytes
Place = Callable[[int, int, int], int]

# For each tiling the place of a key's and of a value's (token, head, element) in one block of H heads.
FORMULAS: dict[str, tuple[Place, Place]] = {
    "plain": (
        lambda t, h, e: h * 2 * N * D + t * D + e,
        lambda t, h, e: h * 2 * N * D + N * D + t * D + e,
    ),
    CPU_VEC: (
        lambda t, h, e: h * 2 * N * D + e * N + t,
        lambda t, h, e: h * 2 * N * D + N * D + t * D + e,
    ),
    CPU_VEC16: (
        lambda t, h, e: h * 2 * N * D + e * N + t,
        lambda t, h, e: h * 2 * N * D + N * D + t * D + e,
    ),
    CPU_AMX: (
        lambda t, h, e: h * 2 * N * D + t // 16 * 16 * D + e // 2 * 32 + t % 16 * 2 + e % 2,
        lambda t, h, e: h * 2 * N * D + N * D + e // 16 * 16 * N + t // 2 * 32 + e % 16 * 2 + t % 2,
    ),
    ROCM_ATTN: (
        lambda t, h, e: h * N * D + e // X * N * X + t * X + e % X,
        lambda t, h, e: H * N * D + h * N * D + e * N + t,
    ),
    ROCM_AITER_SHUFFLE: (
        lambda t, h, e: h * N * D + e // X * N * X + t * X + e % X,
        lambda t, h, e: H * N * D + h * N * D + t // X * D * X + e * X + t % X,
    ),
}


@pytest.mark.parametrize("tiling", KNOWN_TILINGS)
def test_a_tiling_is_its_formula(tiling: str) -> None:
    made = arrangement_of(replace(HALVED, tiling=tiling), SHAPE, H)
    assert made.block_strides == (2 * N * D * H,)
    for side, place in zip(made.sides, FORMULAS[tiling], strict=True):
        table = table_of(side)
        assert table.shape == (N, H, D)
        for key in itertools.product(range(N), range(H), range(D)):
            assert table[key] == place(*key)


@pytest.mark.parametrize(
    ("order", "place"),
    [
        (Order.HND, lambda h, t: (h * N + t) * 2 * D),
        (Order.NHD, lambda h, t: (t * H + h) * 2 * D),
    ],
)
def test_packed_pages_hold_key_and_value_of_a_token_side_by_side(
    order: Order, place: Callable[[int, int], int]
) -> None:
    key, value = (table_of(side) for side in arrangement_of(KvLayout(N, order), SHAPE, H).sides)
    for token, head in itertools.product(range(N), range(H)):
        assert key[token, head].tolist() == list(range(place(head, token), place(head, token) + D))
        assert (value[token, head] - key[token, head] == D).all()


def test_padding_stands_behind_each_key_and_each_value() -> None:
    made = arrangement_of(KvLayout(N, head_dim_multiple=64), SHAPE, H)
    assert [side.dim for side in made.sides] == [D, D]
    assert [side.length(Axis.ELEMENT) for side in made.sides] == [64, 64]
    assert made.sides[1].offset == 64
    assert made.block_strides == (N * H * 128,)


def test_a_latent_is_one_side_whatever_the_split() -> None:
    latent = GroupShape(1, 1, 576, 0)
    for split, order in itertools.product(KvSplit, (Order.HND, Order.NHD)):
        made = arrangement_of(KvLayout(64, order, split=split), latent, 1)
        assert len(made.sides) == len(made.block_strides) == 1
        assert table_of(made.sides[0]).reshape(-1).tolist() == list(range(64 * 576))


def test_the_engines_own_strides_are_followed() -> None:
    # A padded page: 4 elements between two blocks' tokens, heads outermost.
    made = arrangement_of(KvLayout(4, Order.LHBNC), GroupShape(1, 2, 2, 2), 2, (Strides(20, 1000, 4, 1),))
    assert table_of(made.sides[1])[3, 1].tolist() == [1000 + 12 + 2, 1000 + 12 + 3]
    assert made.block_strides == (20,)


@pytest.mark.parametrize(("order", "split"), list(itertools.product(Order, KvSplit)))
def test_dense_tensors_hold_every_element_of_every_layer_once(order: Order, split: KvSplit) -> None:
    layout = KvLayout(4, order, split=split)
    shape = GroupShape(3, 2, 4, 4)
    tensors = dense_tensors(layout, shape, 2, 5)
    made = arrangement_of(layout, shape, 2, tuple(tensor.strides for tensor in tensors))
    check(made, 5)
    seen = [
        (
            side.tensor,
            layer * tensors[side.tensor].layer_stride + number * made.block_strides[side.tensor] + place,
        )
        for side in made.sides
        for place in side.positions()
        for layer in range(3)
        for number in range(5)
    ]
    due = [(index, place) for index, tensor in enumerate(tensors) for place in range(tensor.element_count)]
    assert sorted(seen) == due


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [KvDtype.BFLOAT16, KvDtype.FP8_E4M3FNUZ])
def test_every_preset_has_an_arrangement(name: str, dtype: KvDtype) -> None:
    layout = replace(PRESETS[name].layout, dtype=dtype)
    shape = GroupShape(1, 8, 128, 128)
    tensors = dense_tensors(layout, shape, 8, 3)
    if layout.tiling == CPU_AMX and dtype.is_fp8:
        with pytest.raises(LayoutError, match="two bytes"):
            arrangement_of(layout, shape, 8, tuple(tensor.strides for tensor in tensors))
        return
    check(arrangement_of(layout, shape, 8, tuple(tensor.strides for tensor in tensors)), 3)


@pytest.mark.parametrize(
    ("message", "layout", "shape"),
    [
        ("one of plain", replace(HALVED, tiling="neon"), SHAPE),
        ("learned", replace(HALVED, tiling="learned-12"), SHAPE),
        ("MLA", replace(HALVED, tiling=CPU_VEC), GroupShape(1, 1, 64, 0)),
        ("split", KvLayout(N, Order.HND, tiling=CPU_VEC), SHAPE),
        ("order", replace(HALVED, tiling=CPU_VEC, order=Order.NHD), SHAPE),
        ("strides", KvLayout(N, Order.BLHNC), SHAPE),
        ("block_tokens", replace(HALVED, tiling=CPU_AMX, block_tokens=24), SHAPE),
        ("key_dim", replace(HALVED, tiling=ROCM_ATTN), GroupShape(1, 6, 36, 36)),
        ("block_tokens", replace(HALVED, tiling=ROCM_AITER_SHUFFLE, block_tokens=20), SHAPE),
        ("value_dim", replace(HALVED, tiling=ROCM_ATTN), GroupShape(1, 6, 64, 32)),
        ("dtype", replace(HALVED, tiling=CPU_AMX, dtype=KvDtype.FLOAT32), SHAPE),
    ],
)
def test_what_cannot_be_is_refused(message: str, layout: KvLayout, shape: GroupShape) -> None:
    with pytest.raises(LayoutError, match=message):
        arrangement_of(layout, shape, H)


@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        (HALVED, (Strides(9000, 3200, 100, 1),)),
        (replace(HALVED, tiling=ROCM_ATTN), (Strides(9216, 4608, 100, 1),)),
        (KvLayout(N), (Strides(9000, 96, 288, 1), Strides(9000, 96, 288, 1))),
    ],
)
def test_strides_that_such_a_page_cannot_have_are_refused(
    layout: KvLayout, strides: tuple[Strides, ...]
) -> None:
    with pytest.raises(LayoutError, match="strides"):
        arrangement_of(layout, SHAPE, H, strides)
