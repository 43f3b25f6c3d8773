"""Packing and unpacking with numpy: what every other repacker must agree with, to the bit.

Tokens of a sliding-window group whose blocks are gone are packed as zeros and left out in unpacking. A group
without a window must have a block for each token: anything else would be silently wrong and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.canonical import Form, page_bytes
from transfer.digest import part_digest
from transfer.errors import LayoutError
from transfer.layout import RankLayout
from transfer.repack.arrangement import AnyArrangement, Axis, Learned, Side, Span, blocks_in, check
from transfer.repack.jobs import (
    MISSING,
    Job,
    Run,
    check_place,
    is_wholly,
    pack_job,
    scales_of,
    split,
    unpack_job,
)
from transfer.repack.moves import Dense
from transfer.repack.numbers import Bits, bits_type, convert
from transfer.repack.numpy_moves import Flat, Moves, PageMoves, TableMoves, moves_of
from transfer.repack.tables import travelling
from transfer.repack.tilings import padded
from transfer.session.vocabulary import Slot, Tables, Unpack


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """Where an engine keeps one KV cache group.

    Attributes:
        layers: for each layer its tensors (two where keys and values are separate), each a flat, contiguous
            array of elements of the layout's size that starts where block 0 of the layer does.
        arrangement: of a block, the same in each layer.
    """

    layers: tuple[tuple[Flat, ...], ...]
    arrangement: AnyArrangement


class NumpyRepacker:
    """A `repack.base.Repacker` for memory that numpy reaches.

    Args:
        staging: flat uint8 array, the rank's whole staging buffer.

    Raises:
        LayoutError: if memory and layout do not agree, or elements of blocks collide.
    """

    def __init__(self, layout: RankLayout, memory: Sequence[GroupMemory], staging: NDArray[np.uint8]) -> None:
        if len(memory) != len(layout.groups):
            raise LayoutError("memory", len(memory), f"{len(layout.groups)} groups, as in the layout")
        self._layout = layout
        self._staging = staging
        self._groups = tuple(_Group(layout, index, group) for index, group in enumerate(memory))

    @property
    def layout(self) -> RankLayout:
        return self._layout

    def pack(self, slots: Sequence[Slot], tables: Tables) -> tuple[bytes, ...]:
        """See `Repacker.pack`."""
        jobs = [self._checked(slot, tables) for slot in slots]
        digests = []
        for slot, job in zip(slots, jobs, strict=True):
            part = self._staging[slot.offset : slot.offset + slot.length_bytes]
            group = self._groups[job.group]
            if job.form is Form.PAGES:
                group.pack_pages(job, part.view(group.bits))
            else:
                group.pack_tokens(job, part.view(group.bits))
            digests.append(part_digest(part.data))
        return tuple(digests)

    def unpack(self, order: Unpack) -> bool:
        """See `Repacker.unpack`."""
        group = self._group(order.shape.group)
        job = unpack_job(self._layout, order, group.block_count)
        check_place("landing", order.landing, order.length_bytes, len(self._staging))
        part = self._staging[order.landing : order.landing + order.length_bytes]
        if part_digest(part.data) != order.digest:
            return False
        if job.form is Form.PAGES:
            group.unpack_pages(job, part.view(group.bits))
        else:
            group.unpack_tokens(job, part.view(bits_type(order.source.layout.dtype)), order.source)
        return True

    def _checked(self, slot: Slot, tables: Tables) -> Job:
        job = pack_job(self._layout, slot, tables, self._group(slot.shape.group).block_count)
        check_place("offset", slot.offset, slot.length_bytes, len(self._staging))
        return job

    def _group(self, index: int) -> "_Group":
        if not 0 <= index < len(self._groups):
            raise LayoutError("group", index, f"a group in 0..{len(self._groups) - 1}")
        return self._groups[index]


class _Group:
    """One group's blocks: parts in, parts out; orders are checked already."""

    def __init__(self, layout: RankLayout, index: int, memory: GroupMemory) -> None:
        self._layout = layout
        self._index = index
        self._shape = layout.groups[index]
        self._arrangement = memory.arrangement
        self.bits = bits_type(layout.layout.dtype)
        self._layers = tuple(
            tuple(_as_bits(tensor, self.bits) for tensor in tensors) for tensors in memory.layers
        )
        self._check_memory()
        arrangement = memory.arrangement
        self.block_count = min(
            blocks_in(arrangement, place, len(tensor))
            for tensors in self._layers
            for place, tensor in enumerate(tensors)
        )
        check(arrangement, self.block_count)
        page = page_bytes(self._shape, layout.layout, layout.heads(index).count)
        self._page_elements = page // self.bits.itemsize
        self._pages = PageMoves(arrangement)

    def _check_memory(self) -> None:
        shape, arrangement, layout = self._shape, self._arrangement, self._layout
        if len(self._layers) != shape.layer_count:
            raise LayoutError("layers", len(self._layers), f"{shape.layer_count} layers")
        tensor_count = len(arrangement.block_strides)
        if any(len(tensors) != tensor_count for tensors in self._layers):
            raise LayoutError(
                "layers", [len(tensors) for tensors in self._layers], f"{tensor_count} tensors each"
            )
        dims = [shape.key_dim] if shape.is_mla else [shape.key_dim, shape.value_dim]
        if [side.dim for side in arrangement.sides] != dims:
            raise LayoutError("sides", [side.dim for side in arrangement.sides], f"heads of {dims} elements")
        due = (layout.layout.block_tokens, layout.heads(self._index).count)
        for side in arrangement.sides:
            given = (side.length(Axis.TOKEN), side.length(Axis.HEAD))
            if given != due:
                raise LayoutError("arrangement", given, f"{due}, tokens of a block and heads of the rank")
            room = padded(side.dim, layout.layout)
            if side.length(Axis.ELEMENT) != room and isinstance(side, Side):
                raise LayoutError("arrangement", side.length(Axis.ELEMENT), f"{room}, a padded head")

    # Tokens form.

    def pack_tokens(self, job: Job, part: Flat) -> None:
        rows = self._shape.row_elements
        dense = part.reshape(self._shape.layer_count, job.tokens.count, job.heads.count, rows)
        for run in job.runs:
            if run.block == MISSING:
                first = run.tokens.first - job.tokens.first
                dense[:, first : first + run.tokens.count] = 0
        moves = self._moves(job, Dense(0, job.heads.count * rows, rows))
        for layer, tensors in enumerate(self._layers):
            moves.load(tensors, dense[layer].reshape(-1))

    def unpack_tokens(self, job: Job, part: Flat, source: RankLayout) -> None:
        rows, held = self._shape.row_elements, job.part.heads.count
        landed = part.reshape(self._shape.layer_count, job.part.tokens.count, held, rows)
        first = job.tokens.first - job.part.tokens.first
        start = (first * held + job.part_heads.first) * rows
        as_is = self._moves(job, Dense(start, held * rows, rows))
        changed = self._moves(job, Dense(0, job.heads.count * rows, rows))
        tokens = slice(first, first + job.tokens.count)
        heads = slice(job.part_heads.first, job.part_heads.first + job.part_heads.count)
        for layer, tensors in enumerate(self._layers):
            if self._is_same(source, layer):
                as_is.store(tensors, landed[layer].reshape(-1))
            else:
                made = self._converted(landed[layer, tokens, heads], source, layer)
                changed.store(tensors, made.reshape(-1))

    def _moves(self, job: Job, dense: Dense) -> Moves:
        return moves_of(self._arrangement, job.runs, job.tokens, job.heads, dense)

    def _is_same(self, source: RankLayout, layer: int) -> bool:
        theirs, ours = scales_of(source, self._index)[layer], scales_of(self._layout, self._index)[layer]
        return source.layout.dtype is self._layout.layout.dtype and theirs == ours

    def _converted(self, landed: Flat, source: RankLayout, layer: int) -> Bits:
        """Some tokens and heads of one layer in this rank's dtype and scales, dense."""
        theirs, ours = scales_of(source, self._index)[layer], scales_of(self._layout, self._index)[layer]
        types = source.layout.dtype, self._layout.layout.dtype
        key = self._shape.key_dim
        made = np.empty(landed.shape, self.bits)
        made[..., :key] = convert(np.ascontiguousarray(landed[..., :key]), *types, theirs.key, ours.key)
        if self._shape.value_dim:
            values = np.ascontiguousarray(landed[..., key:])
            made[..., key:] = convert(values, *types, theirs.value, ours.value)
        return made

    # Pages form.

    def pack_pages(self, job: Job, part: Flat) -> None:
        pages = self._paged(job, part)
        for run, first in self._page_runs(job):
            for layer, tensors in enumerate(self._layers):
                target = pages[layer, first : first + run.block_count]
                if run.block == MISSING:
                    target[:] = 0
                else:
                    self._pages.load(tensors, run.block, target)

    def unpack_pages(self, job: Job, part: Flat) -> None:
        pages = self._paged(job, part)
        block_tokens = self._layout.layout.block_tokens
        for run, first in self._page_runs(job):
            if run.block == MISSING:
                continue
            is_whole = is_wholly(run, block_tokens)
            for layer, tensors in enumerate(self._layers):
                if is_whole:
                    self._pages.store(tensors, run.block, pages[layer, first : first + run.block_count])
                else:
                    self._unpack_some(job.heads, run, first, pages[layer].reshape(-1), tensors)

    def _paged(self, job: Job, part: Flat) -> Flat:
        blocks = -(-job.part.tokens.count // self._layout.layout.block_tokens)
        return part.reshape(self._shape.layer_count, blocks, self._page_elements)

    def _page_runs(self, job: Job) -> list[tuple[Run, int]]:
        """The runs and the first page of each in the part; a block wanted in part is a run of its own."""
        block_tokens = self._layout.layout.block_tokens
        return [
            (run, (run.tokens.first - job.part.tokens.first) // block_tokens)
            for whole in job.runs
            for run in split(whole, block_tokens)
        ]

    def _unpack_some(self, heads: Span, run: Run, page: int, pages: Flat, tensors: Sequence[Flat]) -> None:
        """Only the wanted tokens of a run of pages: others of its blocks may be somebody's already."""
        rows = self._shape.row_elements
        dense = np.empty(run.tokens.count * heads.count * rows, self.bits)
        where = Dense(0, heads.count * rows, rows)
        # Block 0 is a missing one, so the part's pages are counted from 1 on.
        there = Run(run.tokens, page + 1, run.block_count, run.skip)
        reads = TableMoves(self._travelling, [there], run.tokens, heads, where, origin=-self._page_elements)
        reads.load((pages,), dense)
        moves_of(self._arrangement, [run], run.tokens, heads, where).store(tensors, dense)

    @cached_property
    def _travelling(self) -> Learned:
        return travelling(self._arrangement, self._page_elements)


def _as_bits(tensor: Flat, bits: np.dtype[np.unsignedinteger[Any]]) -> Flat:
    if tensor.ndim != 1 or not tensor.flags.c_contiguous or tensor.itemsize != bits.itemsize:
        raise LayoutError(
            "memory", (tensor.shape, str(tensor.dtype)), f"flat arrays of elements of {bits.itemsize} bytes"
        )
    return tensor.view(bits)
