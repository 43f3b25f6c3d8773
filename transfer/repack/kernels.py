"""Gather and scatter between blocks and dense arrays: in torch on any device, in numpy in host memory."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from math import gcd
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from transfer.repack import strided
from transfer.repack.moves import Copy
from transfer.repack.torch_memory import INTEGERS, Cut, GroupFlats, Layers

_ALIGNMENT_BYTES = 16
_INDEXES_MAX = 16
_WIDE_TYPES = frozenset({"cpu", "cuda"})
"""Devices whose torch copies and indexes elements of 16 bytes."""


class Kernels(Protocol):
    """Moves layers of a group between its blocks and a flat dense tensor of the same elements."""

    def gather(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None: ...

    def scatter(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None: ...

    def zero(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy]) -> None:
        """Write zeros where the copies point to in the blocks."""


class HostKernels:
    """For tensors and staging in host memory: one thread, through the caches (see `strided`)."""

    def gather(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None:
        self._move(group, layers, copies, dense, is_gather=True)

    def scatter(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None:
        self._move(group, layers, copies, dense, is_gather=False)

    def zero(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy]) -> None:
        for copy in copies:
            for cut in group.cuts(copy.tensor, layers.first, layers.count):
                for block in copy.blocks or (0,):
                    shape, strides = _layered(cut, copy.shape, copy.memory_strides)
                    offset = cut.offset + copy.memory_offset + block * copy.block_stride
                    torch.as_strided(
                        cut.stack.flat, shape, strides, cut.stack.flat.storage_offset() + offset
                    ).zero_()

    @staticmethod
    def _move(
        group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any, *, is_gather: bool
    ) -> None:
        item = dense.element_size()
        there: NDArray[np.uint8] = dense.numpy().view(np.uint8)
        for copy in copies:
            for cut in group.cuts(copy.tensor, layers.first, layers.count):
                memory = cut.stack.host
                assert memory is not None, "host kernels are chosen for host memory only"
                shape, inner = _layered(cut, copy.shape, copy.memory_strides)
                outer = (layers.stride, *copy.dense_strides)
                base = (cut.offset + copy.memory_offset) * item
                dense_base = (cut.behind * layers.stride + copy.dense_offset) * item
                steps = (copy.block_stride * item, copy.row_stride * item)
                alignment = _alignment(memory, base, there, dense_base, *steps)
                ends = (outer, inner) if is_gather else (inner, outer)
                plan = strided.plan(shape, *ends, item, alignment)
                place, at_dense = (
                    strided.End(memory, base, steps[0]),
                    strided.End(there, dense_base, steps[1]),
                )
                blocks, rows = copy.blocks or (0,), copy.rows or (0,)
                if is_gather:
                    strided.carry_out(plan, at_dense, place, list(zip(rows, blocks, strict=True)))
                else:
                    strided.carry_out(plan, place, at_dense, list(zip(blocks, rows, strict=True)))


class _Indexes(threading.local):
    """Tables of block ids on a device, of each thread's own, as each works on a stream of its own."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[tuple[int, ...], Any], Any] = OrderedDict()

    def of(self, members: tuple[int, ...], device: Any) -> Any:
        key = (members, device)
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = torch.tensor(members, dtype=torch.int64).to(device)
            if len(self._kept) > _INDEXES_MAX:
                self._kept.popitem(last=False)
        return self._kept[key]

    def of_rows(self, rows: tuple[int, ...], device: Any) -> Any:
        """None where all rows are used, in order."""
        return None if rows == tuple(range(len(rows))) else self.of(rows, device)


