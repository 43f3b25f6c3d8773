"""One load on the consumer's side: what it needs, from whom, and what became of each offered part."""

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum

from transfer.canonical import Form, TokenRange, part_bytes
from transfer.digest import DIGEST_BYTES
from transfer.errors import Failure, FrameError, LayoutError
from transfer.layout import HeadRange, RankLayout
from transfer.plan import staged_heads, wanted_heads
from transfer.session.cutting import kept_runs
from transfer.session.vocabulary import LoadAsked, Source, StagedPart, Tables


class Coverage:
    """Which tokens of which heads have come; each may come once."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """By group and head: covered (first, end), ascending, never adjacent."""

    def add(self, group: int, heads: HeadRange, tokens: TokenRange) -> bool:
        """Cover tokens of some heads; False, with nothing covered, if one of them was covered before."""
        for head in range(heads.first, heads.end):
            runs = self._runs.get((group, head), [])
            at = bisect_left(runs, (tokens.first, tokens.first))
            is_before = at > 0 and runs[at - 1][1] > tokens.first
            is_after = at < len(runs) and runs[at][0] < tokens.end
            if is_before or is_after:
                return False
        for head in range(heads.first, heads.end):
            runs = self._runs.setdefault((group, head), [])
            at = bisect_left(runs, (tokens.first, tokens.first))
            first, end = tokens.first, tokens.end
            if at < len(runs) and runs[at][0] == end:
                end = runs.pop(at)[1]
            if at > 0 and runs[at - 1][1] == first:
                first = runs.pop(at - 1)[0]
                at -= 1
            runs.insert(at, (first, end))
        return True


@dataclass(frozen=True, slots=True)
class Need:
    """What one group of a load lacks: these heads of these runs of tokens."""

    heads: HeadRange
    runs: tuple[TokenRange, ...]

    @property
    def count(self) -> int:
        return self.heads.count * sum(run.count for run in self.runs)

    def within(self, tokens: TokenRange) -> tuple[TokenRange, ...]:
        """The needed runs of some tokens."""
        # A prompt has a run or two; only a sliding window with holes has more.
        return tuple(both for run in self.runs if (both := run.overlap(tokens)) is not None)


def needs_of(layout: RankLayout, tokens: TokenRange, tables: Tables) -> tuple[Need, ...]:
    """What each group lacks: every token whose block it keeps, of every head of the rank.

    All of a kept block, also what lies before a sliding window: the engine may share the block later.

    Raises:
        LayoutError: if a table is missing, or ends before the tokens do.
    """
    if len(tables) != len(layout.groups):
        raise LayoutError("tables", len(tables), f"one for each of {len(layout.groups)} KV cache groups")
    block_tokens = layout.layout.block_tokens
    return tuple(
        Need(wanted_heads(layout, group), tuple(kept_runs(tokens, table, block_tokens)))
        for group, table in enumerate(tables)
    )


class PartState(Enum):
    """Where an offered part stands; nothing reads or writes for it in `waiting` and `over`."""

    WAITING = "waiting"
    READING = "reading"
    UNPACKING = "unpacking"
    OVER = "over"


@dataclass(slots=True)
class Part:
    """An offered part that is needed here.

    Attributes:
        feed: where it comes from.
        runs: its needed tokens; more than one only where a table has holes.
        run_index: which of them is unpacked now.
        landing: offset of its landing place, while it has one.
        read: number of its read, once it has begun.
    """

    index: int
    feed: "Feed"
    offered: StagedPart
    runs: tuple[TokenRange, ...]
    run_index: int = 0
    state: PartState = PartState.WAITING
    landing: int = -1
    read: int = 0


@dataclass(slots=True)
class Feed:
    """What one source gives to a load.

    Attributes:
        staged: heads of each group that the source stages.
        token_count: of the whole prompt, as the source says; None before its first offer.
        unread_count: parts that wait to be read, or are being read.
        is_last: it has said that no more parts will come.
        is_over: it was told that we are done, or it is lost.
    """

    source: Source
    staged: tuple[HeadRange | None, ...]
    token_count: int | None = None
    offered_count: int = 0
    unread_count: int = 0
    is_last: bool = False
    is_over: bool = False

    @classmethod
    def of(cls, source: Source) -> "Feed":
        return cls(source, staged_heads(source.layout))

    def fault(self, part: StagedPart, own: RankLayout, token_count: int) -> str:
        """What is wrong with an offered part; empty if nothing is."""
        shape, layout = part.shape, self.source.layout
        if not 0 <= shape.group < len(layout.groups):
            return f"group {shape.group} of {len(layout.groups)}"
        staged = self.staged[shape.group]
        heads, tokens = shape.heads, shape.tokens
        if staged is None or heads.count < 1 or heads.first < staged.first or heads.end > staged.end:
            return f"heads {heads.first}..{heads.end} are not staged by rank {layout.rank}"
        if tokens.first < 0 or tokens.count < 1 or tokens.end > token_count:
            return f"tokens {tokens.first}..{tokens.end} of {token_count}"
        if shape.form is Form.PAGES and (detail := self._page_fault(part, own)):
            return detail
        size = part_bytes(shape, layout.groups[shape.group], layout.layout)
        if part.length_bytes != size:
            return f"{part.length_bytes} bytes for a part of {size}"
        if part.offset < 0 or part.offset + size > self.source.staging_bytes:
            return f"bytes {part.offset}..{part.offset + size} of {self.source.staging_bytes}"
        return "" if len(part.digest) == DIGEST_BYTES else "a digest of another length"

    def _page_fault(self, part: StagedPart, own: RankLayout) -> str:
        layout, shape = self.source.layout, part.shape
        if layout.layout != own.layout or layout.scales != own.scales:
            return "pages of another layout"
        if not shape.heads == layout.heads(shape.group) == own.heads(shape.group):
            return "pages with other heads"
        if shape.tokens.first % own.layout.block_tokens:
            return "pages that begin inside a block"
        return ""


class LoadState(Enum):
    """Where a load stands.

    connecting: its producer is being connected. fetching: parts come. closing: it waits for its own end.
    """

    CONNECTING = "connecting"
    FETCHING = "fetching"
    CLOSING = "closing"


@dataclass(slots=True)
class Load:
    """What the Inbox knows of one load.

    Attributes:
        deadline_s: when it fails; while connecting the sooner of both bounds.
        missing_count: tokens times heads that no part was offered for yet.
        busy_count: parts being read or unpacked.
    """

    asked: LoadAsked
    needs: tuple[Need, ...]
    deadline_s: float
    connect_until_s: float
    state: LoadState = LoadState.CONNECTING
    feeds: dict[str, Feed] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    missing_count: int = 0
    busy_count: int = 0
    loaded_bytes: int = 0
    failure: Failure | None = None

    def __post_init__(self) -> None:
        self.missing_count = sum(need.count for need in self.needs)

    @property
    def due_s(self) -> float | None:
        """When it fails if nothing happens; None if only its end is waited for."""
        match self.state:
            case LoadState.CONNECTING:
                return min(self.deadline_s, self.connect_until_s)
            case LoadState.FETCHING:
                return self.deadline_s
            case LoadState.CLOSING:
                return None

    @property
    def is_settled(self) -> bool:
        """Whether no offered part waits, is read or is unpacked."""
        return not self.busy_count and not any(feed.unread_count for feed in self.feeds.values())

    def uncovered_heads(self, own: RankLayout) -> str:
        """Why the sources cannot give all that is needed; empty if they can."""
        for feed in self.feeds.values():
            if feed.source.layout.groups != own.groups:
                return f"the KV cache groups of rank {feed.source.layout.rank} are not ours"
        for group, need in enumerate(self.needs):
            staged = [feed.staged[group] for feed in self.feeds.values()]
            shared = [both.count for heads in staged if heads and (both := heads.overlap(need.heads))]
            if need.count and sum(shared) != need.heads.count:
                return f"group {group}: {sum(shared)} of {need.heads.count} heads have a source"
        return ""

    def accept(self, feed: Feed, offered: StagedPart) -> Part | None:
        """Book a part that is sound; None if nothing of it is needed.

        Raises:
            FrameError: if a token of it was offered before.
        """
        shape = offered.shape
        need = self.needs[shape.group]
        heads = need.heads.overlap(shape.heads)
        runs = need.within(shape.tokens)
        if heads is None or not runs:
            return None
        for run in runs:
            if not self.coverage.add(shape.group, heads, run):
                raise FrameError(f"tokens {run.first}..{run.end} of group {shape.group} were offered before")
            self.missing_count -= run.count * heads.count
        part = Part(len(self.parts), feed, offered, runs)
        self.parts.append(part)
        feed.unread_count += 1
        return part

    def drop_waiting(self) -> None:
        """Read no more parts."""
        for part in self.parts:
            if part.state is PartState.WAITING:
                part.state = PartState.OVER
                part.feed.unread_count -= 1

    def validate(self) -> None:
        states = [part.state for part in self.parts]
        busy = sum(state in (PartState.READING, PartState.UNPACKING) for state in states)
        assert self.busy_count == busy, "parts that are read or unpacked are counted"
        for feed in self.feeds.values():
            own = [p for p in self.parts if p.feed is feed]
            unread = sum(p.state in (PartState.WAITING, PartState.READING) for p in own)
            assert feed.unread_count == unread, "parts that are not read yet are counted"
        assert self.missing_count >= 0, "nothing is covered twice"
        if self.state is LoadState.CONNECTING:
            assert not self.feeds, "a source is known when it is connected"
        if self.state is LoadState.CLOSING:
            assert PartState.WAITING not in states, "a load that closes begins no more reads"
