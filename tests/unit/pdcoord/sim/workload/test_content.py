"""Two contents share a key exactly where their tokens are the same up to there."""

from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.workload.content import Content, chained

KEY = 4
parts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 11)), max_size=5)


def content(pieces: list[tuple[int, int]]) -> Content:
    made = Content(KEY)
    for part, token_count in pieces:
        made = made.then(part, token_count)
    return made


def tokens(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same written out: a token is a part's name and its place in it."""
    return [(part, place) for part, token_count in pieces for place in range(token_count)]


@given(parts, parts)
def test_keys_are_equal_exactly_where_the_prefixes_are(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    first, second = content(one), content(other)
    mine, theirs = tokens(one), tokens(other)
    assert first.token_count == len(mine)
    assert len(first.keys) == len(mine) // KEY
    for place, (a, b) in enumerate(zip(first.keys, second.keys, strict=False), 1):
        assert (a == b) == (mine[: place * KEY] == theirs[: place * KEY])
    assert len(set(first.keys)) == len(first.keys)


@given(parts, st.integers(0, 9), st.integers(0, 50))
def test_what_is_added_changes_nothing_before_it(
    pieces: list[tuple[int, int]], part: int, token_count: int
) -> None:
    before = content(pieces)
    after = before.then(part, token_count)
    assert after.keys[: len(before.keys)] == before.keys
    assert all(0 <= key < 1 << 64 for key in after.keys)


ids = st.lists(st.integers(0, 3), max_size=5)


@given(ids, ids, st.sampled_from([64, 128, 512]), st.integers(0, 511), st.integers(0, 511))
def test_ids_of_blocks_make_chained_keys(
    one: list[int], other: list[int], key_tokens: int, missing: int, missing_too: int
) -> None:
    lengths = [max(0, 512 * len(each) - short) for each, short in ((one, missing), (other, missing_too))]
    first, second = (
        chained(tuple(each), 512, length, key_tokens)
        for each, length in zip((one, other), lengths, strict=True)
    )
    assert [len(first), len(second)] == [length // key_tokens for length in lengths]
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        blocks = place * key_tokens // 512 + 1
        assert (a == b) == (one[:blocks] == other[:blocks])
