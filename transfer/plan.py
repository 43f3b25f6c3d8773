"""Which ranks of a producer hold, stage and are read for which heads, as both sides work it out alone.

Heads that several ranks hold (more ranks than KV heads, MLA) are staged by the first of them only. Both sides
have groups of equal shapes; `verdict.judge_ranks` sees to that before anything here is asked.
"""

from dataclasses import dataclass

from transfer.layout import HeadRange, RankLayout, heads_of_rank


@dataclass(frozen=True, slots=True)
class SourceNeed:
    """A producer rank that a consumer rank reads from.

    Attributes:
        reader_count: ranks of the consumer that read from it, this one included.
    """

    rank: int
    reader_count: int


def staged_heads(layout: RankLayout) -> tuple[HeadRange | None, ...]:
    """What a producer rank stages of each group; None where another rank stages its heads."""
    ranks = layout.layout.tensor_parallel
    return tuple(
        layout.heads(index) if layout.rank % _copies(shape.kv_heads, ranks) == 0 else None
        for index, shape in enumerate(layout.groups)
    )


def wanted_heads(consumer: RankLayout, group: int) -> HeadRange:
    """What a consumer rank must be given of a group: all the heads that it holds."""
    return consumer.heads(group)


def sources_of(consumer: RankLayout, producer_tensor_parallel: int) -> tuple[SourceNeed, ...]:
    """The producer ranks that a consumer rank reads from, ascending; at least one.

    Raises:
        LayoutError: if the producer's ranks cannot share the heads of a group.
    """
    counts: list[int] = [shape.kv_heads for shape in consumer.groups]
    ranks = {
        rank
        for group, kv_heads in enumerate(counts)
        for rank in _stagers(kv_heads, producer_tensor_parallel, consumer.heads(group))
    }
    return tuple(
        SourceNeed(rank, _reader_count(counts, producer_tensor_parallel, rank, consumer))
        for rank in sorted(ranks)
    )


def _reader_count(counts: list[int], producer_ranks: int, rank: int, consumer: RankLayout) -> int:
    """Consumer ranks that hold any head, of any group, that this producer rank stages."""
    readers: set[int] = set()
    for kv_heads in counts:
        if rank % _copies(kv_heads, producer_ranks) == 0:
            heads = heads_of_rank(kv_heads, producer_ranks, rank)
            readers.update(_holders(kv_heads, consumer.layout.tensor_parallel, heads))
    return len(readers)


def _copies(kv_heads: int, ranks: int) -> int:
    """Consecutive ranks that hold the same heads."""
    return max(1, ranks // kv_heads)


def _holders(kv_heads: int, ranks: int, heads: HeadRange) -> range:
    """The ranks that hold any of these heads."""
    if kv_heads % ranks == 0:
        each = kv_heads // ranks
        return range(heads.first // each, (heads.end - 1) // each + 1)
    copies = _copies(kv_heads, ranks)
    return range(heads.first * copies, heads.end * copies)


def _stagers(kv_heads: int, ranks: int, heads: HeadRange) -> range:
    """The ranks that stage any of these heads."""
    heads_of_rank(kv_heads, ranks, 0)  # Refuses counts of which neither divides the other.
    return _holders(kv_heads, ranks, heads)[:: _copies(kv_heads, ranks)]
