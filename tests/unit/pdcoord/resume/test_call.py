"""A call is read as the engine reads it, and what forbids a continuation is found under every name."""

import json
from typing import Any

import pytest

from pdcoord.resume.call import CHAT, COMPLETIONS, Call, read_call, why_not
from pdcoord.resume.errors import UnreadableError
from pdcoord.resume.unresumable import Unresumable


def call(path: str = COMPLETIONS, **fields: Any) -> Call:
    return read_call(path, json.dumps({"stream": True} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"use_beam_search": True}, Unresumable.BEAM_SEARCH),
        ({"echo": True}, Unresumable.ECHO),
        ({"prompt_logprobs": 1}, Unresumable.ECHO),
        ({"suffix": "end"}, Unresumable.SUFFIX),
        ({"frequency_penalty": 0.1}, Unresumable.PENALTIES),
        ({"presence_penalty": -0.1}, Unresumable.PENALTIES),
        ({"bad_words": ["no"]}, Unresumable.OUTPUT_HISTORY),
        ({"repetition_detection": {"max_pattern_size": 4}}, Unresumable.OUTPUT_HISTORY),
        ({"stop_regex": "a+"}, Unresumable.OUTPUT_HISTORY),
        ({"logits_processors": ["f"]}, Unresumable.LOGITS_PROCESSORS),
        ({"custom_logit_processor": "f"}, Unresumable.LOGITS_PROCESSORS),
        ({"vllm_xargs": {"a": 1}}, Unresumable.LOGITS_PROCESSORS),
        ({"truncate_prompt_tokens": -1}, Unresumable.TRUNCATED_PROMPT),
        ({"prompt_embeds": "AAAA"}, Unresumable.PROMPT_EMBEDS),
        ({"response_format": {"type": "json_object"}}, Unresumable.GUIDED_DECODING),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, Unresumable.GUIDED_DECODING),
        ({"response_format": {"type": "structural_tag"}}, Unresumable.GUIDED_DECODING),
        ({"guided_json": {}, "guided_regex": "a"}, Unresumable.GUIDED_DECODING),
        ({"guided_choice": ["a"]}, Unresumable.GUIDED_DECODING),
        ({"structured_outputs": {"grammar": "x"}}, Unresumable.GUIDED_DECODING),
        ({"regex": "a"}, Unresumable.GUIDED_DECODING),
        ({"ebnf": "a"}, Unresumable.GUIDED_DECODING),
        ({"json_schema": "{}"}, Unresumable.GUIDED_DECODING),
        ({"tool_choice": "required"}, Unresumable.GUIDED_DECODING),
        ({"tool_choice": {"type": "function"}}, Unresumable.GUIDED_DECODING),
        ({"function_call": {"name": "f"}}, Unresumable.GUIDED_DECODING),
        ({"reasoning_effort": "low"}, Unresumable.REASONING),
        ({"thinking_token_budget": 10}, Unresumable.REASONING),
        ({"thinking": {"type": "enabled"}}, Unresumable.REASONING),
        ({"include_reasoning": False}, Unresumable.REASONING),
        ({"chat_template_kwargs": {"enable_thinking": True}}, Unresumable.REASONING),
        ({"chat_template_kwargs": {"thinking_mode": "thinking"}}, Unresumable.REASONING),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, Unresumable.REASONING),
        ({"chat_template_kwargs": {"thinking": {"type": "enabled"}}}, Unresumable.REASONING),
        ({"chat_template_kwargs": {"thinking": {"budget_tokens": 9}}}, Unresumable.REASONING),
        ({"never_heard_of": 1}, Unresumable.UNKNOWN_FIELD),
    ],
)
def test_what_forbids_it(fields: dict[str, Any], why: Unresumable) -> None:
    assert why_not(call(CHAT, messages=[], **fields)) is why


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.2},
        {
            "echo": False,
            "suffix": None,
            "prompt_logprobs": None,
            "bad_words": [],
            "truncate_prompt_tokens": None,
        },
        {"response_format": {"type": "text"}, "tool_choice": "auto", "tools": [{"type": "function"}]},
        {"seed": 7, "temperature": 0.7, "top_p": 0.9, "stop": ["a"], "logit_bias": {"1": 2}, "user": "u"},
        {"chat_template_kwargs": {"enable_thinking": False}, "never_heard_of": None, "nor_of_this": False},
        {"chat_template_kwargs": {"thinking_mode": "chat", "reasoning_effort": "None", "thinking": ""}},
        {"chat_template_kwargs": {"thinking": {"type": "disabled"}, "thinking_budget": 0, "custom": True}},
    ],
)
def test_what_does_not(fields: dict[str, Any]) -> None:
    assert why_not(call(CHAT, messages=[], **fields)) is None


@pytest.mark.parametrize(
    ("path", "fields", "limit"),
    [
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": None}, 16),
        (COMPLETIONS, {"max_tokens": 5, "max_completion_tokens": 2}, 5),
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
    ],
)
def test_limits(path: str, fields: dict[str, Any], limit: int | None) -> None:
    assert call(path, **fields).limit == limit


@pytest.mark.parametrize(
    ("fields", "stops", "held"),
    [
        ({}, (), 0),
        ({"stop": None}, (), 0),
        ({"stop": "abc"}, ("abc",), 2),
        ({"stop": ["a", "abcd"]}, ("a", "abcd"), 3),
        ({"stop": ["abcd"], "include_stop_str_in_output": True}, ("abcd",), 0),
    ],
)
def test_stop_strings(fields: dict[str, Any], stops: tuple[str, ...], held: int) -> None:
    got = call(**fields)
    assert (got.stops, got.held_chars) == (stops, held)


@pytest.mark.parametrize(
    ("fields", "is_many"),
    [
        ({}, False),
        ({"n": 1, "best_of": None}, False),
        ({"n": 2}, True),
        ({"best_of": 2}, True),
        ({"n": [2]}, True),
        ({"prompt": ["a"]}, False),
        ({"prompt": ["a", "b"]}, True),
        ({"prompt": [1, 2]}, False),
        ({"prompt": [[1], [2]]}, True),
    ],
)
def test_many_answers(fields: dict[str, Any], is_many: bool) -> None:
    assert call(**fields).has_many_answers is is_many


@pytest.mark.parametrize(
    ("prompt", "ids"), [("a", None), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), (["a"], None), ([], None)]
)
def test_prompt_of_ids(prompt: Any, ids: list[int] | None) -> None:
    assert call(prompt=prompt).prompt_ids == ids


def test_media_and_tools() -> None:
    text = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    assert not call(CHAT, messages=text).has_media()
    assert call(CHAT, messages=[{"content": [{"type": "image_url"}]}]).has_media()
    assert call(CHAT, tools=[{}]).may_call_tools
    assert not call(CHAT, tools=[{}], tool_choice="none").may_call_tools


@pytest.mark.parametrize(
    ("fields", "is_greedy"), [({}, False), ({"temperature": None}, False), ({"temperature": 0.0}, True)]
)
def test_greedy(fields: dict[str, Any], is_greedy: bool) -> None:
    assert call(**fields).is_greedy is is_greedy


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b'{"stop":[1]}', b'{"max_tokens":"5"}', b'{"stop":7}']
)
def test_what_cannot_be_read(raw: bytes) -> None:
    with pytest.raises(UnreadableError):
        read_call(COMPLETIONS, raw)
