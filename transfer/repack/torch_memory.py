"""An engine's KV tensors as flat arrays of whole numbers, layers that lie evenly in one allocation joined."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transfer.errors import LayoutError
from transfer.layout import RankLayout
from transfer.repack.arrangement import (
    AnyArrangement,
    Arrangement,
    Axis,
    Digit,
    Piece,
    Side,
    blocks_in,
    check,
    pages,
)
from transfer.repack.tilings import padded

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""The type that elements of so many bytes are moved as; moves keep bits, whatever they mean."""


@dataclass(frozen=True, slots=True)
class TorchGroup:
    """The memory of one KV cache group.

    Attributes:
        arrangement: of a block of one layer.
        layers: for each layer its tensors, one, or two where K and V are apart; of any shape. Positions count
            from a tensor's first element, block b begins `b * block_strides` after it.
    """

    arrangement: AnyArrangement
    layers: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor of consecutive layers that lie at even distances in one allocation.

    Attributes:
        first: the first layer's index in the group.
        count: layers.
        layer_stride: elements from a layer's first element to the next layer's.
        flat: one-dimensional, of INTEGERS, from the first layer's first element to the last one's last.
        host: the same memory as bytes; None on a device.
    """

    first: int
    count: int
    layer_stride: int
    flat: Any
    host: NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class Cut:
    """Layers of a stack, as an offset into it.

    Attributes:
        behind: layers between the first one that was asked for and the first one here.
    """

    stack: Stack
    behind: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers `first .. first + count - 1` of a group, and how far apart they are in the dense array."""

    first: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class GroupFlats:
    """A group as the kernels see it.

    Attributes:
        arrangement: keys and values of a token joined where they are one run.
        tensors: for each tensor of a layer its stacks, in the order of layers.
        block_count: block ids lie below it.
        pieces: a block's page, for pages form; empty where no strides describe it.
        original: the arrangement with keys and values apart.
    """

    arrangement: AnyArrangement
    original: AnyArrangement
    tensors: tuple[tuple[Stack, ...], ...]
    block_count: int
    pieces: tuple[Piece, ...]

    @property
    def device(self) -> Any:
        return self.tensors[0][0].flat.device

    def cuts(self, tensor: int, first: int, count: int) -> Iterator[Cut]:
        """Where layers `first .. first + count - 1` lie."""
        for stack in self.tensors[tensor]:
            low, high = max(first, stack.first), min(first + count, stack.first + stack.count)
            if low < high:
                yield Cut(stack, low - first, (low - stack.first) * stack.layer_stride, high - low)


def flats_of(layout: RankLayout, groups: Sequence[TorchGroup]) -> tuple[GroupFlats, ...]:
    """Flatten what an engine registered.

    Raises:
        LayoutError: if tensors are missing, of a wrong element size or on several devices, if an arrangement
            is of other blocks than the layout says, or if elements of blocks collide.
    """
    if len(groups) != len(layout.groups):
        raise LayoutError("memory", len(groups), f"one entry for each of {len(layout.groups)} groups")
    item_bytes = layout.layout.dtype.item_bytes
    found = []
    for index, (group, shape) in enumerate(zip(groups, layout.groups, strict=True)):
        if len(group.layers) != shape.layer_count:
            raise LayoutError("layers", len(group.layers), f"{shape.layer_count} in group {index}")
        _check_sides(layout, index, group.arrangement)
        found.append(_flats_of_group(group, item_bytes))
    devices = {stack.flat.device for group in found for stacks in group.tensors for stack in stacks}
    if len(devices) > 1:
        raise LayoutError("device", sorted(map(str, devices)), "one device for all tensors of a rank")
    return tuple(found)


