"""A stream to which nothing is added ends as an engine would have ended it."""

import json
from typing import Any

import pytest

from pdcoord.resume.call import CHAT, COMPLETIONS, read_call
from pdcoord.resume.ending import ending
from pdcoord.resume.passed import read_passed

HEAD = {"id": "x", "object": "o", "created": 1, "model": "tiny"}
DONE = b"data: [DONE]\n\n"


def chunks(path: str, finish: str | None, tokens: int | None, prompt_tokens: int | None) -> list[Any]:
    choice = {"index": 0, "text": "a", "finish_reason": finish}
    seen = read_passed(b"data: " + json.dumps(HEAD | {"choices": [choice]}).encode() + b"\n\n")
    call = read_call(path, b'{"stream":true,"stream_options":{"include_usage":true}}')
    raw = ending(call, seen, tokens, prompt_tokens)
    assert raw.endswith(DONE)
    return [
        json.loads(each.removeprefix(b"data: ")) for each in raw.removesuffix(DONE).split(b"\n\n") if each
    ]


@pytest.mark.parametrize(("path", "empty"), [(CHAT, {"delta": {"content": ""}}), (COMPLETIONS, {"text": ""})])
def test_a_limit_that_was_reached(path: str, empty: dict[str, Any]) -> None:
    finish, usage = chunks(path, None, 5, 7)
    assert {name: finish[name] for name in HEAD} == {name: usage[name] for name in HEAD} == HEAD
    more = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert finish["choices"] == [empty | more]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def test_what_the_client_has_is_not_said_again() -> None:
    (usage,) = chunks(CHAT, "stop", 5, 7)
    assert usage["usage"]["total_tokens"] == 12


@pytest.mark.parametrize(("tokens", "prompt_tokens"), [(None, 7), (5, None)])
def test_a_usage_that_nobody_knows_is_left_out(tokens: int | None, prompt_tokens: int | None) -> None:
    assert chunks(CHAT, "stop", tokens, prompt_tokens) == []
