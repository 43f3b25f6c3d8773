"""Where each element of a block stands, as digits with strides: one description for every known page.

Plain pages, transposed keys, vector tiles and matrix-unit tiles are all the same thing: the indices of token,
head and element, cut into digits, each with its own stride. So one strided copy packs or unpacks any of them.
Only a page that no such cut describes needs a table of positions (`Learned`).
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise, product
from typing import NamedTuple

from transfer.errors import LayoutError


class Axis(StrEnum):
    """What an index counts."""

    TOKEN = "token"  # noqa: S105  # no password, a word of prompts
    HEAD = "head"
    ELEMENT = "element"


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of an index; the sizes of an axis's digits multiply to its length.

    Attributes:
        stride: in elements.
    """

    axis: Axis
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Side:
    """The keys (or values, or latents) of one block of one layer.

    Attributes:
        tensor: 0, or 1 for the values of a `separate` split.
        offset: of the first element, from the block's start, in elements.
        digits: of each axis, the most significant digit first; every axis has at least one digit.
        dim: elements of a head that count; the element digits may multiply to more (padding).
    """

    tensor: int
    offset: int
    digits: tuple[Digit, ...]
    dim: int

    def length(self, axis: Axis) -> int:
        """Length of an axis, padding included."""
        length = 1
        for digit in self.digits_of(axis):
            length *= digit.size
        return length

    def digits_of(self, axis: Axis) -> tuple[Digit, ...]:
        return tuple(digit for digit in self.digits if digit.axis is axis)

    def positions(self) -> list[int]:
        """Elements from the block's start of each [token][head][element], padding included."""
        found = [self.offset]
        for axis in Axis:
            for digit in self.digits_of(axis):
                steps = [index * digit.stride for index in range(digit.size)]
                found = [base + step for base in found for step in steps]
        return found


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One block of one layer.

    Attributes:
        sides: key and value, or one latent.
        block_strides: for each tensor, elements from one block's start to the next one's.
    """

    sides: tuple[Side, ...]
    block_strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LearnedSide:
    """The keys (or values, or latents) of one block of one layer, as a table.

    Attributes:
        tensor: as in `Side`.
        tokens: tokens of a block.
        heads: heads of the rank.
        dim: elements of a head; a table leaves padding out.
        table: [token][head][element] as 64-bit integers in the machine's order: elements from the block's
            start. `np.frombuffer(table, np.int64).reshape(tokens, heads, dim)` reads it.
    """

    tensor: int
    tokens: int
    heads: int
    dim: int
    table: bytes

    def length(self, axis: Axis) -> int:
        return {Axis.TOKEN: self.tokens, Axis.HEAD: self.heads, Axis.ELEMENT: self.dim}[axis]

    def positions(self) -> list[int]:
        return array("q", self.table).tolist()


@dataclass(frozen=True, slots=True)
class Learned:
    """One block of one layer whose positions follow no strides; attributes as in `Arrangement`."""

    sides: tuple[LearnedSide, ...]
    block_strides: tuple[int, ...]


AnyArrangement = Arrangement | Learned


def last_position(arrangement: AnyArrangement, tensor: int) -> int:
    """The highest position of a block in a tensor: what a block's id must leave room for."""
    highest = 0
    for side in arrangement.sides:
        if side.tensor != tensor:
            continue
        if isinstance(side, Side):
            reach = side.offset + sum((digit.size - 1) * digit.stride for digit in side.digits)
        else:
            reach = max(side.positions())
        highest = max(highest, reach)
    return highest


