"""What a prompt hashes to, and what an emulated model answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.sim.text import WORD_FIRST, WORD_TOTAL, decode, encode
from pdcoord.sim.tokens import (
    DRAWN_TOKENS_MAX,
    DRAWN_TOKENS_MIN,
    answer_ids,
    answer_token,
    chain_hashes,
    drawn_length,
    mix,
    prompt_digest,
    read_context,
    root_hash,
)

ids = st.lists(st.integers(0, 2**31 - 1), max_size=100)


@given(ids, st.integers(1, 20))
def test_only_full_blocks_have_a_hash(prompt: list[int], block_tokens: int) -> None:
    hashes = chain_hashes(root_hash("m", ""), prompt, block_tokens)
    assert len(hashes) == len(prompt) // block_tokens
    assert all(len(each) == 32 for each in hashes)
    assert len(set(hashes)) == len(hashes)


@given(ids, ids, ids)
def test_equal_beginnings_have_equal_hashes_and_no_others_do(
    shared: list[int], one: list[int], other: list[int]
) -> None:
    root = root_hash("m", "")
    first, second = chain_hashes(root, shared + one, 4), chain_hashes(root, shared + other, 4)
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        end = 4 * (index + 1)
        assert (a == b) == ((shared + one)[:end] == (shared + other)[:end])


@given(ids, ids)
def test_a_chain_can_be_continued(begin: list[int], rest: list[int]) -> None:
    whole = chain_hashes(root_hash("m", ""), begin + rest, 4)
    cut = len(begin) // 4
    head = whole[:cut]
    parent = head[-1] if head else root_hash("m", "")
    assert head + chain_hashes(parent, (begin + rest)[4 * cut :], 4) == whole


@pytest.mark.parametrize(("model", "salt"), [("other", ""), ("m", "salt"), ("m\0salt", "")])
def test_another_model_or_salt_never_matches(model: str, salt: str) -> None:
    assert root_hash(model, salt) != root_hash("m", "")


@given(ids, st.integers(0, 10_000), st.integers(0, 100))
def test_an_answer_is_made_of_words(prompt: list[int], position: int, choice: int) -> None:
    token = answer_token(prompt_digest(prompt), position, choice)
    assert WORD_FIRST <= token < WORD_FIRST + WORD_TOTAL
    assert token == answer_token(prompt_digest(prompt), position, choice)


def test_answers_differ_by_prompt_choice_and_seed() -> None:
    def answer(seed: int, prompt: list[int], choice: int) -> list[int]:
        content = mix(seed, prompt_digest(prompt))
        return [answer_token(content, position, choice) for position in range(20)]

    answers = [answer(1, [1, 2], 0), answer(2, [1, 2], 0), answer(1, [1, 3], 0), answer(1, [1, 2], 1)]
    assert len({tuple(each) for each in answers}) == 4
    assert all(len(set(each)) > 15 for each in answers)


@given(ids, st.integers(0, 8))
def test_a_drawn_length_is_in_range(prompt: list[int], choice: int) -> None:
    assert DRAWN_TOKENS_MIN <= drawn_length(prompt_digest(prompt), choice) <= DRAWN_TOKENS_MAX


words = st.lists(st.integers(WORD_FIRST, WORD_FIRST + WORD_TOTAL - 1), max_size=8)


@given(ids, words, st.integers(0, 60), st.integers(0, 3))
def test_a_continued_answer_goes_on_by_ids(begin: list[int], end: list[int], cut: int, choice: int) -> None:
    prompt = begin + end
    whole = answer_ids(7, prompt, 60, choice)
    assert answer_ids(7, [*prompt, *whole[:cut]], 60 - cut, choice) == whole[cut:]
    first, then = read_context(7, prompt, choice), read_context(7, [*prompt, *whole[:cut]], choice)
    assert (then.content, then.said) == (first.content, first.said + cut)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1), words, st.integers(0, 60))
def test_a_continued_answer_goes_on_by_text(begin: str, end: list[int], cut: int) -> None:
    prompt = begin + decode(end)
    whole = answer_ids(7, encode(prompt), 60)
    assert answer_ids(7, encode(prompt + decode(whole[:cut])), 60 - cut) == whole[cut:]


@given(ids, st.integers(1, 30), st.integers(0, 29))
def test_words_that_the_model_did_not_say_are_part_of_the_question(
    prompt: list[int], count: int, wrong: int
) -> None:
    answered = list(answer_ids(7, prompt, count))
    at = wrong % count
    answered[at] = WORD_FIRST + (answered[at] - WORD_FIRST + 1) % WORD_TOTAL
    context = read_context(7, [*prompt, *answered], 0)
    # But for the one word in 4,096 that is what the model would say to what stands before it.
    assert context.said < count or context.content != read_context(7, prompt, 0).content
