"""Digests differ where what they prove differs, and are the same on every machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.digest import DIGEST_BYTES, part_digest, pattern, prompt_hash

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def test_digests_are_what_their_algorithms_give() -> None:
    """Recorded from xxhash 3.6 and hashlib: a peer of another build must agree."""
    assert part_digest(b"kv").hex() == "d6a58aea7a222d41315ea5777716fb9e"
    assert prompt_hash([1, 2, 3]).hex() == "ac361717a765875b2e66f7c722472abe"
    assert prompt_hash([1, 2, 3], ["lora"]).hex() == "7bf55bb6f0fde58dcd3eca2a2820c5d5"
    assert pattern("probe", 4).hex() == "633e0a56"


@given(st.binary(min_size=1, max_size=64), st.integers(0, 63), st.integers(1, 255))
def test_one_changed_byte_changes_the_digest_of_a_part(data: bytes, at: int, change: int) -> None:
    changed = bytearray(data)
    changed[at % len(data)] ^= change
    assert part_digest(data) != part_digest(changed)
    assert part_digest(data) == part_digest(bytearray(data)) == part_digest(memoryview(data))
    assert len(part_digest(data)) == DIGEST_BYTES


@given(token_lists, token_lists, st.lists(st.text(), max_size=3), st.lists(st.text(), max_size=3))
def test_prompts_that_differ_in_anything_have_unlike_hashes(
    one: list[int], two: list[int], extra: list[str], other: list[str]
) -> None:
    is_equal = (one, extra) == (two, other)
    assert (prompt_hash(one, extra) == prompt_hash(two, other)) == is_equal
    assert len(prompt_hash(one, extra)) == DIGEST_BYTES


def test_texts_do_not_run_into_each_other_or_into_the_tokens() -> None:
    assert len({prompt_hash([], texts) for texts in (["ab"], ["a", "b"], ["", "ab"], ["ba"])}) == 4
    assert prompt_hash([97], []) != prompt_hash([], ["a"])


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_no_vocabulary_has_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        prompt_hash([token])


@given(st.text(max_size=8), st.integers(0, 300))
def test_a_pattern_is_as_long_as_asked_and_begins_alike(seed: str, length: int) -> None:
    assert len(pattern(seed, length)) == length
    assert pattern(seed, 300)[:length] == pattern(seed, length)
