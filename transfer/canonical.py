"""The form in which KV lies in staging and on the wire, whatever engine wrote it.

A request's prompt is staged in chunks of consecutive tokens. A chunk has one or more parts; a part is one
piece of memory that is read, verified and unpacked as a whole:

    tokens   [layer][token][head][key elements, value elements], in the producer's dtype, of one KV cache
             group and one run of heads: the vendor-neutral form
    pages    [layer][block][page], the producer's own pages as they are, of one group and all heads of the
             rank: only for a consumer whose layout is equal

With `head_runs` above 1 the heads of a rank are cut into as many equal runs, each a part of its own, so that
a consumer of more ranks reads only its own heads. The consumer converts; the producer only moves bytes.
"""

from dataclasses import dataclass
from enum import StrEnum

from transfer.layout import GroupShape, HeadRange, KvLayout


class Form(StrEnum):
    """How the bytes of a part are laid out."""

    TOKENS = "tokens"
    PAGES = "pages"


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens `first .. first + count - 1` of a prompt."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def overlap(self, other: "TokenRange") -> "TokenRange | None":
        first, end = max(self.first, other.first), min(self.end, other.end)
        return TokenRange(first, end - first) if first < end else None


@dataclass(frozen=True, slots=True)
class PartShape:
    """What one part holds; its size follows from it.

    Attributes:
        group: index of the KV cache group.
        heads: the model's heads in it.
        tokens: the prompt's tokens in it; in pages form from a block's first token on.
    """

    form: Form
    group: int
    heads: HeadRange
    tokens: TokenRange


def row_bytes(shape: GroupShape, layout: KvLayout) -> int:
    """Bytes of one token of one head of one layer in tokens form; padding is left out."""
    return shape.row_elements * layout.dtype.item_bytes


def page_bytes(shape: GroupShape, layout: KvLayout, head_count: int) -> int:
    """Bytes of one block of one layer with all heads of the rank, padding included."""
    multiple = layout.head_dim_multiple
    elements = sum(-(-dim // multiple) * multiple for dim in (shape.key_dim, shape.value_dim))
    return elements * layout.dtype.item_bytes * head_count * layout.block_tokens


def part_bytes(part: PartShape, shape: GroupShape, layout: KvLayout) -> int:
    """Size of a part, both forms; `layout` and `shape` are the producer's."""
    if part.form is Form.TOKENS:
        return shape.layer_count * part.tokens.count * part.heads.count * row_bytes(shape, layout)
    blocks = -(-part.tokens.count // layout.block_tokens)
    return shape.layer_count * blocks * page_bytes(shape, layout, part.heads.count)


def head_runs(heads: HeadRange, run_count: int) -> list[HeadRange]:
    """Cut a rank's heads into equal runs; one run if `run_count` does not divide them."""
    if heads.count % run_count:
        return [heads]
    each = heads.count // run_count
    return [HeadRange(heads.first + i * each, each) for i in range(run_count)]
