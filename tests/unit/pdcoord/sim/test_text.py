"""The tokenizer of emulated models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.openai import TOKEN_ID_MAX
from pdcoord.sim.text import (
    WORD_FIRST,
    WORD_TOTAL,
    UnknownTokenError,
    decode,
    encode,
    piece,
    read,
    said,
    word,
)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text: str) -> None:
    ids = encode(text)
    assert decode(ids) == text
    assert all(0 <= each <= TOKEN_ID_MAX for each in ids)


@given(st.text(alphabet=st.characters(codec="ascii", exclude_characters="\0"), min_size=1))
def test_ascii_takes_a_token_for_four_bytes(text: str) -> None:
    assert len(text) / 4 <= len(encode(text)) <= len(text) // 4 + 2


@given(st.text(), st.text(), st.text())
def test_a_shared_beginning_stays_shared(begin: str, one: str, other: str) -> None:
    shared = encode(begin)
    whole = max(0, len(shared) - 3)  # The tail may be cut differently once something follows it.
    assert encode(begin + one)[:whole] == encode(begin + other)[:whole] == shared[:whole]


def test_lone_surrogates_do_not_break_it() -> None:
    assert decode(encode("a\ud800b")).startswith("a")


def test_words_are_distinct_and_read_as_text() -> None:
    words = [word(token_id) for token_id in range(WORD_FIRST, WORD_FIRST + WORD_TOTAL)]
    assert len(set(words)) == WORD_TOTAL
    assert all(each.startswith(" ") and each[1:].isalpha() for each in words)
    assert decode([WORD_FIRST, WORD_FIRST + 1]) == word(WORD_FIRST) + word(WORD_FIRST + 1)


@pytest.mark.parametrize("token_id", [-1, WORD_FIRST + WORD_TOTAL, 2**17, 2**24 - 1, 2**31])
def test_an_id_in_no_range_is_refused(token_id: int) -> None:
    with pytest.raises(UnknownTokenError, match=str(token_id)):
        piece(token_id)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 20))
def test_a_model_reads_one_text_however_it_was_cut(text: str, cut: int) -> None:
    assert read(encode(text)) == text.encode()
    assert read(encode(text[:cut]) + encode(text[cut:])) == text.encode()


@given(st.lists(st.integers(0, TOKEN_ID_MAX), max_size=20), st.lists(st.integers(4_352, 65_535), max_size=3))
def test_ids_of_no_text_are_read_too(ids: list[int], unknown: list[int]) -> None:
    assert read([*ids, *unknown, 65]) != read([*ids, *unknown, 66])
    assert read([*ids, 4_352]) != read([*ids, 4_353])


@given(st.lists(st.integers(WORD_FIRST, WORD_FIRST + WORD_TOTAL - 1), max_size=20))
def test_words_at_the_end_are_told_last_first(words: list[int]) -> None:
    end = b"".join(map(piece, words))
    assert list(said(b"Tell me:" + end)) == words[::-1]
    assert list(said(end)) == words[::-1]
    assert list(said(end + b".")) == []


@given(st.lists(st.integers(WORD_FIRST, WORD_FIRST + WORD_TOTAL - 1), max_size=20))
def test_an_answer_by_itself_has_the_ids_that_it_was_said_in(words: list[int]) -> None:
    assert encode(decode(words)) == words
