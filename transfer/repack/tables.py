"""Blocks read and written through tables of positions: learned pages, and pages as they travel."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transfer.repack.arrangement import AnyArrangement, Axis, Learned, LearnedSide, Side, Span, pages
from transfer.repack.jobs import MISSING, Run

Positions = NDArray[np.int64]


def table_of(side: Side | LearnedSide) -> Positions:
    """Elements from the block's start of each `[token][head][element]`, padding left out."""
    if isinstance(side, LearnedSide):
        return np.frombuffer(side.table, np.int64).reshape(side.tokens, side.heads, side.dim)
    table = np.full((1, 1, 1), side.offset, np.int64)
    lengths = []
    for place, axis in enumerate(Axis):
        index = np.zeros(1, np.int64)
        for digit in side.digits_of(axis):
            index = (index[:, None] + np.arange(digit.size) * digit.stride).reshape(-1)
        lengths.append(len(index))
        table = table + index.reshape([-1 if place == other else 1 for other in range(3)])
    return np.ascontiguousarray(table[:, :, : side.dim])


def learned_side(tensor: int, table: Positions) -> LearnedSide:
    """A side from its table `[token][head][element]`."""
    tokens, heads, dim = table.shape
    return LearnedSide(tensor, tokens, heads, dim, np.ascontiguousarray(table, np.int64).tobytes())


def as_learned(arrangement: AnyArrangement) -> Learned:
    """The same block as tables."""
    if isinstance(arrangement, Learned):
        return arrangement
    sides = tuple(learned_side(side.tensor, table_of(side)) for side in arrangement.sides)
    return Learned(sides, arrangement.block_strides)


def positions_of(side: LearnedSide, block_stride: int, runs: Sequence[Run], heads: Span) -> Positions:
    """Elements from the tensor's start of each moved `[token][head][element]`; missing runs are left out."""
    table = table_of(side)[:, heads.first : heads.first + heads.count]
    found = [np.empty((0, heads.count, side.dim), np.int64)]
    for run in runs:
        if run.block == MISSING:
            continue
        tokens = run.skip + np.arange(run.tokens.count)
        starts = (run.block + tokens // side.tokens) * block_stride
        found.append(table[tokens % side.tokens] + starts[:, None, None])
    return np.concatenate(found)


def rows_of(runs: Sequence[Run], first_token: int) -> NDArray[np.int64]:
    """Which of the moved tokens, counted from `first_token`, have a block."""
    found = [np.empty(0, np.int64)]
    found.extend(
        np.arange(run.tokens.first, run.tokens.end) - first_token for run in runs if run.block != MISSING
    )
    return np.concatenate(found)


def page_order(arrangement: AnyArrangement) -> tuple[tuple[int, Positions], ...]:
    """A block's page in `pages` form: (tensor, positions from the block's start), one after the other.

    Digits give the order of memory (`arrangement.pages`), tables the order key before value, each
    `[token][head][element]`. Only a page of digits holds the padding.
    """
    if isinstance(arrangement, Learned):
        return tuple((side.tensor, table_of(side).reshape(-1)) for side in arrangement.sides)
    found = []
    for piece in pages(arrangement):
        index: Positions = np.array([piece.offset], np.int64)
        for size, stride in zip(piece.sizes, piece.strides, strict=True):
            index = (index[:, None] + np.arange(size) * stride).reshape(-1)
        found.append((piece.tensor, index))
    return tuple(found)


def travelling(arrangement: AnyArrangement, page_elements: int) -> Learned:
    """The same block where it stands in a part of `pages` form: page after page in one tensor."""
    places: dict[int, tuple[Positions, Positions]] = {}
    start = 0
    for tensor, positions in page_order(arrangement):
        known, given = places.get(tensor, (np.empty(0, np.int64), np.empty(0, np.int64)))
        here = np.arange(start, start + len(positions))
        places[tensor] = np.concatenate([known, positions]), np.concatenate([given, here])
        start += len(positions)
    sides = []
    for side in arrangement.sides:
        known, given = places[side.tensor]
        order = np.argsort(known)
        sides.append(learned_side(0, given[order[np.searchsorted(known[order], table_of(side))]]))
    return Learned(tuple(sides), (page_elements,))
