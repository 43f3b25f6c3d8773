"""Layouts refuse what no engine can have, and say in what they differ."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import LayoutError
from transfer.layout import (
    PLAIN_TILING,
    GroupShape,
    HeadRange,
    KvDtype,
    KvLayout,
    KvSplit,
    LayerScales,
    Order,
    RankLayout,
    heads_of_rank,
)

layouts = st.builds(
    KvLayout,
    block_tokens=st.integers(1, 256),
    order=st.sampled_from(Order),
    dtype=st.sampled_from(KvDtype),
    tensor_parallel=st.integers(1, 8),
    tiling=st.sampled_from([PLAIN_TILING, "fractal-nz"]),
    split=st.sampled_from(KvSplit),
    head_dim_multiple=st.sampled_from([1, 64, 128]),
)
SHAPE = GroupShape(2, 4, 64, 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_tokens", 0),
        ("block_tokens", -16),
        ("tensor_parallel", 0),
        ("head_dim_multiple", 0),
        ("tiling", ""),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(LayoutError) as caught:
        replace(KvLayout(16), **{field: value})
    assert caught.value.field == field
    assert caught.value.value == value


@given(layouts)
def test_a_layout_does_not_differ_from_itself(layout: KvLayout) -> None:
    assert layout.differences(replace(layout)) == []


@given(layouts, layouts)
def test_differences_are_symmetric_and_name_exactly_the_unequal_fields(one: KvLayout, two: KvLayout) -> None:
    names = one.differences(two)
    assert names == two.differences(one)
    assert names == [f.name for f in fields(KvLayout) if getattr(one, f.name) != getattr(two, f.name)]
    assert (names == []) == (one == two)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_count", 0),
        ("kv_heads", 0),
        ("key_dim", 0),
        ("value_dim", -1),
        ("value_dim", 0),
        ("window_tokens", 0),
    ],
)
def test_an_impossible_shape_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(LayoutError) as caught:
        replace(SHAPE, **{field: value})
    # Four heads without values are what is wrong there: MLA has one.
    assert caught.value.field == ("kv_heads" if (field, value) == ("value_dim", 0) else field)


def test_a_latent_is_one_head_without_a_value() -> None:
    latent = GroupShape(2, 1, 576, 0)
    assert (latent.is_mla, latent.row_elements) == (True, 576)
    assert (SHAPE.is_mla, SHAPE.row_elements) == (False, 128)


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 16))
def test_ranks_share_heads_evenly_or_are_refused(kv_heads: int, ranks: int) -> None:
    if kv_heads % ranks and ranks % kv_heads:
        with pytest.raises(LayoutError, match="tensor_parallel"):
            heads_of_rank(kv_heads, ranks, 0)
        return
    held = [heads_of_rank(kv_heads, ranks, rank) for rank in range(ranks)]
    assert len({heads.count for heads in held}) == 1
    assert {head for heads in held for head in range(heads.first, heads.end)} == set(range(kv_heads))
    assert [heads.first for heads in held] == sorted(heads.first for heads in held)


@pytest.mark.parametrize("rank", [-1, 2])
def test_there_is_no_rank_beyond_the_last(rank: int) -> None:
    with pytest.raises(LayoutError, match=r"0\.\.1"):
        heads_of_rank(4, 2, rank)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_heads_overlap_where_both_have_them(one: int, count: int, two: int, other: int) -> None:
    first, second = HeadRange(one, count), HeadRange(two, other)
    both = set(range(first.first, first.end)) & set(range(second.first, second.end))
    found = first.overlap(second)
    assert (set(range(found.first, found.end)) if found else set()) == both


def test_a_rank_knows_its_heads_of_each_group() -> None:
    rank = RankLayout(KvLayout(16, tensor_parallel=2), 1, (SHAPE, GroupShape(2, 1, 576, 0)))
    assert [rank.heads(group) for group in range(2)] == [HeadRange(2, 2), HeadRange(0, 1)]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("groups", {"groups": ()}),
        ("rank", {"rank": 2}),
        ("tensor_parallel", {"layout": KvLayout(16, tensor_parallel=3)}),
        ("scales", {"scales": ((LayerScales(),),)}),
        ("scales", {"scales": ((LayerScales(),) * 2,) * 2}),
    ],
)
def test_a_rank_that_cannot_be_is_refused_by_name(field: str, change: dict[str, Any]) -> None:
    rank = RankLayout(KvLayout(16, tensor_parallel=2), 1, (SHAPE,), ((LayerScales(),) * 2,))
    with pytest.raises(LayoutError) as caught:
        replace(rank, **change)
    assert caught.value.field == field
