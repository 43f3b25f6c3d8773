"""Moves between a layer's flat numpy tensors and a dense array or pages, either way."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transfer.canonical import TokenRange
from transfer.repack.arrangement import AnyArrangement, Arrangement, Learned, Span, pages
from transfer.repack.jobs import Run
from transfer.repack.moves import Copy, Dense, copies, paddings
from transfer.repack.tables import page_order, positions_of, rows_of

Flat = NDArray[Any]


class Moves(Protocol):
    """A prepared set of copies, the same for each layer of a group."""

    def load(self, tensors: Sequence[Flat], dense: Flat) -> None:
        """From the blocks into the dense array; what has no block is left as it is there."""

    def store(self, tensors: Sequence[Flat], dense: Flat) -> None:
        """From the dense array into the blocks, padding set to zero."""


def moves_of(
    arrangement: AnyArrangement, runs: Sequence[Run], tokens: TokenRange, heads: Span, dense: Dense
) -> Moves:
    """Copies of some tokens and heads; `dense` says where they lie in the flat dense array."""
    if isinstance(arrangement, Learned):
        return TableMoves(arrangement, runs, tokens, heads, dense)
    return StridedMoves(arrangement, runs, tokens, heads, dense)


class StridedMoves:
    """Moves by strides, for blocks of digits."""

    def __init__(
        self, arrangement: Arrangement, runs: Sequence[Run], tokens: TokenRange, heads: Span, dense: Dense
    ) -> None:
        self._copies = copies(arrangement, runs, tokens, heads, dense)
        self._paddings = paddings(arrangement, runs, heads)

    def load(self, tensors: Sequence[Flat], dense: Flat) -> None:
        for copy in self._copies:
            memory, there = _memory_view(copy, tensors[copy.tensor]), _dense_view(copy, dense)
            if copy.blocks:
                there[list(copy.rows)] = memory[list(copy.blocks)]
            else:
                there[...] = memory

    def store(self, tensors: Sequence[Flat], dense: Flat) -> None:
        for copy in self._copies:
            memory, there = _memory_view(copy, tensors[copy.tensor]), _dense_view(copy, dense)
            if copy.blocks:
                memory[list(copy.blocks)] = there[list(copy.rows)]
            else:
                memory[...] = there
        for copy in self._paddings:
            memory = _memory_view(copy, tensors[copy.tensor])
            memory[list(copy.blocks) if copy.blocks else ...] = 0


class TableMoves:
    """Moves by index, for blocks of tables; no padding is known or written.

    Args:
        origin: where block 0 begins in its tensor, or would begin.
    """

    def __init__(
        self,
        arrangement: Learned,
        runs: Sequence[Run],
        tokens: TokenRange,
        heads: Span,
        dense: Dense,
        *,
        origin: int = 0,
    ) -> None:
        rows = rows_of(runs, tokens.first) * dense.token_stride
        head = np.arange(heads.count) * dense.head_stride
        self._sides: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
        start = dense.offset
        for side in arrangement.sides:
            stride = arrangement.block_strides[side.tensor]
            there = rows[:, None, None] + head[:, None] + (start + np.arange(side.dim))
            self._sides.append((side.tensor, positions_of(side, stride, runs, heads) + origin, there))
            start += side.dim

    def load(self, tensors: Sequence[Flat], dense: Flat) -> None:
        for tensor, positions, there in self._sides:
            dense[there] = tensors[tensor][positions]

    def store(self, tensors: Sequence[Flat], dense: Flat) -> None:
        for tensor, positions, there in self._sides:
            tensors[tensor][positions] = dense[there]


class PageMoves:
    """Moves of whole pages of consecutive blocks, as they are; the array is `[block][page elements]`."""

    def __init__(self, arrangement: AnyArrangement) -> None:
        self._strides = arrangement.block_strides
        self._pieces = pages(arrangement) if isinstance(arrangement, Arrangement) else None
        self._order = () if isinstance(arrangement, Arrangement) else page_order(arrangement)

    def load(self, tensors: Sequence[Flat], block: int, into: Flat) -> None:
        if self._pieces is not None:
            for memory, there in self._views(tensors, block, into):
                there[...] = memory
            return
        start = 0
        for tensor, positions in self._order:
            into[:, start : start + len(positions)] = tensors[tensor][
                self._at(tensor, block, into, positions)
            ]
            start += len(positions)
        into[:, start:] = 0

    def store(self, tensors: Sequence[Flat], block: int, given: Flat) -> None:
        if self._pieces is not None:
            for memory, there in self._views(tensors, block, given):
                memory[...] = there
            return
        start = 0
        for tensor, positions in self._order:
            tensors[tensor][self._at(tensor, block, given, positions)] = given[
                :, start : start + len(positions)
            ]
            start += len(positions)

    def _views(self, tensors: Sequence[Flat], block: int, array: Flat) -> list[tuple[Flat, Flat]]:
        found = []
        start = 0
        for piece in self._pieces or ():
            stride = self._strides[piece.tensor]
            shape = (len(array), *piece.sizes)
            memory = _view(
                tensors[piece.tensor], shape, (stride, *piece.strides), block * stride + piece.offset
            )
            found.append((memory, array[:, start : start + piece.element_count].reshape(shape)))
            start += piece.element_count
        return found

    def _at(self, tensor: int, block: int, array: Flat, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        starts = np.arange(block, block + len(array)) * self._strides[tensor]
        return starts[:, None] + positions


def _view(flat: Flat, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Flat:
    """A strided view; numpy refuses one that reaches outside the flat array."""
    size = flat.itemsize
    byte_strides = tuple(stride * size for stride in strides)
    return np.ndarray(shape, flat.dtype, buffer=flat, offset=offset * size, strides=byte_strides)


def _memory_view(copy: Copy, tensor: Flat) -> Flat:
    if not copy.blocks:
        return _view(tensor, copy.shape, copy.memory_strides, copy.memory_offset)
    shape = (max(copy.blocks) + 1, *copy.shape)
    return _view(tensor, shape, (copy.block_stride, *copy.memory_strides), copy.memory_offset)


def _dense_view(copy: Copy, dense: Flat) -> Flat:
    if not copy.blocks:
        return _view(dense, copy.shape, copy.dense_strides, copy.dense_offset)
    shape = (max(copy.rows) + 1, *copy.shape)
    return _view(dense, shape, (copy.row_stride, *copy.dense_strides), copy.dense_offset)
