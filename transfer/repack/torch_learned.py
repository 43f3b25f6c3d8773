"""Gather and scatter of pages that no strides describe, by tables of positions, on any device torch knows."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from transfer.canonical import TokenRange
from transfer.repack.arrangement import Learned, LearnedSide, Span
from transfer.repack.jobs import MISSING, Run
from transfer.repack.moves import Dense
from transfer.repack.torch_memory import GroupFlats, Layers

CHUNK_ELEMENTS_MAX = 1 << 20
"""Positions that are held at a time, of 8 bytes each."""


class Indexed(NamedTuple):
    """Elements of one layer's tensor that are moved by index.

    Attributes:
        positions: int64, flat: from the layer's first element.
        shape: tokens, heads, elements: of the view of the dense array that they fill.
        offset: of that view, in elements.
        strides: of that view.
    """

    tensor: int
    positions: Any
    shape: tuple[int, int, int]
    offset: int
    strides: tuple[int, int, int]


def gather(
    group: GroupFlats, layers: Layers, moves: Sequence[Indexed] | Iterator[Indexed], dense: Any
) -> None:
    """Fill dense layers from the blocks."""
    for move, flat, there in _ends(group, layers, moves, dense):
        there.copy_(flat.index_select(0, move.positions).view(move.shape))


def scatter(
    group: GroupFlats, layers: Layers, moves: Sequence[Indexed] | Iterator[Indexed], dense: Any
) -> None:
    """Fill the blocks from dense layers."""
    for move, flat, there in _ends(group, layers, moves, dense):
        flat.index_copy_(0, move.positions, there.reshape(-1))


def indexed(
    arrangement: Learned,
    runs: Sequence[Run],
    tokens: TokenRange,
    heads: Span,
    dense: Dense,
    *,
    device: Any,
    origin: int = 0,
) -> Iterator[Indexed]:
    """The moves of these tokens and heads of one layer; arguments as in `moves.copies`.

    Args:
        origin: elements from the layer's first element to where block 0 would begin.
    """
    start = 0
    for side in arrangement.sides:
        stride = arrangement.block_strides[side.tensor]
        table = _table(side, device)[:, heads.first : heads.first + heads.count]
        step = max(1, CHUNK_ELEMENTS_MAX // (heads.count * side.dim))
        for run in runs:
            if run.block == MISSING:
                continue
            for low in range(0, run.tokens.count, step):
                count = min(step, run.tokens.count - low)
                place = torch.arange(run.skip + low, run.skip + low + count, device=device)
                blocks = (torch.div(place, side.tokens, rounding_mode="floor") + run.block) * stride + origin
                positions = table.index_select(0, place % side.tokens) + blocks[:, None, None]
                yield Indexed(
                    tensor=side.tensor,
                    positions=positions.reshape(-1),
                    shape=(count, heads.count, side.dim),
                    offset=dense.offset
                    + (run.tokens.first + low - tokens.first) * dense.token_stride
                    + start,
                    strides=(dense.token_stride, dense.head_stride, 1),
                )
        start += side.dim


def _ends(
    group: GroupFlats, layers: Layers, moves: Sequence[Indexed] | Iterator[Indexed], dense: Any
) -> Iterator[tuple[Indexed, Any, Any]]:
    for move in moves:
        for cut in group.cuts(move.tensor, layers.first, layers.count):
            for index in range(cut.count):
                flat = cut.stack.flat[cut.offset + index * cut.stack.layer_stride :]
                offset = (cut.behind + index) * layers.stride + move.offset + dense.storage_offset()
                yield move, flat, torch.as_strided(dense, move.shape, move.strides, offset)


@lru_cache(maxsize=64)
def _table(side: LearnedSide, device: Any) -> Any:
    table = np.frombuffer(side.table, np.int64).reshape(side.tokens, side.heads, side.dim)
    return torch.from_numpy(table.copy()).to(device)
