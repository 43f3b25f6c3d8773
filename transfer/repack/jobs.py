"""What an order to pack or unpack means for this rank's blocks, checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.errors import LayoutError
from transfer.layout import GroupShape, LayerScales, RankLayout
from transfer.repack.arrangement import Span
from transfer.session.vocabulary import Slot, Tables, Unpack

MISSING = 0
"""Block id of a run that the group does not keep (sliding window)."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens in blocks with consecutive ids.

    Attributes:
        tokens: of the prompt.
        block: id of the first block; MISSING if the group does not keep these tokens.
        block_count: blocks that the tokens touch.
        skip: tokens of the first block before `tokens.first`.
    """

    tokens: TokenRange
    block: int
    block_count: int
    skip: int


@dataclass(frozen=True, slots=True)
class Job:
    """A part and the blocks that belong to it.

    Attributes:
        group: index of the KV cache group.
        form: of the part.
        shape: the group's.
        part: what the part holds.
        tokens: those to be moved, of the prompt.
        heads: those to be moved, of this rank's heads.
        part_heads: the same heads, counted from the part's first.
        runs: the blocks of `tokens`, in order; missing ones are filled with zeros in packing and left out
            in unpacking.
    """

    group: int
    form: Form
    shape: GroupShape
    part: PartShape
    tokens: TokenRange
    heads: Span
    part_heads: Span
    runs: tuple[Run, ...]


def scales_of(layout: RankLayout, group: int) -> tuple[LayerScales, ...]:
    """Scales of each layer of a group; ones where the dtype is not fp8."""
    if layout.scales:
        return layout.scales[group]
    return (LayerScales(),) * layout.groups[group].layer_count


def runs_of(table: Sequence[int], tokens: TokenRange, block_tokens: int) -> tuple[Run, ...]:
    """Group the blocks of some tokens into runs of consecutive ids.

    Raises:
        LayoutError: if the table ends before the tokens do, or the range is none.
    """
    if tokens.first < 0 or tokens.count < 0:
        raise LayoutError("tokens", (tokens.first, tokens.count), "a range from 0 on")
    if tokens.count == 0:
        return ()
    first, end = tokens.first // block_tokens, -(-tokens.end // block_tokens)
    if end > len(table):
        raise LayoutError("tables", len(table), f"at least {end} blocks, for token {tokens.end - 1}")
    numbered = [(place, max(table[place], MISSING)) for place in range(first, end)]
    runs: list[Run] = []
    # Places and ids that rise together differ by a constant; missing blocks form runs of their own.
    for _, members in groupby(numbered, key=lambda pair: pair[1] - pair[0] if pair[1] else None):
        run = list(members)
        low = max(run[0][0] * block_tokens, tokens.first)
        high = min((run[-1][0] + 1) * block_tokens, tokens.end)
        runs.append(
            Run(
                tokens=TokenRange(low, high - low),
                block=run[0][1],
                block_count=len(run),
                skip=low - run[0][0] * block_tokens,
            )
        )
    return tuple(runs)


def is_wholly(run: Run, block_tokens: int) -> bool:
    """Whether all tokens of all its blocks are in a run."""
    return run.skip == 0 and run.tokens.count == run.block_count * block_tokens


def split(run: Run, block_tokens: int) -> tuple[Run, ...]:
    """Cut a run so that a block of which it has only some tokens is a run of its own."""
    first, end = run.tokens.first, run.tokens.end
    start = first - run.skip
    lead = min(end, start + block_tokens) if run.skip else first
    tail = max(lead, end - (end - start) % block_tokens)
    found = []
    for low, high in pairwise((first, lead, tail, end)):
        if low >= high:
            continue
        skipped = low - start
        tokens = TokenRange(low, high - low)
        block = run.block + skipped // block_tokens if run.block != MISSING else MISSING
        skip = skipped % block_tokens
        found.append(Run(tokens, block, -(-(skip + tokens.count) // block_tokens), skip))
    return tuple(found)


def pack_job(layout: RankLayout, slot: Slot, tables: Tables, block_count: int) -> Job:
    """Check an order to fill a slot.

    Args:
        block_count: blocks that the slot's group has room for; ids lie below it.

    Raises:
        LayoutError: naming what does not fit. A missing block of a group without a sliding window is refused,
            as its tokens would be silently wrong.
    """
    part = slot.shape
    shape = _group(layout, part.group)
    own = layout.heads(part.group)
    if own.overlap(part.heads) != part.heads:
        raise LayoutError("heads", part.heads, f"heads in {own.first}..{own.end - 1}, which this rank holds")
    _check_length(part, slot.length_bytes, part_bytes(part, shape, layout.layout))
    if part.form is Form.PAGES:
        _check_pages(part, layout)
    heads = Span(part.heads.first - own.first, part.heads.count)
    return Job(
        group=part.group,
        form=part.form,
        shape=shape,
        part=part,
        tokens=part.tokens,
        heads=heads,
        part_heads=Span(0, part.heads.count),
        runs=_checked_runs(layout, tables, part.group, part.tokens, block_count),
    )


def unpack_job(layout: RankLayout, order: Unpack, block_count: int) -> Job:
    """Check an order to unpack a part; arguments and errors as in `pack_job`."""
    part = order.shape
    shape = _group(layout, part.group)
    theirs = _group(order.source, part.group)
    if theirs != shape:
        raise LayoutError("groups", theirs, f"{shape}, as this rank has in group {part.group}")
    own, held = layout.heads(part.group), order.source.heads(part.group)
    if held.overlap(part.heads) != part.heads:
        raise LayoutError("heads", part.heads, f"heads that the producer's rank holds, {held}")
    wanted = own.overlap(part.heads)
    if wanted is None:
        raise LayoutError("heads", part.heads, f"some of {own}, which this rank holds")
    _check_length(part, order.length_bytes, part_bytes(part, shape, order.source.layout))
    tokens = order.tokens
    if tokens.count and part.tokens.overlap(tokens) != tokens:
        raise LayoutError("tokens", tokens, f"tokens of the part, {part.tokens}")
    if part.form is Form.PAGES:
        _check_pages(part, layout)
        if order.source.layout != layout.layout:
            raise LayoutError("form", str(part.form), "tokens form, as the layouts differ")
        if scales_of(order.source, part.group) != scales_of(layout, part.group):
            raise LayoutError("form", str(part.form), "tokens form, as the scales differ")
    return Job(
        group=part.group,
        form=part.form,
        shape=shape,
        part=part,
        tokens=tokens,
        heads=Span(wanted.first - own.first, wanted.count),
        part_heads=Span(wanted.first - part.heads.first, wanted.count),
        runs=_checked_runs(layout, order.tables, part.group, tokens, block_count),
    )


def check_place(name: str, offset: int, length_bytes: int, staging_bytes: int) -> None:
    """Make sure that a part lies inside the staging buffer.

    Raises:
        LayoutError: if it does not.
    """
    if offset < 0 or offset + length_bytes > staging_bytes:
        raise LayoutError(name, offset, f"an offset of {length_bytes} bytes inside {staging_bytes}")


def _group(layout: RankLayout, group: int) -> GroupShape:
    if not 0 <= group < len(layout.groups):
        raise LayoutError("group", group, f"a group in 0..{len(layout.groups) - 1}")
    return layout.groups[group]


def _check_length(part: PartShape, given: int, due: int) -> None:
    if part.tokens.first < 0 or part.tokens.count < 0:
        raise LayoutError("tokens", part.tokens, "a range from 0 on")
    if given != due:
        raise LayoutError("length_bytes", given, f"{due}, by the part's shape")


def _check_pages(part: PartShape, layout: RankLayout) -> None:
    own = layout.heads(part.group)
    if part.heads != own:
        raise LayoutError("heads", part.heads, f"{own}, all heads of the rank, in pages form")
    if part.tokens.first % layout.layout.block_tokens:
        raise LayoutError("tokens", part.tokens, "a range from a block's first token on, in pages form")


def _checked_runs(
    layout: RankLayout, tables: Tables, group: int, tokens: TokenRange, block_count: int
) -> tuple[Run, ...]:
    if group >= len(tables):
        raise LayoutError("tables", len(tables), f"a table for group {group}")
    runs = runs_of(tables[group], tokens, layout.layout.block_tokens)
    for run in runs:
        if run.block == MISSING and layout.groups[group].window_tokens is None:
            raise LayoutError("tables", run.block, "a block for each token, as the group has no window")
        if run.block + run.block_count > block_count and run.block != MISSING:
            raise LayoutError("tables", run.block + run.block_count - 1, f"block ids below {block_count}")
    return runs
