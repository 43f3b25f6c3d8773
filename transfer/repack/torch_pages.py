"""Pages form in torch: blocks as they are, and the wanted tokens out of a page that is wanted in part."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from transfer.canonical import TokenRange
from transfer.repack import torch_learned
from transfer.repack.arrangement import Learned, Span
from transfer.repack.jobs import MISSING, Job, Run, is_wholly, split
from transfer.repack.kernels import Kernels
from transfer.repack.moves import Copy, Dense, copies, paddings
from transfer.repack.tables import page_order, travelling
from transfer.repack.torch_learned import Indexed
from transfer.repack.torch_memory import GroupFlats, Layers, Stack

Move = Callable[[Layers, Any], None]
"""Moves some layers between a group's blocks and a dense array of them."""


def mover(
    group: GroupFlats, kernels: Kernels, moves: Sequence[Copy] | Sequence[Indexed], *, is_gather: bool
) -> Move:
    """What carries these moves out."""
    if isinstance(group.arrangement, Learned):
        by_table = torch_learned.gather if is_gather else torch_learned.scatter
        indexed = [move for move in moves if isinstance(move, Indexed)]
        return lambda layers, part: by_table(group, layers, indexed, part)
    strided = kernels.gather if is_gather else kernels.scatter
    found = [move for move in moves if isinstance(move, Copy)]
    return lambda layers, part: strided(group, layers, found, part)


def token_moves(
    group: GroupFlats, runs: Sequence[Run], tokens: TokenRange, heads: Span, dense: Dense
) -> Sequence[Copy] | Sequence[Indexed]:
    """The moves of some tokens and heads of a layer; arguments as in `moves.copies`."""
    if isinstance(group.arrangement, Learned):
        return list(torch_learned.indexed(group.arrangement, runs, tokens, heads, dense, device=group.device))
    return copies(group.arrangement, runs, tokens, heads, dense)


def hole_copies(group: GroupFlats, runs: Sequence[Run], heads: Span) -> list[Copy]:
    """Where zeros go when these tokens are written; a learned page has no padding that is known."""
    if isinstance(group.arrangement, Learned):
        return []
    return paddings(group.arrangement, runs, heads)


def whole_and_split(runs: Sequence[Run], block_tokens: int) -> tuple[list[Run], list[Run]]:
    """Runs of wanted blocks, cut into those of whole blocks and those of a part of one block each."""
    pieces = [piece for run in runs if run.block != MISSING for piece in split(run, block_tokens)]
    whole = [piece for piece in pieces if is_wholly(piece, block_tokens)]
    return whole, [piece for piece in pieces if not is_wholly(piece, block_tokens)]


def page_moves(
    group: GroupFlats, runs: Sequence[Run], first_token: int, block_tokens: int, page_elements: int
) -> Sequence[Copy] | Sequence[Indexed]:
    """The moves of whole blocks, to or from `[block][page]`.

    Args:
        first_token: of the part.
    """
    placed = [
        (run, (run.tokens.first - run.skip - first_token) // block_tokens)
        for run in runs
        if run.block != MISSING
    ]
    if isinstance(group.arrangement, Learned):
        return _indexed_pages(group, placed, page_elements)
    return _strided_pages(group, placed, page_elements)


def _strided_pages(group: GroupFlats, placed: Sequence[tuple[Run, int]], page_elements: int) -> list[Copy]:
    found: list[Copy] = []
    start = 0
    for piece in group.pieces:
        block_stride = group.arrangement.block_strides[piece.tensor]
        dense_strides: list[int] = []
        step = 1
        for size in reversed(piece.sizes):
            dense_strides.insert(0, step)
            step *= size
        found.extend(
            Copy(
                side=0,
                tensor=piece.tensor,
                shape=(run.block_count, *piece.sizes),
                memory_offset=run.block * block_stride + piece.offset,
                memory_strides=(block_stride, *piece.strides),
                dense_offset=row * page_elements + start,
                dense_strides=(page_elements, *dense_strides),
            )
            for run, row in placed
        )
        start += piece.element_count
    return found


def _indexed_pages(group: GroupFlats, placed: Sequence[tuple[Run, int]], page_elements: int) -> list[Indexed]:
    found: list[Indexed] = []
    start = 0
    for tensor, order in page_order(group.arrangement):
        stride = group.arrangement.block_strides[tensor]
        positions = torch.from_numpy(order.copy()).to(group.device)
        for run, row in placed:
            blocks = torch.arange(run.block, run.block + run.block_count, device=group.device) * stride
            found.append(
                Indexed(
                    tensor=tensor,
                    positions=(positions + blocks[:, None]).reshape(-1),
                    shape=(run.block_count, 1, len(order)),
                    offset=row * page_elements + start,
                    strides=(page_elements, page_elements, 1),
                )
            )
        start += len(order)
    return found


class SplitPages:
    """Writes the wanted tokens of pages that are wanted in part; others of these blocks are not touched."""

    def __init__(
        self, group: GroupFlats, kernels: Kernels, job: Job, runs: Sequence[Run], page_elements: int
    ) -> None:
        self._page_elements = page_elements
        self._travelling = travelling(group.original, page_elements)
        self._rows = job.shape.row_elements
        self._works = [self._work(group, kernels, job, run) for run in runs]

    def _work(
        self, group: GroupFlats, kernels: Kernels, job: Job, run: Run
    ) -> tuple[list[Indexed], int, Move]:
        """What reads a run from the part, the elements that it is, and what writes it."""
        side = self._travelling.sides[0]
        dense = Dense(0, job.heads.count * self._rows, self._rows)
        row = (run.tokens.first - run.skip - job.part.tokens.first) // side.tokens
        # Block 0 is a missing one, so the part's pages are counted from 1 on.
        there = Run(run.tokens, row + 1, 1, run.skip)
        reads = torch_learned.indexed(
            self._travelling,
            [there],
            run.tokens,
            job.heads,
            dense,
            device=group.device,
            origin=-self._page_elements,
        )
        writes = mover(
            group, kernels, token_moves(group, [run], run.tokens, job.heads, dense), is_gather=False
        )
        return list(reads), run.tokens.count * job.heads.count * self._rows, writes

    def __call__(self, layers: Layers, part: Any) -> None:
        """Write some layers, whose pages are `part`."""
        stack = Stack(0, layers.count, layers.stride, part, None)
        pages = GroupFlats(self._travelling, self._travelling, ((stack,),), 0, ())
        for reads, elements, writes in self._works:
            rows = part.new_empty(layers.count * elements)
            torch_learned.gather(pages, Layers(0, layers.count, elements), reads, rows)
            writes(Layers(layers.first, layers.count, elements), rows)
