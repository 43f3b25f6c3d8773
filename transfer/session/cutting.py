"""Which tokens of a prompt are staged, in which pieces, and which of them a table of blocks holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from transfer.canonical import Form, PartShape, TokenRange, head_runs, part_bytes
from transfer.errors import LayoutError
from transfer.layout import GroupShape, HeadRange, RankLayout
from transfer.session.vocabulary import Tables


def kept_runs(tokens: TokenRange, table: Sequence[int], block_tokens: int) -> list[TokenRange]:
    """The tokens whose blocks the group still keeps, as runs, ascending.

    Raises:
        LayoutError: if the table ends before the tokens do.
    """
    if tokens.count <= 0:
        return []
    last = (tokens.end - 1) // block_tokens
    if last >= len(table):
        raise LayoutError("tables", len(table), f"at least {last + 1} blocks for {tokens.end} tokens")
    runs: list[TokenRange] = []
    first: int | None = None
    for block in range(tokens.first // block_tokens, last + 1):
        start = max(tokens.first, block * block_tokens)
        if table[block] > 0:
            first = start if first is None else first
        elif first is not None:
            runs.append(TokenRange(first, start - first))
            first = None
    if first is not None:
        runs.append(TokenRange(first, tokens.end - first))
    return runs


@dataclass(frozen=True, slots=True)
class Cutter:
    """How one rank cuts what its engine computed into parts.

    Attributes:
        staged: heads of each group that this rank stages; None where it stages nothing of the group.
        chunk_tokens_max: tokens of a part at most; in pages form rounded down to whole blocks, one at least.
        head_runs: runs into which the heads are cut in tokens form.
        window_slack_tokens: tokens before a sliding window that are staged nevertheless.
    """

    layout: RankLayout
    staged: tuple[HeadRange | None, ...]
    chunk_tokens_max: int
    head_runs: int
    window_slack_tokens: int

    @property
    def stages_anything(self) -> bool:
        return any(heads is not None for heads in self.staged)

    def pieces(self, form: Form, first: int, end: int) -> list[TokenRange]:
        """Cut tokens `first .. end - 1` at multiples of the chunk size.

        Multiples, so that parts meet at block boundaries wherever the engine's own steps ended.
        """
        size = self.chunk_tokens_max
        if form is Form.PAGES:
            block_tokens = self.layout.layout.block_tokens
            size = max(size // block_tokens, 1) * block_tokens
        cuts = [first, *range((first // size + 1) * size, end, size), end]
        return [TokenRange(a, b - a) for a, b in pairwise(cuts) if a < b]

    def shapes(self, form: Form, tokens: TokenRange, tables: Tables, token_count: int) -> list[PartShape]:
        """The parts of one piece: for each staged group the tokens it keeps, by runs of heads.

        Raises:
            LayoutError: if a table is missing, or ends before the tokens do.
        """
        if len(tables) != len(self.staged):
            raise LayoutError("tables", len(tables), f"one for each of {len(self.staged)} KV cache groups")
        block_tokens = self.layout.layout.block_tokens
        shapes: list[PartShape] = []
        for group, heads in enumerate(self.staged):
            if heads is None:
                continue
            first = max(tokens.first, self.first_staged(self.layout.groups[group], token_count))
            wanted = TokenRange(first, tokens.end - first)
            runs = [heads] if form is Form.PAGES else head_runs(heads, self.head_runs)
            shapes += [
                PartShape(form, group, run, kept)
                for kept in kept_runs(wanted, tables[group], block_tokens)
                for run in runs
            ]
        return shapes

    def first_staged(self, shape: GroupShape, token_count: int) -> int:
        """The first token of a prompt that a group stages: what lies well before its window nobody reads."""
        if shape.window_tokens is None:
            return 0
        first = max(0, token_count - shape.window_tokens - self.window_slack_tokens)
        return first - first % self.layout.layout.block_tokens

    def bytes_needed(self, form: Form, token_count: int) -> int:
        """Size of all parts of a prompt if every block is kept, alignment left out."""
        total = 0
        for group, heads in enumerate(self.staged):
            if heads is not None:
                shape = self.layout.groups[group]
                first = self.first_staged(shape, token_count)
                part = PartShape(form, group, heads, TokenRange(first, token_count - first))
                total += part_bytes(part, shape, self.layout.layout)
        return total
