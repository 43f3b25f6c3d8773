"""What was passed on is read as what the client has, and refused where it is anything else."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.resume.errors import UnreadableError
from pdcoord.resume.passed import START, Mark, read_passed
from pdcoord.resume.unresumable import Unresumable

Body = dict[str, Any]
HEAD = {"id": "x", "object": "text_completion", "created": 1, "model": "tiny"}


def event(choice: Body | None, **top: Any) -> bytes:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None} | choice]
    return b"data: " + json.dumps(HEAD | {"choices": choices} | top).encode() + b"\n\n"


def used(prompt: int, done: int) -> Body:
    return {"prompt_tokens": prompt, "completion_tokens": done, "total_tokens": prompt + done}


def test_nothing() -> None:
    seen = read_passed(b": ping\n\n")
    assert (seen.head, seen.text, seen.marks, seen.has_output, seen.is_done) == ({}, "", [], False, False)


def test_a_completion() -> None:
    seen = read_passed(
        event({"text": "Hé", "token_ids": [1, 2], "prompt_token_ids": [9, 9]})
        + event({"text": "", "token_ids": [3]})
        + event({"text": "llo", "token_ids": [4], "finish_reason": "stop"})
        + event(None, usage=used(2, 4))
        + b"data: [DONE]\n\n"
    )
    assert {name: json.loads(bytes(value)) for name, value in seen.head.items()} == HEAD
    assert (seen.text, seen.ids, seen.prompt_ids, seen.prompt_tokens) == ("Héllo", [1, 2, 3, 4], [9, 9], 2)
    assert (seen.finish_reason, seen.has_usage_event, seen.is_done) == ("stop", True, True)
    assert seen.marks == [Mark(2, 2, 0, 1, None, is_merged=True), Mark(5, 4, 0, 3, None)]
    assert seen.tokens_at(seen.marks[0]) == (2, True)


def test_a_chat_of_sglang() -> None:
    delta = {"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}
    seen = read_passed(
        event({"delta": delta, "matched_stop": None}, usage=None) + event({"delta": {"content": "A"}})
    )
    assert (seen.has_role, seen.text, seen.why_not) == (True, "A", None)
    assert seen.tokens_at(seen.marks[0]) == (1, False)


def test_tokens_by_usage_by_logprobs_and_by_events() -> None:
    by_usage = read_passed(event({"text": "a"}, usage=used(3, 2)) + event({"text": "b"}, usage=used(3, 3)))
    assert [by_usage.tokens_at(mark) for mark in (START, *by_usage.marks)] == [
        (0, True),
        (2, True),
        (3, True),
    ]
    assert [mark.is_merged for mark in by_usage.marks] == [True, False]
    # The event without text comes of a stream that broke off: the one after it has its token, and another.
    empty = event({"text": ""}, usage=used(3, 2))
    again = read_passed(
        event({"text": "a"}, usage=used(3, 1)) + empty + event({"text": "é"}, usage=used(3, 3))
    )
    assert [mark.is_merged for mark in again.marks] == [False, True]
    logprobs = {"tokens": ["a", "bc"], "text_offset": [0, 1]}
    by_entries = read_passed(event({"text": "abc", "logprobs": logprobs}))
    assert by_entries.tokens_at(by_entries.marks[0]) == (2, True)
    assert (by_entries.offset_at(START), by_entries.offset_at(by_entries.marks[0])) == (0, 3)
    # The second engine did not say as much as the first.
    mixed = read_passed(event({"text": "a", "token_ids": [1]}) + event({"text": "b"}) + event({"text": ""}))
    assert mixed.tokens_at(mixed.marks[-1]) == (2, False)


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"index": 1, "text": "a"}, Unresumable.MANY_CHOICES),
        ({"delta": {"tool_calls": [{"index": 0}]}}, Unresumable.TOOL_CALLS),
        ({"delta": {"function_call": {"name": "f"}}}, Unresumable.TOOL_CALLS),
        ({"delta": {"reasoning": "hm"}}, Unresumable.REASONING),
        ({"delta": {"reasoning_content": "hm"}}, Unresumable.REASONING),
        ({"delta": {"refusal": "no"}}, Unresumable.UNKNOWN_FIELD),
    ],
)
def test_what_forbids_it(choice: Body, why: Unresumable) -> None:
    seen = read_passed(event(choice))
    assert seen.why_not is why
    assert seen.has_output


def test_an_engine_with_a_parser_is_known_by_ids_without_content() -> None:
    assert read_passed(event({"delta": {}, "token_ids": [1]})).is_parsed
    assert not read_passed(event({"delta": {"content": ""}, "token_ids": [1]})).is_parsed


@pytest.mark.parametrize(
    "raw",
    [
        event({"text": "a"})[:-1],
        event({"text": 3}),
        event({"text": "a"}, error={"message": "died"}),
        event(None).replace(b'"id"', b'"ID"'),
        b"data: [DONE]\n\n" + event({"text": "a"}),
        b"data: \xff\n\n",
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
)
def test_what_cannot_be_read(raw: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_passed(raw)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_bytes_of_any_kind_are_read_or_refused(junk: bytes, at: int) -> None:
    raw = event({"text": "abc", "token_ids": [1], "logprobs": {"tokens": ["a"], "text_offset": [0]}})
    at %= len(raw)
    with contextlib.suppress(UnreadableError):
        read_passed(raw[:at] + junk + raw[at:])


@pytest.mark.parametrize(
    ("choice", "usage", "lost_at"),
    [
        ({"text": ""}, None, 1),
        ({"text": ""}, used(2, 2), 1),
        ({"text": ""}, used(2, 1), None),  # It says itself that no token came.
        ({"delta": {"role": "assistant", "content": ""}}, None, None),
    ],
)
def test_a_token_without_text_is_noted_once_others_follow(
    choice: Body, usage: Body | None, lost_at: int | None
) -> None:
    before = event({"text": "a"}, usage=used(2, 1)) + event(choice, usage=usage)
    assert read_passed(before).lost_at is None
    assert read_passed(before + event({"text": "b"}, usage=used(2, 3))).lost_at == lost_at
    assert read_passed(before + event({"text": "\u00e9"}, usage=used(2, 3))).lost_at is None
    assert read_passed(
        before + event({"text": "b"}) + event({"text": ""}) + event({"text": "c"})
    ).lost_at == (lost_at or 2)
