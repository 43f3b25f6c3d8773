"""What a load needs, and what of an offer it believes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.errors import LayoutError
from transfer.layout import GroupShape, HeadRange, KvLayout, RankLayout
from transfer.session.loads import Coverage, Feed, Need, needs_of
from transfer.session.vocabulary import Source, StagedPart

GROUPS = (GroupShape(2, 4, 8, 8), GroupShape(1, 4, 8, 8, window_tokens=16))
PRODUCER = RankLayout(KvLayout(16, tensor_parallel=2), 1, GROUPS)
CONSUMER = RankLayout(KvLayout(32), 0, GROUPS)
FEED = Feed.of(Source("s", PRODUCER, 1, staging_bytes=1 << 20))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 40), st.integers(1, 15))))
def test_a_token_of_a_head_is_covered_once(steps: list[tuple[int, int, int, int]]) -> None:
    coverage, model = Coverage(), set[tuple[int, int]]()
    for first_head, head_count, first, count in steps:
        heads, tokens = HeadRange(first_head, head_count), TokenRange(first, count)
        asked = {(h, t) for h in range(first_head, heads.end) for t in range(first, tokens.end)}
        assert coverage.add(0, heads, tokens) is not bool(asked & model)
        if not asked & model:
            model |= asked
    assert coverage.add(1, HeadRange(0, 5), TokenRange(0, 60)), "groups are apart"


def test_a_load_needs_every_token_whose_block_is_kept() -> None:
    needs = needs_of(CONSUMER, TokenRange(10, 80), ((1, 2, 3), (0, -1, 5)))
    assert needs == (
        Need(HeadRange(0, 4), (TokenRange(10, 80),)),
        Need(HeadRange(0, 4), (TokenRange(64, 26),)),
    )
    assert needs[1].count == 26 * 4
    assert needs[0].within(TokenRange(80, 100)) == (TokenRange(80, 10),)
    with pytest.raises(LayoutError, match="tables is 2"):
        needs_of(CONSUMER, TokenRange(10, 80), ((1, 2), (0, -1, 5)))
    with pytest.raises(LayoutError, match="tables is 1"):
        needs_of(CONSUMER, TokenRange(10, 80), ((1, 2, 3),))


def sound() -> StagedPart:
    shape = PartShape(Form.TOKENS, 0, HeadRange(2, 2), TokenRange(16, 32))
    return StagedPart(shape, 4096, part_bytes(shape, GROUPS[0], PRODUCER.layout), b"d" * 16)


def test_a_sound_part_has_no_fault() -> None:
    assert FEED.fault(sound(), CONSUMER, 64) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"group": 2}, "group 2"),
        ({"group": -1}, "group -1"),
        ({"heads": HeadRange(0, 2)}, "not staged"),
        ({"heads": HeadRange(2, 3)}, "not staged"),
        ({"heads": HeadRange(2, 0)}, "not staged"),
        ({"tokens": TokenRange(48, 17)}, "tokens 48..65"),
        ({"tokens": TokenRange(-1, 5)}, "tokens -1"),
        ({"tokens": TokenRange(5, 0)}, "tokens 5..5"),
        ({"tokens": TokenRange(16, 31)}, "bytes for a part"),
        ({"form": Form.PAGES}, "pages of another layout"),
    ],
)
def test_a_part_that_is_not_what_its_source_stages_is_malformed(change: dict[str, object], told: str) -> None:
    part = sound()
    bad = replace(part, shape=replace(part.shape, **change))
    assert told in FEED.fault(bad, CONSUMER, 64)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"offset": (1 << 20) - 100}, "of 1048576"),
        ({"offset": -256}, "bytes -256"),
        ({"length_bytes": 1}, "1 bytes for"),
        ({"length_bytes": 1 << 62}, "bytes for"),
        ({"digest": b"short"}, "digest"),
    ],
)
def test_a_part_outside_its_memory_is_malformed(change: dict[str, object], told: str) -> None:
    assert told in FEED.fault(replace(sound(), **change), CONSUMER, 64)


def test_pages_are_only_taken_from_an_equal_layout_and_from_a_block_on() -> None:
    own = RankLayout(KvLayout(16), 0, GROUPS)
    feed = Feed.of(Source("s", own, 1, staging_bytes=1 << 20))
    shape = PartShape(Form.PAGES, 0, HeadRange(0, 4), TokenRange(16, 20))
    part = StagedPart(shape, 0, part_bytes(shape, GROUPS[0], own.layout), b"d" * 16)
    assert feed.fault(part, own, 64) == ""
    assert "another layout" in feed.fault(part, CONSUMER, 64)
    inside = replace(part, shape=replace(shape, tokens=TokenRange(17, 20)))
    assert "inside a block" in feed.fault(inside, own, 64)
    fewer = replace(part, shape=replace(shape, heads=HeadRange(0, 2)))
    assert "other heads" in feed.fault(fewer, own, 64)
