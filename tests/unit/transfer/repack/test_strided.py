"""Strided copies in host memory against numpy's own, wherever the two ends stand."""

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transfer.repack import strided
from transfer.repack.strided import End, carry_out, plan, simplified

TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@st.composite
def strides(draw: Any, shape: list[int]) -> tuple[tuple[int, ...], int]:
    """Strides in which no two elements meet, in any order, with gaps; and the elements they span."""
    found = [0] * len(shape)
    step = 1
    for axis in draw(st.permutations(range(len(shape)))):
        found[axis] = step
        step *= shape[axis] * draw(st.sampled_from([1, 1, 1, 2, 3]))
    return tuple(found), step


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64]), max_size=6))
    while prod(shape) > 300_000:
        shape.remove(max(shape))
    item = draw(st.sampled_from(sorted(TYPES)))
    return {
        "shape": tuple(shape),
        "item": item,
        "to": draw(strides(shape)),
        "source": draw(strides(shape)),
        "offsets": (draw(st.integers(0, 9)) * item, draw(st.integers(0, 9)) * item),
    }


def view(memory: NDArray[np.uint8], case: dict[str, Any], end: str, offset: int) -> NDArray[Any]:
    steps = tuple(stride * case["item"] for stride in case[end][0])
    return np.ndarray(case["shape"], TYPES[case["item"]], memory, offset, steps)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_copy_moves_each_element_and_nothing_else(case: dict[str, Any]) -> None:
    item, (to_offset, source_offset) = case["item"], case["offsets"]
    source = np.random.default_rng(0).integers(0, 256, case["source"][1] * item + 64, np.uint8)
    found = np.zeros(case["to"][1] * item + 64, np.uint8)
    expected = found.copy()
    view(expected, case, "to", to_offset)[...] = view(source, case, "source", source_offset)
    alignment = 16
    while to_offset % alignment or source_offset % alignment:
        alignment //= 2
    way = plan(case["shape"], case["to"][0], case["source"][0], item, alignment)
    carry_out(way, End(found, to_offset), End(source, source_offset))
    assert np.array_equal(found, expected)


def test_neighbours_are_joined_and_elements_widened() -> None:
    dims, item = simplified((4, 8, 16), (128, 16, 1), (256, 16, 1), 2, alignment_bytes=16)
    assert (dims, item) == ([strided.Dim(4, 256, 512), strided.Dim(16, 16, 16)], 16)
    dims, item = simplified((4, 128), (128, 1), (256, 1), 2, alignment_bytes=4)
    assert item == 4
    dims, item = simplified((4, 128), (128, 1), (129, 1), 2, alignment_bytes=16)
    assert item == 2


@pytest.mark.parametrize("tokens", [128, 2048])
def test_a_transpose_larger_than_the_cache_goes_through_a_bounded_buffer(tokens: int) -> None:
    heads, dim = 8, 128
    way = plan((heads, tokens, dim), (dim, heads * dim, 1), (tokens * dim, 1, tokens), 2, 16)
    assert way.filling
    for move in way.filling:
        end = move.to_offset + sum((n - 1) * s for n, s in zip(move.to.shape, move.to.strides, strict=True))
        assert end + 2 <= strided.SCRATCH_BYTES
    source = np.random.default_rng(0).integers(0, 1 << 16, (heads, dim, tokens), np.uint16)
    found = np.zeros((tokens, heads, dim), np.uint16)
    carry_out(way, End(found.reshape(-1).view(np.uint8), 0), End(source.reshape(-1).view(np.uint8), 0))
    assert np.array_equal(found, source.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32])
def test_two_rows_are_joined_to_one_of_wider_elements(kind: type[np.unsignedinteger[Any]]) -> None:
    """As vLLM's matrix-unit pages keep values: `[head][token / 2][element][2 tokens]`."""
    heads, tokens, dim = 4, 128, 128
    item = kind().itemsize
    way = plan(
        (heads, tokens // 2, 2, dim),
        (tokens * dim, 2 * dim, 1, 2),
        (dim, 2 * heads * dim, heads * dim, 1),
        item,
        16,
    )
    assert way.joining
    source = np.random.default_rng(0).integers(0, 256, tokens * heads * dim * item, np.uint8).view(kind)
    found = np.zeros(heads * tokens * dim, kind)
    carry_out(way, End(found.view(np.uint8), 0), End(source.view(np.uint8), 0))
    expected = source.reshape(tokens // 2, 2, heads, dim).transpose(2, 0, 3, 1)
    assert np.array_equal(found.reshape(expected.shape), expected)


def test_a_copy_is_repeated_for_each_pair() -> None:
    source = np.arange(6 * 4, dtype=np.uint16)
    found = np.zeros(6 * 4, np.uint16)
    way = plan((4,), (1,), (1,), 2, 8)
    ends = End(found.view(np.uint8), 0, 8), End(source.view(np.uint8), 0, 8)
    carry_out(way, *ends, [(0, 5), (3, 1)])
    expected = np.zeros((6, 4), np.uint16)
    expected[0], expected[3] = source[20:], source[4:8]
    assert np.array_equal(found.reshape(6, 4), expected)
