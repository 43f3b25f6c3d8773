"""Sizes of parts follow from their shapes, and runs of heads cover a rank's heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.canonical import Form, PartShape, TokenRange, head_runs, page_bytes, part_bytes, row_bytes
from transfer.layout import GroupShape, HeadRange, KvDtype, KvLayout

shapes = st.builds(
    GroupShape,
    layer_count=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    key_dim=st.sampled_from([32, 80]),
    value_dim=st.sampled_from([32, 64]),
) | st.just(GroupShape(3, 1, 576, 0))
layouts = st.builds(
    KvLayout,
    block_tokens=st.sampled_from([16, 48, 128]),
    dtype=st.sampled_from(KvDtype),
    head_dim_multiple=st.sampled_from([1, 64, 128]),
)
ranges = st.builds(TokenRange, st.integers(0, 40), st.integers(0, 40))


def part(form: Form, heads: int, tokens: TokenRange) -> PartShape:
    return PartShape(form, 0, HeadRange(0, heads), tokens)


@given(shapes, layouts, st.integers(0, 300), st.integers(0, 300))
def test_parts_of_tokens_add_up(shape: GroupShape, layout: KvLayout, one: int, two: int) -> None:
    """A chunk costs what its tokens cost, padding left out, wherever a prompt is cut."""

    def size(count: int) -> int:
        return part_bytes(part(Form.TOKENS, shape.kv_heads, TokenRange(5, count)), shape, layout)

    assert size(one) + size(two) == size(one + two)
    assert size(1) == shape.layer_count * shape.kv_heads * row_bytes(shape, layout)


@given(shapes, layouts, st.integers(1, 300))
def test_parts_of_pages_hold_whole_blocks_with_their_padding(
    shape: GroupShape, layout: KvLayout, count: int
) -> None:
    size = part_bytes(part(Form.PAGES, shape.kv_heads, TokenRange(0, count)), shape, layout)
    page = page_bytes(shape, layout, shape.kv_heads)
    blocks = size // (page * shape.layer_count)
    assert size == blocks * page * shape.layer_count
    assert (blocks - 1) * layout.block_tokens < count <= blocks * layout.block_tokens
    assert size >= part_bytes(part(Form.TOKENS, shape.kv_heads, TokenRange(0, count)), shape, layout)


def test_a_known_shape_has_its_known_size() -> None:
    """Llama 8B: 2 x 32 layers x 8 heads x 128 x 2 bytes are 128 KiB a token."""
    llama = GroupShape(32, 8, 128, 128)
    assert part_bytes(part(Form.TOKENS, 8, TokenRange(0, 1)), llama, KvLayout(16)) == 128 * 1024
    assert page_bytes(GroupShape(1, 2, 80, 80), KvLayout(16, head_dim_multiple=128), 2) == 16 * 2 * 256 * 2
    assert page_bytes(GroupShape(1, 1, 576, 0), KvLayout(64), 1) == 64 * 576 * 2


@given(st.integers(0, 5), st.integers(1, 16), st.integers(1, 8))
def test_runs_of_heads_are_equal_and_cover_the_ranks_heads(first: int, count: int, run_count: int) -> None:
    runs = head_runs(HeadRange(first, count), run_count)
    assert [head for run in runs for head in range(run.first, run.end)] == list(range(first, first + count))
    assert len({run.count for run in runs}) == 1
    assert len(runs) == (run_count if count % run_count == 0 else 1)


@given(ranges, ranges)
def test_the_overlap_of_ranges_is_what_both_hold(one: TokenRange, two: TokenRange) -> None:
    both = set(range(one.first, one.end)) & set(range(two.first, two.end))
    found = one.overlap(two)
    assert (set(range(found.first, found.end)) if found else set()) == both
    assert found == two.overlap(one)


@pytest.mark.parametrize(("first", "end"), [(0, 0), (3, 7)])
def test_a_range_ends_after_its_last_token(first: int, end: int) -> None:
    assert TokenRange(first, end - first).end == end
