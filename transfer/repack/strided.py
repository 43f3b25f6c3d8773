"""Strided copies in host memory: wide elements, and transposes by way of a buffer that the cache holds."""

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
"""A flat array over all of a piece of memory; offsets and strides count its bytes."""

WIDE_BYTES_MAX = 16
WORD_BYTES = 8
SCRATCH_BYTES = 256 * 1024
"""A transpose's buffer stays in the second-level cache."""
NEAR_BYTES = 32 * 1024
"""What stays in the first-level cache while it is read again."""
LINE_BYTES = 64
FAR_STRIDE_BYTES = 1024
"""Elements this far apart, or more, share so few places of the cache that they push each other out."""
SHORT_AXIS = 8
"""An innermost loop of no more elements costs more to begin than to run."""

_TYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
    16: np.complex128,  # The only plain type of 16 bytes; copies between equal types move bits.
}


class Dim(NamedTuple):
    """One axis of a copy; strides in bytes."""

    size: int
    to: int
    source: int


class _View(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Move(NamedTuple):
    """One call of numpy; offsets count from where the repetition of the copy stands, or the buffer."""

    kind: type[np.generic]
    to: _View
    to_offset: int
    source: _View
    source_offset: int
    source_kind: type[np.generic] | None = None
    """Where it differs: a narrower whole number, which is widened with zeros."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to carry out a strided copy, wherever its two ends stand.

    Attributes:
        repeats: axes that are gone through one by one, the slowest first.
        filling: from the source to the buffer; empty for copies without one.
        joining: from one half of the buffer to the other, after `filling`.
        moves: from the source, or the buffer where `filling` is not empty, to the destination.
    """

    repeats: tuple[Dim, ...]
    filling: tuple[_Move, ...]
    joining: tuple[_Move, ...]
    moves: tuple[_Move, ...]


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    to: tuple[int, ...],
    source: tuple[int, ...],
    item_bytes: int,
    alignment_bytes: int,
) -> Plan:
    """Plan a copy of `shape` elements.

    Args:
        to: strides of the destination, in elements, aligned with `shape`.
        source: strides of the source.
        item_bytes: of one element: 1, 2, 4 or 8.
        alignment_bytes: a power of two that divides the addresses of the first elements of both ends.
    """
    dims, item_bytes = simplified(shape, to, source, item_bytes, alignment_bytes=alignment_bytes)
    if not dims:
        return Plan((), (), (), _moves([], [], item_bytes))
    fast_to, fast_source = _fastest(dims, 1), _fastest(dims, 2)
    if fast_to == fast_source or _is_near(dims, fast_to, fast_source):
        return Plan((), (), (), _moves(dims, [dim.source for dim in dims], item_bytes))
    if _is_paired(dims, fast_to, item_bytes):
        return _paired_in_buffer(dims, item_bytes)
    return _swapped_in_buffer(dims, item_bytes)


def simplified(
    shape: tuple[int, ...],
    to: tuple[int, ...],
    source: tuple[int, ...],
    item_bytes: int,
    *,
    alignment_bytes: int,
    wide_bytes_max: int = WIDE_BYTES_MAX,
) -> tuple[list[Dim], int]:
    """The same copy with as few axes and as wide elements as it can have; arguments as in `plan`.

    Returns the axes, from the destination's slowest to its fastest, and the bytes of an element.
    """
    dims = [
        Dim(size, one * item_bytes, other * item_bytes)
        for size, one, other in zip(shape, to, source, strict=True)
        if size > 1
    ]
    return _widened(_merged(dims), item_bytes, alignment_bytes, wide_bytes_max)


class _Scratch(threading.local):
    """A buffer of each thread's own."""

    def __init__(self) -> None:
        self.buffer: Bytes = np.empty(SCRATCH_BYTES, np.uint8)


_scratch = _Scratch()


class End(NamedTuple):
    """Where one end of a copy stands.

    Attributes:
        memory: the buffer.
        offset: of the first element, in bytes.
        step: bytes from one repetition of the whole copy to the next one's place.
    """

    memory: Bytes
    offset: int
    step: int = 0


def carry_out(plan: Plan, to: End, source: End, pairs: Sequence[tuple[int, int]] = ((0, 0),)) -> None:
    """Copy, once for each pair of repetitions (of the destination, of the source)."""
    to_count, source_count = (max(pair[end] for pair in pairs) + 1 for end in (0, 1))
    steps = tuple(product(*(range(dim.size) for dim in plan.repeats)))
    if not plan.filling:
        for move in plan.moves:
            there, here = _to(plan, move, to, to_count), _source(plan, move, source, source_count)
            for to_index, source_index in pairs:
                for step in steps:
                    np.copyto(_at(there, to_index, step), _at(here, source_index, step))
        return
    fills = [
        (_view_of(move.kind, move.to, move.to_offset), _source(plan, move, source, source_count))
        for move in plan.filling
    ]
    joins = [
        (
            _view_of(move.kind, move.to, move.to_offset),
            _view_of(move.source_kind or move.kind, move.source, move.source_offset),
        )
        for move in plan.joining
    ]
    moves = [
        (_to(plan, move, to, to_count), _view_of(move.kind, move.source, move.source_offset))
        for move in plan.moves
    ]
    for to_index, source_index in pairs:
        for step in steps:
            for filled, here in fills:
                np.copyto(filled, _at(here, source_index, step))
            for joined, parts in joins:
                np.copyto(joined, parts)
            for there, taken in moves:
                np.copyto(_at(there, to_index, step), taken)


