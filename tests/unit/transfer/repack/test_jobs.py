"""Orders are understood, and refused before anything is written."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.errors import LayoutError
from transfer.layout import GroupShape, HeadRange, KvLayout, LayerScales, Order, RankLayout
from transfer.repack.arrangement import Span
from transfer.repack.jobs import (
    MISSING,
    Run,
    check_place,
    is_wholly,
    pack_job,
    runs_of,
    scales_of,
    split,
    unpack_job,
)
from transfer.session.vocabulary import Slot, Unpack

UNTIMED = settings(deadline=None)

SHAPE = GroupShape(2, 8, 16, 16)
WINDOW = replace(SHAPE, window_tokens=32)
LAYOUT = RankLayout(KvLayout(16, tensor_parallel=2), 1, (SHAPE, WINDOW))
PART = PartShape(Form.TOKENS, 0, HeadRange(4, 4), TokenRange(0, 40))
TABLES = ((1, 2, 3), (0, -1, 5))


def unpack_order(part: PartShape = PART, **changes: object) -> Unpack:
    length = part_bytes(part, SHAPE, LAYOUT.layout)
    plain = Unpack("r", 0, part, LAYOUT, 0, length, bytes(16), TABLES, part.tokens)
    return replace(plain, **changes)


def slot(part: PartShape = PART) -> Slot:
    return Slot(part, 0, part_bytes(part, SHAPE, LAYOUT.layout))


@UNTIMED
@given(
    st.lists(st.integers(-1, 9), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 30),
    st.integers(0, 30),
)
def test_runs_name_each_token_once_and_its_block(table: list[int], size: int, first: int, count: int) -> None:
    count = min(count, len(table) * size - first)
    if count < 0:
        return
    runs = runs_of(table, TokenRange(first, count), size)
    seen = [
        (token, run.block + (run.skip + token - run.tokens.first) // size if run.block else MISSING)
        for run in runs
        for token in range(run.tokens.first, run.tokens.end)
    ]
    assert seen == [(token, max(table[token // size], 0)) for token in range(first, first + count)]
    for run, following in pairwise(runs):
        assert run.block_count == -(-(run.skip + run.tokens.count) // size)
        assert following.block != run.block + run.block_count or run.block == MISSING


@UNTIMED
@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 30), st.sampled_from([MISSING, 3]))
def test_a_split_run_has_the_same_tokens_and_whole_blocks_apart(
    size: int, skip: int, count: int, block: int
) -> None:
    run = Run(TokenRange(100, count), block, -(-(skip % size + count) // size), skip % size)
    parts = split(run, size)
    assert [token for part in parts for token in range(part.tokens.first, part.tokens.end)] == list(
        range(100, 100 + count)
    )
    for part in parts:
        assert is_wholly(part, size) or part.block_count == 1
        assert part.block == (block and block + (part.tokens.first - 100 + run.skip) // size)
        assert part.skip == (part.tokens.first - 100 + run.skip) % size
    assert len(parts) <= 3


def test_a_pack_job_counts_heads_from_the_ranks_first() -> None:
    job = pack_job(LAYOUT, slot(replace(PART, heads=HeadRange(6, 2))), TABLES, 10)
    assert job.heads == Span(2, 2)
    assert job.runs == (Run(TokenRange(0, 40), 1, 3, 0),)


def test_an_unpack_job_takes_the_heads_that_both_have() -> None:
    source = RankLayout(KvLayout(8), 0, (SHAPE, WINDOW))
    part = replace(PART, heads=HeadRange(2, 4))
    length = part_bytes(part, SHAPE, source.layout)
    job = unpack_job(
        LAYOUT, unpack_order(part, source=source, length_bytes=length, tokens=TokenRange(20, 10)), 10
    )
    assert (job.heads, job.part_heads) == (Span(0, 2), Span(2, 2))
    assert job.runs == (Run(TokenRange(20, 10), 2, 1, 4),)


def test_scales_are_ones_where_none_are_given() -> None:
    assert scales_of(LAYOUT, 0) == (LayerScales(), LayerScales())


def test_missing_blocks_are_runs_of_their_own_in_a_windowed_group() -> None:
    job = pack_job(LAYOUT, slot(replace(PART, group=1)), TABLES, 10)
    assert [(run.block, run.tokens.count) for run in job.runs] == [(MISSING, 32), (5, 8)]
    with pytest.raises(LayoutError, match="no window"):
        pack_job(LAYOUT, slot(), ((1, 0, 2), ()), 10)


PAGES = replace(PART, form=Form.PAGES)


@pytest.mark.parametrize(
    ("message", "order"),
    [
        ("group", unpack_order(shape=replace(PART, group=3))),
        ("groups", unpack_order(source=replace(LAYOUT, groups=(replace(SHAPE, key_dim=8), WINDOW)))),
        ("heads", unpack_order(shape=replace(PART, heads=HeadRange(2, 4)))),
        ("heads", unpack_order(shape=replace(PART, heads=HeadRange(0, 4)), source=replace(LAYOUT, rank=0))),
        ("heads", unpack_order(shape=replace(PART, heads=HeadRange(5, 0)))),
        ("length_bytes", unpack_order(length_bytes=100)),
        ("tokens", unpack_order(tokens=TokenRange(30, 11))),
        ("tables", unpack_order(tables=((1, 2), ()))),
        ("block ids below", unpack_order(tables=((1, 2, 10), ()))),
        ("a table for group", unpack_order(tables=())),
        ("no window", unpack_order(tables=((1, 2, -7), ()))),
        (
            "layouts differ",
            unpack_order(PAGES, source=replace(LAYOUT, layout=KvLayout(16, Order.HND, tensor_parallel=2))),
        ),
        ("scales differ", unpack_order(PAGES, source=replace(LAYOUT, scales=((LayerScales(2.0),) * 2,) * 2))),
        ("first token on", unpack_order(replace(PAGES, tokens=TokenRange(8, 16)))),
        ("from 0 on", unpack_order(replace(PART, tokens=TokenRange(-8, 16)))),
        ("from 0 on", unpack_order(replace(PART, tokens=TokenRange(0, -1)))),
    ],
)
def test_an_unpack_that_does_not_fit_is_refused(message: str, order: Unpack) -> None:
    with pytest.raises(LayoutError, match=message):
        unpack_job(LAYOUT, order, 10)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("heads", Slot(replace(PART, heads=HeadRange(3, 2)), 0, 100)),
        ("length_bytes", Slot(PART, 0, 7)),
        ("group", Slot(replace(PART, group=-1), 0, 0)),
        ("all heads", slot(replace(PAGES, heads=HeadRange(4, 2)))),
        ("tables", slot(replace(PART, tokens=TokenRange(40, 9)))),
    ],
)
def test_a_slot_that_does_not_fit_is_refused(message: str, wrong: Slot) -> None:
    with pytest.raises(LayoutError, match=message):
        pack_job(LAYOUT, wrong, TABLES, 10)


@pytest.mark.parametrize(("offset", "length"), [(-1, 4), (97, 4), (0, 101)])
def test_a_place_outside_staging_is_refused(offset: int, length: int) -> None:
    check_place("offset", 96, 4, 100)
    with pytest.raises(LayoutError, match="offset"):
        check_place("offset", offset, length, 100)
