"""Likeness: equal tokens are equal, a tie is a tie, and wrong is wrong."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.likeness import CanaryOutcome, Finding, GreedyAnswer, compare

TOLERANCE = 0.5


def answer(words: str, *logprobs: float, tops: tuple[dict[str, float], ...] = ()) -> GreedyAnswer:
    """An answer of one letter a token."""
    return GreedyAnswer(
        tokens=tuple(ord(word) for word in words),
        words=tuple(words),
        logprobs=logprobs,
        tops=tops or tuple({word: value} for word, value in zip(words, logprobs, strict=False)),
        text=words,
    )


def test_equal_tokens_pass() -> None:
    assert compare(answer("abc"), answer("abc"), TOLERANCE) == Finding(CanaryOutcome.PASSED)


def test_logprobs_of_equal_tokens_may_differ_by_rounding_only() -> None:
    alone = answer("abc", -0.1, -0.2, -0.3)
    assert compare(alone, answer("abc", -0.2, -0.1, -0.4), TOLERANCE).outcome is CanaryOutcome.PASSED
    found = compare(alone, answer("abc", -0.1, -0.9, -0.3), TOLERANCE)
    assert (found.outcome, found.position) == (CanaryOutcome.LOGPROBS, 1)


@pytest.mark.parametrize(
    ("gap", "other_gap", "outcome"),
    [
        (0.1, 0.2, CanaryOutcome.PASSED),
        (0.1, 3.0, CanaryOutcome.TOKENS),
        (3.0, 0.1, CanaryOutcome.TOKENS),
        (float("nan"), 0.1, CanaryOutcome.TOKENS),
    ],
)
def test_a_tie_needs_both_engines_to_be_of_two_minds(
    gap: float, other_gap: float, outcome: CanaryOutcome
) -> None:
    alone = answer("ab", -0.1, -0.7, tops=({"a": -0.1}, {"b": -0.7, "x": -0.7 - gap}))
    # What comes behind the tie differs, and is not looked at.
    split = answer("ax", -0.1, -0.6, tops=({"a": -0.1}, {"x": -0.6, "b": -0.6 - other_gap}))
    found = compare(alone, split, TOLERANCE)
    assert (found.outcome, found.position) == (outcome, 1)


def test_a_token_that_the_other_engine_does_not_list_is_no_tie() -> None:
    found = compare(answer("a", -0.1), answer("b", -0.1), TOLERANCE)
    assert (found.outcome, found.position) == (CanaryOutcome.TOKENS, 0)
    assert compare(answer("a"), answer("b"), TOLERANCE).outcome is CanaryOutcome.TOKENS


def test_what_passed_says_how_far_apart_it_was() -> None:
    alone, split = answer("abc", -0.1, -0.2, -0.3), answer("abc", -0.2, -0.45, -0.4)
    assert compare(alone, split, TOLERANCE).detail == "logprobs at most 0.25 apart"
    alone = answer("ab", -0.1, -0.7, tops=({"a": -0.1}, {"b": -0.7, "x": -0.8}))
    split = answer("ax", -0.3, -0.6, tops=({"a": -0.3}, {"x": -0.6, "b": -0.8}))
    found = compare(alone, split, TOLERANCE)
    assert found.detail == "a tie: 0.1 and 0.2 apart, within 0.5; logprobs at most 0.2 apart"


def test_a_shorter_answer_is_another_one() -> None:
    found = compare(answer("abc"), answer("ab"), TOLERANCE)
    assert (found.outcome, found.position) == (CanaryOutcome.TOKENS, 2)


def test_without_tokens_texts_are_compared() -> None:
    alone = GreedyAnswer(text="one")
    assert compare(alone, GreedyAnswer(text="one"), TOLERANCE).outcome is CanaryOutcome.PASSED
    assert compare(alone, GreedyAnswer(text="two"), TOLERANCE).outcome is CanaryOutcome.TOKENS
    assert compare(alone, answer("one"), TOLERANCE).outcome is CanaryOutcome.PASSED


def test_where_tokens_are_numbers_in_one_answer_only_texts_are_compared() -> None:
    alone = GreedyAnswer(tokens=("o", "ne"), text="one")
    assert compare(alone, GreedyAnswer(tokens=(7, 8), text="one"), TOLERANCE).outcome is CanaryOutcome.PASSED
    assert compare(alone, GreedyAnswer(tokens=(7, 8), text="two"), TOLERANCE).outcome is CanaryOutcome.TOKENS


def test_only_what_failed_is_a_failure() -> None:
    good = {CanaryOutcome.PASSED, CanaryOutcome.INCONCLUSIVE, CanaryOutcome.UNPROVEN}
    assert {outcome for outcome in CanaryOutcome if not outcome.is_failure} == good


_WORDS = st.text("abcd", min_size=1, max_size=8)
_LOGPROB = st.floats(-5.0, 0.0)


@given(_WORDS, st.data(), st.floats(0.0, 2.0))
def test_an_answer_equals_itself_whatever_the_tolerance(words: str, data: st.DataObject, tol: float) -> None:
    logprobs = data.draw(st.lists(_LOGPROB, min_size=len(words), max_size=len(words)))
    same = answer(words, *logprobs)
    assert compare(same, same, tol).outcome is CanaryOutcome.PASSED


@given(_WORDS, _WORDS)
def test_without_logprobs_only_equal_answers_pass(one: str, other: str) -> None:
    found = compare(answer(one), answer(other), TOLERANCE)
    assert (found.outcome is CanaryOutcome.PASSED) == (one == other)
    assert one not in found.detail.split()
    swapped = compare(answer(other), answer(one), TOLERANCE)
    assert (swapped.outcome, swapped.position) == (found.outcome, found.position)


def test_a_finding_never_says_what_was_answered() -> None:
    secret = replace(answer("s", -0.1), words=("secret",), text="secret")
    found = compare(secret, replace(answer("t", -0.1), words=("other",), text="other"), TOLERANCE)
    assert "secret" not in found.detail
    assert "other" not in found.detail.replace("the other's", "")