def _at(array: NDArray[Any], index: int, step: tuple[int, ...]) -> NDArray[Any]:
    place: tuple[Any, ...] = (index, *step, ...)
    found: NDArray[Any] = array[place]
    return found


def _view_of(kind: type[np.generic], view: _View, offset: int) -> NDArray[Any]:
    """A view of this thread's buffer."""
    return np.ndarray(view.shape, kind, _scratch.buffer, offset, view.strides)


def _to(plan: Plan, move: _Move, end: End, count: int) -> NDArray[Any]:
    """The destination of a move, with the pairs' and the plan's repetitions as axes before its own."""
    shape = (count, *(dim.size for dim in plan.repeats), *move.to.shape)
    strides = (end.step, *(dim.to for dim in plan.repeats), *move.to.strides)
    return np.ndarray(shape, move.kind, end.memory, end.offset + move.to_offset, strides)


def _source(plan: Plan, move: _Move, end: End, count: int) -> NDArray[Any]:
    """The same for its source."""
    shape = (count, *(dim.size for dim in plan.repeats), *move.source.shape)
    strides = (end.step, *(dim.source for dim in plan.repeats), *move.source.strides)
    return np.ndarray(shape, move.kind, end.memory, end.offset + move.source_offset, strides)


def _merged(dims: list[Dim]) -> list[Dim]:
    """Axes from the destination's slowest to its fastest; neighbours that are one run are joined."""
    merged: list[Dim] = []
    for dim in sorted(dims, key=lambda dim: (-dim.to, -dim.source)):
        last = merged[-1] if merged else None
        if last and last.to == dim.to * dim.size and last.source == dim.source * dim.size:
            merged[-1] = Dim(last.size * dim.size, dim.to, dim.source)
        else:
            merged.append(dim)
    return merged


def _widened(
    dims: list[Dim], item_bytes: int, alignment_bytes: int, wide_bytes_max: int
) -> tuple[list[Dim], int]:
    """Join elements that stand side by side at both ends into wider ones."""
    runs = [dim for dim in dims if dim.to == item_bytes and dim.source == item_bytes]
    if not runs:
        return dims, item_bytes
    run = runs[0]
    others = [dim for dim in dims if dim is not run]
    lengths = [run.size * item_bytes, alignment_bytes, *(stride for dim in others for stride in dim[1:])]
    wide = wide_bytes_max
    while any(length % wide for length in lengths):
        wide //= 2
    count = run.size * item_bytes // wide
    return ([*others, Dim(count, wide, wide)] if count > 1 else others), wide


def _fastest(dims: list[Dim], end: int) -> Dim:
    """The axis with the smallest stride at one end (1: destination, 2: source)."""
    return min(dims, key=lambda dim: dim[end])


def _is_near(dims: list[Dim], fast_to: Dim, fast_source: Dim) -> bool:
    """Whether a plain copy, which runs in the destination's order, finds in the cache what it reads again."""
    inner = dims[dims.index(fast_source) + 1 :]
    if fast_to.size <= SHORT_AXIS:
        inner = dims  # One copy for each of its indices: all is read, or written, as many times.
    elif fast_to.source >= FAR_STRIDE_BYTES:
        return False
    reach = min(LINE_BYTES, *(dim.source for dim in inner), LINE_BYTES)
    return prod(dim.size for dim in inner) * reach <= NEAR_BYTES


def _moves(dims: list[Dim], source: list[int], item_bytes: int) -> tuple[_Move, ...]:
    """Copies from views with these source strides; more than one where the innermost loop would be short."""
    kind = _TYPES[item_bytes]
    axes = sorted(zip(dims, source, strict=True), key=lambda axis: -axis[0].to)
    last, last_source = axes[-1] if axes else (Dim(1, item_bytes, item_bytes), item_bytes)
    is_split = (
        len(axes) > 1
        and last.size <= SHORT_AXIS
        and last_source != item_bytes
        and axes[-2][0].size > last.size
    )
    kept = axes[:-1] if is_split else axes
    shape = tuple(dim.size for dim, _ in kept)
    there = _View(shape, tuple(dim.to for dim, _ in kept))
    here = _View(shape, tuple(stride for _, stride in kept))
    count = last.size if is_split else 1
    return tuple(_Move(kind, there, index * last.to, here, index * last_source) for index in range(count))


