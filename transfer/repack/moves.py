"""A job as strided copies between an engine's blocks and a dense array: what numpy and torch carry out."""

from collections.abc import Sequence
from dataclasses import dataclass

from transfer.canonical import TokenRange
from transfer.repack.arrangement import Arrangement, Axis, Digit, Patch, Side, Span, padding_of, patches
from transfer.repack.jobs import MISSING, Run, is_wholly

SHORT_RUN_BLOCKS = 4
SHORT_RUNS_MIN = 4
"""From this many runs on, those with fewer blocks than SHORT_RUN_BLOCKS are moved by index, all in one."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Where `[token][head][key elements, value elements]` lies in a flat array, in elements.

    Attributes:
        offset: of the first moved token's first moved head.
        token_stride: from a token to the next.
        head_stride: from a head to the next; elements of a head stand side by side.
    """

    offset: int
    token_stride: int
    head_stride: int


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy between a layer's flat tensor and a dense array; all numbers in elements.

    Both sides are views of `shape`. With `blocks` a leading axis is put before them: entry i is in the block
    `blocks[i]` (`block_stride` apart in memory) and at `rows[i]` (`row_stride` apart in the dense array).

    Attributes:
        side: 0 for keys or latents, 1 for values.
        tensor: which of the layer's tensors.
    """

    side: int
    tensor: int
    shape: tuple[int, ...]
    memory_offset: int
    memory_strides: tuple[int, ...]
    dense_offset: int
    dense_strides: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    block_stride: int = 0
    row_stride: int = 0


def copies(
    arrangement: Arrangement, runs: Sequence[Run], tokens: TokenRange, heads: Span, dense: Dense
) -> list[Copy]:
    """The copies that move these tokens and heads of one layer; the same for each layer of the group.

    Args:
        runs: of `tokens`; missing ones are passed over.
        heads: of the rank's heads.
    """
    return _moves(arrangement, runs, tokens, heads, dense)


def paddings(arrangement: Arrangement, runs: Sequence[Run], heads: Span) -> list[Copy]:
    """The places of one layer that hold zeros because a head is padded, for these tokens and heads.

    `dense_*` and `rows` mean nothing in them: write zeros into the views of memory.
    """
    padded = [side for side in arrangement.sides if padding_of(side).count]
    if not padded or not runs:
        return []
    tokens = TokenRange(runs[0].tokens.first, runs[-1].tokens.end - runs[0].tokens.first)
    return _moves(arrangement, runs, tokens, heads, None)


def _moves(
    arrangement: Arrangement, runs: Sequence[Run], tokens: TokenRange, heads: Span, dense: Dense | None
) -> list[Copy]:
    found: list[Copy] = []
    runs = [run for run in runs if run.block != MISSING]
    start = 0
    for index, side in enumerate(arrangement.sides):
        block_tokens = side.length(Axis.TOKEN)
        single, short = _sorted_out(runs, block_tokens)
        mover = _Mover(index, side, arrangement.block_strides[side.tensor], heads, dense, start)
        for run in single:
            found.extend(mover.of_run(run, tokens.first))
        if short:
            found.extend(mover.of_blocks(short, tokens.first))
        start += side.dim
    return found


def _sorted_out(runs: Sequence[Run], block_tokens: int) -> tuple[list[Run], list[tuple[int, int]]]:
    """Runs to be copied one by one, and (block, first token) of whole blocks better moved by index."""
    if len(runs) < SHORT_RUNS_MIN:
        return list(runs), []
    single: list[Run] = []
    short: list[tuple[int, int]] = []
    anchor: int | None = None
    for run in runs:
        if not is_wholly(run, block_tokens) or run.block_count >= SHORT_RUN_BLOCKS:
            single.append(run)
            continue
        anchor = run.tokens.first if anchor is None else anchor
        short.extend(
            (run.block + step, run.tokens.first + step * block_tokens) for step in range(run.block_count)
        )
    return single, short


@dataclass(frozen=True, slots=True)
class _Mover:
    index: int
    side: Side
    block_stride: int
    heads: Span
    dense: Dense | None
    start: int

    def of_run(self, run: Run, first_token: int) -> list[Copy]:
        digit = Digit(Axis.TOKEN, run.block_count, self.block_stride)
        base = run.block * self.block_stride
        return [
            self._copy(patch, base, run.tokens.first - run.skip - first_token)
            for patch in self._patches(digit, Span(run.skip, run.tokens.count))
        ]

    def of_blocks(self, blocks: Sequence[tuple[int, int]], first_token: int) -> list[Copy]:
        block_tokens = self.side.length(Axis.TOKEN)
        one = Digit(Axis.TOKEN, 1, self.block_stride)
        anchor = blocks[0][1]
        found = []
        for patch in self._patches(one, Span(0, block_tokens)):
            copy = self._copy(patch, 0, anchor - first_token)
            found.append(
                Copy(
                    side=copy.side,
                    tensor=copy.tensor,
                    shape=copy.shape,
                    memory_offset=copy.memory_offset,
                    memory_strides=copy.memory_strides,
                    dense_offset=copy.dense_offset,
                    dense_strides=copy.dense_strides,
                    blocks=tuple(block for block, _ in blocks),
                    rows=tuple((token - anchor) // block_tokens for _, token in blocks),
                    block_stride=self.block_stride,
                    row_stride=block_tokens * self.dense.token_stride if self.dense else 0,
                )
            )
        return found

    def _patches(self, digit: Digit, tokens: Span) -> tuple[Patch, ...]:
        elements = None if self.dense else padding_of(self.side)
        return patches(self.side, digit, tokens, self.heads, elements)

    def _copy(self, patch: Patch, base: int, first: int) -> Copy:
        dense = self.dense or Dense(0, 0, 0)
        return Copy(
            side=self.index,
            tensor=self.side.tensor,
            shape=patch.shape,
            memory_offset=base + patch.offset,
            memory_strides=patch.memory_strides,
            dense_offset=dense.offset
            + (first + patch.tokens.first) * dense.token_stride
            + (patch.heads.first - self.heads.first) * dense.head_stride
            + self.start
            + patch.elements.first,
            dense_strides=patch.dense_strides(dense.token_stride, dense.head_stride, 1),
        )
