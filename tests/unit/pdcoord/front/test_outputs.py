"""Tokens of an answer, counted as its bytes pass."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.outputs import OutputCounter, count_kept

TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
ROLE, DONE = b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n', b"data: [DONE]\n\n"


def counted(parts: list[bytes], *, is_stream: bool = True) -> int | None:
    counter = OutputCounter(parts[0], is_stream=is_stream)
    assert [counter(part) for part in parts[1:]] == parts[1:]
    return counter.count()


@given(st.integers(0, 50), st.integers(1, 7))
def test_a_stream_has_an_event_for_each_token(tokens: int, together: int) -> None:
    events = [ROLE, *[TOKEN] * tokens, DONE]
    parts = [b"".join(events[at : at + together]) for at in range(0, len(events), together)]
    assert counted(parts) == tokens


def test_a_stream_that_breaks_off_counts_as_far_as_it_came() -> None:
    assert counted([ROLE + TOKEN, TOKEN]) == 2
    assert counted([TOKEN, TOKEN, DONE]) == 2, "a completion names no role"


@pytest.mark.parametrize("apart", [True, False])
def test_usage_is_exact_where_an_engine_tells_it(*, apart: bool) -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":10,"completion_tokens":7}}\n\n'
    assert counted([ROLE, TOKEN, usage, DONE] if apart else [ROLE, TOKEN, usage + DONE]) == 7


@pytest.mark.parametrize("name", ["completion_tokens", "output_tokens"])
@pytest.mark.parametrize("part_bytes", [100, 10_000])
def test_a_whole_answer_tells_its_usage_behind_its_text(name: str, part_bytes: int) -> None:
    text = 'so long "completion_tokens": 5 ' * 50
    body = json.dumps({"choices": [{"text": text}], "usage": {"prompt_tokens": 9, name: 41}}).encode()
    parts = [body[at : at + part_bytes] for at in range(0, len(body), part_bytes)]
    assert counted(parts, is_stream=False) == 41


@given(st.integers(0, 50), st.booleans())
def test_a_stream_that_was_kept_is_counted_as_if_it_had_been_as_it_passed(
    tokens: int,
    is_whole: bool,  # drawn by hypothesis
) -> None:
    events = [ROLE, *[TOKEN] * tokens, *([DONE] if is_whole else [])]
    assert count_kept(b"".join(events)) == counted(events) == tokens
    assert count_kept(b": alive\n\n".join(events)) == tokens, "a comment is no token"


def test_a_kept_streams_own_usage_is_exact() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'
    assert count_kept(ROLE + TOKEN + usage + DONE) == 7
    assert count_kept(b"") == 0


def test_counting_may_begin_in_the_middle() -> None:
    counter = OutputCounter(TOKEN, is_stream=True, events_before=5)
    counter(TOKEN)
    assert counter.count() == 7


def test_where_nothing_tells_nothing_is_counted() -> None:
    text = json.dumps({"text": '"completion_tokens": 5', "done": True}).encode()
    assert counted([text], is_stream=False) is None
    assert counted([b""]) == 0