def _check_sides(layout: RankLayout, index: int, arrangement: AnyArrangement) -> None:
    shape = layout.groups[index]
    dims = [shape.key_dim] if shape.is_mla else [shape.key_dim, shape.value_dim]
    given = [side.dim for side in arrangement.sides]
    if given != dims:
        raise LayoutError("sides", given, f"heads of {dims} elements in group {index}")
    due = (layout.layout.block_tokens, layout.heads(index).count)
    for side in arrangement.sides:
        block = (side.length(Axis.TOKEN), side.length(Axis.HEAD))
        if block != due:
            raise LayoutError("arrangement", block, f"{due}, tokens of a block and heads of the rank")
        room = padded(side.dim, layout.layout)
        if isinstance(side, Side) and side.length(Axis.ELEMENT) != room:
            raise LayoutError("arrangement", side.length(Axis.ELEMENT), f"{room}, a padded head")


def _flats_of_group(group: TorchGroup, item_bytes: int) -> GroupFlats:
    arrangement = group.arrangement
    tensor_count = len(arrangement.block_strides)
    for tensors in group.layers:
        if len(tensors) != tensor_count:
            raise LayoutError("tensors", len(tensors), f"{tensor_count} for each layer")
        for tensor in tensors:
            if tensor.element_size() != item_bytes:
                raise LayoutError("dtype", str(tensor.dtype), f"elements of {item_bytes} bytes")
    stacks = []
    counts: list[int] = []
    for place in range(tensor_count):
        column = [tensors[place] for tensors in group.layers]
        stacks.append(tuple(_stacks(column, item_bytes)))
        if any(side.tensor == place for side in arrangement.sides):
            counts.extend(blocks_in(arrangement, place, _extent(tensor)) for tensor in column)
    check(arrangement, min(counts))
    pieces = pages(arrangement) if isinstance(arrangement, Arrangement) else ()
    return GroupFlats(joined(arrangement), arrangement, tuple(stacks), min(counts), pieces)


def _extent(tensor: Any) -> int:
    """Elements from a tensor's first to behind its last, whatever lies between."""
    if tensor.numel() == 0:
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((int(size) - 1) * int(stride) for size, stride in pairs)


def _stacks(tensors: Sequence[Any], item_bytes: int) -> Iterator[Stack]:
    """Join layers as far as one stride leads from each to the next."""
    first = 0
    while first < len(tensors):
        count, distance = 1, 0
        while first + count < len(tensors):
            step = _distance(tensors[first + count - 1], tensors[first + count])
            if step <= 0 or step % item_bytes or (distance and step != distance):
                break
            count, distance = count + 1, step
        yield _stack(tensors[first : first + count], first, distance // item_bytes)
        first += count


def _distance(one: Any, other: Any) -> int:
    """Bytes from one tensor's first element to the other's; 0 if no such number can be used."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return 0
    return int(other.data_ptr()) - int(one.data_ptr())


def _stack(tensors: Sequence[Any], first: int, layer_stride: int) -> Stack:
    extent = max(index * layer_stride + _extent(tensor) for index, tensor in enumerate(tensors))
    start = tensors[0].detach()
    flat = start.view(INTEGERS[start.element_size()]).as_strided((extent,), (1,))
    host = flat.numpy().view(np.uint8) if flat.device.type == "cpu" else None
    return Stack(first, len(tensors), layer_stride, flat, host)


def joined(arrangement: AnyArrangement) -> AnyArrangement:
    """Make one side of a key and a value that stand side by side for every token, as they do when packed."""
    if not isinstance(arrangement, Arrangement) or len(arrangement.sides) != 2:
        return arrangement
    key, value = arrangement.sides
    element = key.digits[-1]
    follows = (
        key.tensor == value.tensor
        and value.offset == key.offset + key.dim
        and element == Digit(Axis.ELEMENT, key.dim, 1)
        and value.digits[-1].size == value.dim
        and value.digits[-1].stride == 1
        and key.digits[:-1] == value.digits[:-1]
        and all(digit.axis is not Axis.ELEMENT for digit in key.digits[:-1])
    )
    if not follows:
        return arrangement
    dim = key.dim + value.dim
    digits = (*key.digits[:-1], Digit(Axis.ELEMENT, dim, 1))
    return Arrangement((Side(key.tensor, key.offset, digits, dim),), arrangement.block_strides)
