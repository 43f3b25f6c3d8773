"""Patches cover what they should, pages are whole, and collisions are found."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.errors import LayoutError
from transfer.layout import GroupShape, KvLayout, KvSplit, Order
from transfer.repack.arrangement import (
    Arrangement,
    Axis,
    Digit,
    Learned,
    LearnedSide,
    Patch,
    Side,
    Span,
    blocks_in,
    check,
    last_position,
    padding_of,
    pages,
    patches,
)
from transfer.repack.tables import as_learned, learned_side, table_of
from transfer.repack.tilings import arrangement_of, dense_tensors

UNTIMED = settings(deadline=None)


@st.composite
def sides(draw: st.DrawFn) -> Side:
    """A dense side whose digits stand in any order."""
    axes = [axis for axis in Axis for _ in range(draw(st.integers(1, 3)))]
    sizes = [draw(st.integers(1, 4)) for _ in axes]
    strides = [0] * len(axes)
    step = 1
    for index in draw(st.permutations(range(len(axes)))):
        strides[index] = step
        step *= sizes[index]
    digits = tuple(Digit(*digit) for digit in zip(axes, sizes, strides, strict=True))
    side = Side(0, draw(st.integers(0, 5)), digits, 1)
    return replace(side, dim=draw(st.integers(1, side.length(Axis.ELEMENT))))


def moves(patch: Patch) -> dict[int, int]:
    """Position in memory of each place of a dense array with strides 10000, 100 and 1."""
    start = patch.tokens.first * 10_000 + patch.heads.first * 100 + patch.elements.first
    found = {start: patch.offset}
    dense = patch.dense_strides(10_000, 100, 1)
    for size, memory, stride in zip(patch.shape, patch.memory_strides, dense, strict=True):
        found = {
            place + index * stride: position + index * memory
            for place, position in found.items()
            for index in range(size)
        }
    return found


@UNTIMED
@given(sides(), st.integers(1, 3), st.data())
def test_patches_move_each_wanted_element_once_from_its_place(
    side: Side, blocks: int, data: st.DataObject
) -> None:
    block_tokens, heads = side.length(Axis.TOKEN), side.length(Axis.HEAD)
    first = data.draw(st.integers(0, blocks * block_tokens - 1))
    tokens = Span(first, data.draw(st.integers(0, blocks * block_tokens - first)))
    head = data.draw(st.integers(0, heads - 1))
    wanted = Span(head, data.draw(st.integers(1, heads - head)))
    is_padding = data.draw(st.booleans())
    elements = padding_of(side) if is_padding else Span(0, side.dim)
    cut = patches(side, Digit(Axis.TOKEN, blocks, 1000), tokens, wanted, elements if is_padding else None)
    places = side.positions()
    room = side.length(Axis.ELEMENT)
    due = {
        token * 10_000 + head * 100 + element: token // block_tokens * 1000
        + places[(token % block_tokens * heads + head) * room + element]
        for token in range(tokens.first, tokens.first + tokens.count)
        for head in range(wanted.first, wanted.first + wanted.count)
        for element in range(elements.first, elements.first + elements.count)
    }
    made: dict[int, int] = {}
    for patch in cut:
        piece = moves(patch)
        assert not piece.keys() & made.keys()
        made.update(piece)
    assert made == due


@UNTIMED
@given(sides())
def test_tables_and_digits_tell_the_same_places(side: Side) -> None:
    whole = replace(side, dim=side.length(Axis.ELEMENT))
    assert table_of(whole).reshape(-1).tolist() == side.positions()
    learned = as_learned(Arrangement((whole,), (1000,)))
    assert learned.sides[0].positions() == side.positions()
    assert all(learned.sides[0].length(axis) == side.length(axis) for axis in Axis)
    assert (
        last_position(learned, 0) == max(side.positions()) == last_position(Arrangement((side,), (1000,)), 0)
    )


@UNTIMED
@given(sides())
def test_a_page_holds_every_element_of_its_block_once(side: Side) -> None:
    other = replace(side, offset=side.offset + 1 + max(side.positions()))
    block = Arrangement((side, other), (1 << 20,))
    check(block, 4)
    held: list[int] = []
    for piece in pages(block):
        positions = [piece.offset]
        for size, stride in zip(piece.sizes, piece.strides, strict=True):
            positions = [start + index * stride for start in positions for index in range(size)]
        assert piece.element_count == len(positions)
        held.extend(positions)
    assert sorted(held) == sorted(side.positions() + other.positions())


def test_one_run_of_memory_is_one_piece_and_split_heads_are_strided() -> None:
    shape = GroupShape(3, 4, 8, 8)
    dense = arrangement_of(KvLayout(16), shape, 4)
    assert [piece.sizes for piece in pages(dense)] == [(16 * 4 * 16,)]
    layout = KvLayout(16, Order.LHBNC)
    strides = tuple(tensor.strides for tensor in dense_tensors(layout, shape, 4, 5))
    (piece,) = pages(arrangement_of(layout, shape, 4, strides))
    assert (piece.sizes, piece.strides) == ((4, 256), (5 * 256, 1))
    separate = arrangement_of(KvLayout(16, split=KvSplit.SEPARATE), shape, 4)
    assert [piece.tensor for piece in pages(separate)] == [0, 1]


def block(offset: int = 64, stride: int = 128) -> Arrangement:
    digits = (Digit(Axis.TOKEN, 4, 16), Digit(Axis.HEAD, 2, 8), Digit(Axis.ELEMENT, 8, 1))
    return Arrangement((Side(0, 0, digits, 8), Side(0, offset, digits, 8)), (stride,))


@pytest.mark.parametrize("wrong", [block(63), block(0), block(stride=127), block(-64), block(stride=0)])
def test_colliding_elements_are_found(wrong: Arrangement) -> None:
    check(block(), 1000)
    with pytest.raises(LayoutError):
        check(wrong, 2)


def test_blocks_that_lie_between_each_other_collide_only_past_their_count() -> None:
    digits = (Digit(Axis.TOKEN, 2, 4), Digit(Axis.HEAD, 3, 5 * 8), Digit(Axis.ELEMENT, 4, 1))
    between = Arrangement((Side(0, 0, digits, 4),), (8,))
    check(between, 5)
    with pytest.raises(LayoutError, match="collide"):
        check(between, 6)


def test_a_learned_block_is_checked_like_any_other() -> None:
    side = as_learned(block()).sides[0]
    check(Learned((side,), (128,)), 10)
    table = table_of(side).copy()
    table[0, 0, 1] = table[0, 0, 0]
    with pytest.raises(LayoutError, match="collide"):
        check(Learned((learned_side(0, table),), (128,)), 10)
    assert isinstance(side, LearnedSide)


@pytest.mark.parametrize(("elements", "count"), [(127, 0), (128, 1), (128 * 3 - 1, 2), (128 * 3, 3)])
def test_only_whole_blocks_count(elements: int, count: int) -> None:
    assert blocks_in(block(), 0, elements) == count
