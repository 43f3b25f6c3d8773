"""What is staged of a prompt, and in which pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.canonical import Form, TokenRange
from transfer.errors import LayoutError
from transfer.layout import GroupShape, HeadRange, KvLayout, RankLayout
from transfer.plan import staged_heads
from transfer.session.cutting import Cutter, kept_runs


def cutter(*groups: GroupShape, block_tokens: int = 16, head_runs: int = 1, chunk: int = 32) -> Cutter:
    layout = RankLayout(KvLayout(block_tokens), 0, groups)
    return Cutter(layout, staged_heads(layout), chunk, head_runs, window_slack_tokens=16)


@given(
    st.integers(0, 100),
    st.integers(0, 100),
    st.lists(st.integers(-1, 2), min_size=60, max_size=60),
    st.sampled_from([1, 4, 16]),
)
def test_kept_runs_are_the_tokens_of_kept_blocks(
    first: int, count: int, table: list[int], block: int
) -> None:
    if count and first + count > block * len(table):
        with pytest.raises(LayoutError, match="tables"):
            kept_runs(TokenRange(first, count), table, block)
        return
    runs = kept_runs(TokenRange(first, count), table, block)
    kept = [t for run in runs for t in range(run.first, run.end)]
    assert kept == [t for t in range(first, first + count) if table[t // block] > 0]
    assert all(a.end < b.first for a, b in pairwise(runs)), "runs are as long as can be"


@given(st.integers(0, 500), st.integers(0, 500), st.sampled_from(list(Form)), st.sampled_from([3, 16, 100]))
def test_pieces_follow_each_other_and_are_cut_at_multiples(
    first: int, count: int, form: Form, chunk: int
) -> None:
    own = cutter(GroupShape(1, 1, 4, 4), chunk=chunk)
    pieces = own.pieces(form, first, first + count)
    assert [t for p in pieces for t in range(p.first, p.end)] == list(range(first, first + count))
    size = chunk if form is Form.TOKENS else max(chunk // 16, 1) * 16
    assert all(0 < p.count <= size for p in pieces)
    assert all(p.first % size == 0 for p in pieces[1:])


def test_parts_are_cut_by_runs_of_heads_and_groups() -> None:
    own = cutter(GroupShape(2, 4, 8, 8), GroupShape(1, 2, 8, 8), head_runs=2)
    shapes = own.shapes(Form.TOKENS, TokenRange(0, 20), ((1, 2), (3, 4)), 20)
    assert [(s.group, s.heads) for s in shapes] == [
        (0, HeadRange(0, 2)),
        (0, HeadRange(2, 2)),
        (1, HeadRange(0, 1)),
        (1, HeadRange(1, 1)),
    ]
    pages = own.shapes(Form.PAGES, TokenRange(0, 20), ((1, 2), (3, 4)), 20)
    assert [(s.group, s.heads) for s in pages] == [(0, HeadRange(0, 4)), (1, HeadRange(0, 2))]


def test_of_a_sliding_window_only_kept_blocks_near_its_end_are_staged() -> None:
    own = cutter(GroupShape(1, 1, 8, 8, window_tokens=32))
    tables = (tuple(range(1, 8)),)
    # 112 tokens, a window of 32 and a slack of 16: from token 64 on.
    assert own.shapes(Form.TOKENS, TokenRange(0, 64), tables, 112) == []
    [part] = own.shapes(Form.TOKENS, TokenRange(32, 64), tables, 112)
    assert part.tokens == TokenRange(64, 32)
    gone = ((0, 0, 0, 0, 0, 6, 7),)
    [part] = own.shapes(Form.TOKENS, TokenRange(64, 48), gone, 112)
    assert part.tokens == TokenRange(80, 32)


def test_bytes_needed_is_the_sum_of_all_parts() -> None:
    own = cutter(GroupShape(2, 4, 8, 8), GroupShape(1, 1, 8, 0, window_tokens=20), head_runs=2)
    tables = (tuple(range(1, 9)), tuple(range(1, 9)))
    shapes = [s for p in own.pieces(Form.TOKENS, 0, 120) for s in own.shapes(Form.TOKENS, p, tables, 120)]
    by_group = [sum(s.tokens.count * s.heads.count for s in shapes if s.group == g) for g in range(2)]
    assert own.bytes_needed(Form.TOKENS, 120) == by_group[0] * 2 * 16 * 2 + by_group[1] * 8 * 2


def test_a_missing_table_is_refused() -> None:
    own = cutter(GroupShape(2, 4, 8, 8), GroupShape(1, 1, 8, 0))
    with pytest.raises(LayoutError, match="tables is 1"):
        own.shapes(Form.TOKENS, TokenRange(0, 16), ((1,),), 16)