def _is_paired(dims: list[Dim], fast_to: Dim, item_bytes: int) -> bool:
    """Whether two elements that stand side by side in the destination are far apart in the source."""
    is_pair = fast_to.to == item_bytes and fast_to.size == 2 and item_bytes < WORD_BYTES
    wide = 2 * item_bytes
    return is_pair and all(dim.to % wide == 0 for dim in dims if dim is not fast_to)


def _paired_in_buffer(dims: list[Dim], item_bytes: int) -> Plan:
    """Bring rows of the source into the cache, join two of them to one of wider elements, move those.

    Widening works on vectors, while a copy to every other element works on one at a time.
    """
    fast_to, fast_source = _fastest(dims, 1), _fastest(dims, 2)
    chain = _chain(dims, fast_source, fast_to, 2)
    others = [dim for dim in dims if dim not in chain and dim is not fast_to]
    others.sort(key=lambda dim: -max(dim.to, dim.source))
    repeated, inner = _bounded([*others, *chain], SCRATCH_BYTES // 2 // item_bytes // 2)
    wide, half = 2 * item_bytes, SCRATCH_BYTES // 2
    count = prod(dim.size for dim in inner)
    rows = [fast_to, *inner]
    into = [
        Dim(dim.size, stride, dim.source)
        for dim, stride in zip(rows, _dense_strides(rows, item_bytes), strict=True)
    ]
    flat, every_other = _View((count,), (item_bytes,)), _View((count,), (wide,))
    narrow = _TYPES[item_bytes]
    second = _Move(narrow, every_other, half + item_bytes, flat, count * item_bytes)
    if sys.byteorder == "little":
        first = _Move(_TYPES[wide], every_other, half, flat, 0, narrow)
    else:
        first = _Move(narrow, every_other, half, flat, 0)
    moves = _moves(inner, _dense_strides(inner, wide), wide)
    return Plan(
        tuple(repeated),
        _moves(into, [dim.source for dim in rows], item_bytes),
        (first, second),
        tuple(move._replace(source_offset=move.source_offset + half) for move in moves),
    )


def _swapped_in_buffer(dims: list[Dim], item_bytes: int) -> Plan:
    """A copy whose two ends run along different axes.

    numpy goes through memory in the destination's order, so a plain copy would touch a new line of the source
    for each element, and all of them again for the next. The buffer is in an order in which both the way in
    and the way out use whole lines: the outer axes first, then the two that are swapped.
    """
    fast_to, fast_source = _fastest(dims, 1), _fastest(dims, 2)
    # The end that is farther apart along the other's fast axis is read or written in rows.
    if fast_to.source > fast_source.to:
        pair = [fast_to, *_chain(dims, fast_source, fast_to, 2)]
    else:
        pair = [fast_source, *_chain(dims, fast_to, fast_source, 1)]
    others = [dim for dim in dims if dim not in pair]
    others.sort(key=lambda dim: -max(dim.to, dim.source))
    repeated, inner = _bounded([*others, *pair], SCRATCH_BYTES // item_bytes)
    strides = _dense_strides(inner, item_bytes)
    into = [Dim(dim.size, stride, dim.source) for dim, stride in zip(inner, strides, strict=True)]
    filling = _moves(into, [dim.source for dim in inner], item_bytes)
    return Plan(tuple(repeated), filling, (), _moves(inner, strides, item_bytes))


def _dense_strides(dims: list[Dim], item_bytes: int) -> list[int]:
    strides: list[int] = []
    step = item_bytes
    for dim in reversed(dims):
        strides.insert(0, step)
        step *= dim.size
    return strides


def _chain(dims: list[Dim], fast: Dim, swapped: Dim, end: int) -> list[Dim]:
    """The axes that are one run with `fast` at one end, the slowest first."""
    chain = [fast]
    for dim in sorted(dims, key=lambda dim: dim[end]):
        if dim[end] == chain[0][end] * chain[0].size and dim is not swapped:
            chain.insert(0, dim)
    return chain


def _bounded(dims: list[Dim], elements_max: int) -> tuple[list[Dim], list[Dim]]:
    """Split off the first axes, or parts of them, until what is left fits the buffer."""
    repeated: list[Dim] = []
    count = prod(dim.size for dim in dims)
    for index, dim in enumerate(dims):
        if count <= elements_max:
            return repeated, dims[index:]
        count //= dim.size
        parts = (part for part in range(1, dim.size + 1) if dim.size % part == 0)
        kept = max((part for part in parts if part * count <= elements_max), default=1)
        repeated.append(Dim(dim.size // kept, dim.to * kept, dim.source * kept))
        if kept > 1:
            return repeated, [Dim(kept, dim.to, dim.source), *dims[index + 1 :]]
    return repeated, []