def blocks_in(arrangement: AnyArrangement, tensor: int, element_count: int) -> int:
    """How many blocks lie wholly inside a flat tensor of that many elements."""
    room = element_count - 1 - last_position(arrangement, tensor)
    return max(0, room // arrangement.block_strides[tensor] + 1)


def check(arrangement: AnyArrangement, block_count: int) -> None:
    """Make sure that no element of any of the blocks stands where another one does.

    Raises:
        LayoutError: if two elements share a position, or one lies before its block.
    """
    for tensor, stride in enumerate(arrangement.block_strides):
        if stride < 1:
            raise LayoutError("block_strides", stride, "a positive whole number")
        positions: list[int] = []
        for side in arrangement.sides:
            if side.tensor == tensor:
                positions.extend(side.positions())
        if positions and min(positions) < 0:
            raise LayoutError("position", min(positions), "no element before its block")
        # Elements of two blocks can only meet if their positions differ by a multiple of the block stride.
        positions.sort(key=lambda position: (position % stride, position))
        for one, other in pairwise(positions):
            if one % stride == other % stride and other - one < block_count * stride:
                raise LayoutError("arrangement", (one, other), "a bijection: these two elements collide")


@dataclass(frozen=True, slots=True)
class Span:
    """Indices `first .. first + count - 1` of an axis."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of tokens, heads and elements that one strided copy moves.

    Attributes:
        tokens: counted from the start of the run of blocks.
        heads: of the rank.
        elements: of the head.
        offset: of the first element, from the start of the run's first block, in elements.
        sizes: of the copied digits, per axis (tokens, heads, elements), the most significant first.
        strides: in the engine's memory, aligned with `sizes`, in elements.
    """

    tokens: Span
    heads: Span
    elements: Span
    offset: int
    sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """All sizes in a row: shape of the strided views of both sides."""
        return tuple(size for sizes in self.sizes for size in sizes)

    @property
    def memory_strides(self) -> tuple[int, ...]:
        """Strides in elements of the view of the engine's memory."""
        return tuple(stride for strides in self.strides for stride in strides)

    def dense_strides(self, token: int, head: int, element: int) -> tuple[int, ...]:
        """Strides of a view of the same shape over an array whose axes have these three strides."""
        found: list[int] = []
        for sizes, stride in zip(self.sizes, (token, head, element), strict=True):
            each = stride
            tail: list[int] = []
            for size in reversed(sizes):
                tail.append(each)
                each *= size
            found.extend(reversed(tail))
        return tuple(found)


class _Box(NamedTuple):
    span: Span
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def _boxes(digits: Sequence[Digit], first: int, count: int) -> Iterable[_Box]:
    """Cut a range of an axis into pieces in which all digits but the first move through their whole range."""
    if count <= 0:
        return
    head, rest = digits[0], digits[1:]
    lower = 1
    for digit in rest:
        lower *= digit.size
    low, end = first // lower, first + count
    if first % lower or count < lower:
        # Up to the next step of the leading digit, or to the end if that comes first.
        part = min(count, lower - first % lower)
        for box in _boxes(rest, first % lower, part):
            span = Span(low * lower + box.span.first, box.span.count)
            yield _Box(span, low * head.stride + box.offset, box.sizes, box.strides)
        yield from _boxes(digits, first + part, count - part)
        return
    whole = end // lower - low
    sizes = (whole, *(digit.size for digit in rest))
    yield _Box(
        Span(first, whole * lower),
        low * head.stride,
        sizes,
        (head.stride, *(digit.stride for digit in rest)),
    )
    yield from _boxes(digits, first + whole * lower, count - whole * lower)


def patches(
    side: Side, run: Digit, tokens: Span, heads: Span, elements: Span | None = None
) -> tuple[Patch, ...]:
    """Cut tokens of a run of blocks into as few strided copies as there can be.

    Args:
        run: `Digit(Axis.TOKEN, blocks of the run, elements from one block's start to the next one's)`.
        tokens: from the first block's first token; may start and end inside a block.
        heads: of the rank's heads.
        elements: None for the `dim` ones that count; `padding_of(side)` for the others.
    """
    elements = Span(0, side.dim) if elements is None else elements
    axes = (
        _boxes((run, *side.digits_of(Axis.TOKEN)), tokens.first, tokens.count),
        _boxes(side.digits_of(Axis.HEAD), heads.first, heads.count),
        _boxes(side.digits_of(Axis.ELEMENT), elements.first, elements.count),
    )
    return tuple(
        Patch(
            tokens=boxes[0].span,
            heads=boxes[1].span,
            elements=boxes[2].span,
            offset=side.offset + sum(box.offset for box in boxes),
            sizes=tuple(box.sizes for box in boxes),
            strides=tuple(box.strides for box in boxes),
        )
        for boxes in product(*axes)
    )


def padding_of(side: Side) -> Span:
    """The elements of a head that hold zeros; unpacking writes them for each token that it writes."""
    return Span(side.dim, side.length(Axis.ELEMENT) - side.dim)


@dataclass(frozen=True, slots=True)
class Piece:
    """A strided part of one block's page, in the order of memory.

    Attributes:
        tensor: as in `Side`.
        offset: of the first element, from the block's start.
        sizes: the slowest first.
        strides: in elements, falling; the last is 1 for every page of known engines.
    """

    tensor: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def element_count(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count


_Dims = list[tuple[int, int]]  # (stride, size), the largest stride first


def _merged(dims: Iterable[tuple[int, int]]) -> _Dims:
    """Join neighbouring dimensions that are one run."""
    merged: _Dims = []
    for stride, size in sorted((dim for dim in dims if dim[1] > 1), reverse=True):
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return merged


def pages(arrangement: Arrangement) -> tuple[Piece, ...]:
    """A block's page as strided pieces: the bytes of `pages` form, key before value where they do not mix.

    A page that lies in one run of memory is one piece of one dimension. The order of elements depends only on
    the physical order of the axes, not on how many blocks or layers the engine allocated.
    """
    found: list[tuple[int, int, _Dims]] = []
    for side in arrangement.sides:
        dims = _merged((digit.stride, digit.size) for digit in side.digits)
        if not dims or dims[-1][0] != 1:
            dims.append((1, 1))
        if found and found[-1][0] == side.tensor:
            tensor, offset, before = found[-1]
            run = before[-1][1]
            if before[:-1] == dims[:-1] and offset + run == side.offset:
                found[-1] = (tensor, offset, _merged([*before[:-1], (1, run + dims[-1][1])]))
                continue
        found.append((side.tensor, side.offset, dims))
    return tuple(
        Piece(tensor, offset, tuple(size for _, size in dims), tuple(stride for stride, _ in dims))
        for tensor, offset, dims in found
    )