class TorchKernels:
    """For any device: strided copies, and one indexed copy where many short runs of blocks are moved."""

    def __init__(self) -> None:
        self._indexes = _Indexes()

    def gather(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None:
        for copy in copies:
            for cut in group.cuts(copy.tensor, layers.first, layers.count):
                memory, there = _views(cut, layers, copy, dense)
                if not copy.blocks:
                    there.copy_(memory, non_blocking=True)
                    continue
                found = memory.index_select(0, self._indexes.of(copy.blocks, memory.device))
                rows = self._indexes.of_rows(copy.rows, dense.device)
                if rows is None:
                    there.copy_(found, non_blocking=True)
                else:
                    there.index_copy_(0, rows, found)

    def scatter(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy], dense: Any) -> None:
        for copy in copies:
            for cut in group.cuts(copy.tensor, layers.first, layers.count):
                memory, there = _views(cut, layers, copy, dense)
                if not copy.blocks:
                    memory.copy_(there, non_blocking=True)
                    continue
                rows = self._indexes.of_rows(copy.rows, dense.device)
                found = there if rows is None else there.index_select(0, rows)
                memory.index_copy_(0, self._indexes.of(copy.blocks, memory.device), found)

    def zero(self, group: GroupFlats, layers: Layers, copies: Sequence[Copy]) -> None:
        for copy in copies:
            for cut in group.cuts(copy.tensor, layers.first, layers.count):
                memory, _ = _views(cut, layers, copy, cut.stack.flat, is_dense_used=False)
                if copy.blocks:
                    memory.index_fill_(0, self._indexes.of(copy.blocks, memory.device), 0)
                else:
                    memory.zero_()


def _layered(
    cut: Cut, shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A view of one layer as one of all layers of a cut."""
    return (cut.count, *shape), (cut.stack.layer_stride, *strides)


def _alignment(one: NDArray[np.uint8], offset: int, other: NDArray[np.uint8], start: int, *steps: int) -> int:
    """The largest power of two, up to _ALIGNMENT_BYTES, that divides every address a copy begins at."""
    return gcd(_ALIGNMENT_BYTES, one.ctypes.data + offset, other.ctypes.data + start, *steps)


def _views(
    cut: Cut, layers: Layers, copy: Copy, dense: Any, *, is_dense_used: bool = True
) -> tuple[Any, Any]:
    """Both ends of a copy as views of equal shape and type, elements as wide as they can be.

    With `copy.blocks` the first axis is the block: of all blocks at one end, of all rows at the other.
    """
    flat = cut.stack.flat
    item = flat.element_size()
    memory_at = cut.offset + copy.memory_offset
    dense_at = cut.behind * layers.stride + copy.dense_offset
    shape, inner = _layered(cut, copy.shape, copy.memory_strides)
    outer = (layers.stride, *copy.dense_strides) if is_dense_used else inner
    dense_at = dense_at if is_dense_used else memory_at
    steps = (copy.block_stride * item, copy.row_stride * item)
    alignment = gcd(
        _ALIGNMENT_BYTES, flat.data_ptr() + memory_at * item, dense.data_ptr() + dense_at * item, *steps
    )
    wide_max = 16 if flat.device.type in _WIDE_TYPES else 8
    # Both ends begin at whole wide elements only if their flat arrays do.
    alignment = gcd(alignment, memory_at * item, dense_at * item, flat.storage_offset() * item)
    alignment = gcd(alignment, dense.storage_offset() * item)
    dims, wide = strided.simplified(
        shape, inner, outer, item, alignment_bytes=alignment, wide_bytes_max=wide_max
    )
    sizes = tuple(dim.size for dim in dims)
    ends = []
    for tensor, start, strides, step, members in (
        (flat, memory_at, [dim.to for dim in dims], steps[0], copy.blocks),
        (dense, dense_at, [dim.source for dim in dims], steps[1], copy.rows),
    ):
        whole = tensor[: tensor.numel() * item // wide * wide // item].view(INTEGERS[wide])
        view_shape, view_strides = sizes, tuple(stride // wide for stride in strides)
        if members:
            view_shape = (max(members) + 1, *view_shape)
            view_strides = (step // wide, *view_strides)
        offset = whole.storage_offset() + start * item // wide
        ends.append(torch.as_strided(whole, view_shape, view_strides, offset))
    return ends[0], ends[1]
