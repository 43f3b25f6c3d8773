"""Questions to a server that tokenizes, and what is made of its answers."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.feeds.rendering import (
    TOKENIZE,
    has_media,
    is_truncated,
    read_ids,
    render_question,
    tokenize_question,
)
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.openai import APIS, Call, parse_call

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def parse(path: str, **body: Any) -> Call:
    return parse_call(APIS[path], json.dumps({"model": "alias", **body}).encode())


def asked(call: Call, prompt: str | None = None) -> Any:
    question = tokenize_question(call, "org/model", prompt)
    return None if question is None else json.loads(question)


def test_a_prompt_is_asked_for_as_it_is() -> None:
    call = parse(COMPLETION, prompt=["text"], max_tokens=3, add_special_tokens=False)
    assert asked(call, "text") == {"model": "org/model", "prompt": "text", "add_special_tokens": False}


def test_a_chat_is_asked_for_with_what_its_template_reads() -> None:
    call = parse(
        CHAT,
        messages=HELLO,
        tools=[{"type": "function"}],
        temperature=0.5,
        stream=True,
        continue_final_message=True,
        add_generation_prompt=False,
        chat_template_kwargs={"a": 1},
    )
    assert asked(call) == {
        "model": "org/model",
        "messages": HELLO,
        "tools": [{"type": "function"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"a": 1},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            {"reasoning_effort": "low", "enable_thinking": False},
        ),
        ({"documents": [{"text": "d"}]}, {"documents": [{"text": "d"}]}),
        ({"chat_template_kwargs": "nonsense"}, "nonsense"),
    ],
)
def test_what_an_engine_hands_to_the_template_is_handed_on(given: dict[str, Any], expected: Any) -> None:
    assert asked(parse(CHAT, messages=HELLO, **given))["chat_template_kwargs"] == expected


def test_other_calls_cannot_be_asked_for() -> None:
    assert asked(parse("/v1/messages", messages=HELLO)) is None
    assert asked(parse("/v1/responses", input="hello")) is None


def test_a_render_server_gets_the_call_itself() -> None:
    call = parse(CHAT, messages=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=3)
    assert json.loads(render_question(call, "org/model")) == {
        "model": "org/model",
        "messages": HELLO,
        "max_tokens": 3,
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": HELLO}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, False),
        ({"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]}, True),
        ({"messages": [{"role": "assistant", "content": None}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": {"text": 1}}]}]}, True),
    ],
)
def test_media_are_seen(body: dict[str, Any], expected: bool) -> None:
    assert has_media(parse(CHAT, **body)) is expected


def test_media_of_responses_are_seen() -> None:
    picture = [{"role": "user", "content": [{"type": "input_image"}]}]
    assert has_media(parse("/v1/responses", input=picture))
    assert not has_media(parse("/v1/responses", input="text"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, False),
        ({"truncate_prompt_tokens": -1}, True),
        ({"truncation": "disabled"}, False),
        ({"truncation": None}, False),
        ({"truncation": {"type": "auto"}}, True),
        ({"truncation": ["disabled"]}, True),
    ],
)
def test_truncation_is_seen(given: dict[str, Any], expected: bool) -> None:
    assert is_truncated(parse("/v1/responses", input="x", **given)) is expected


@pytest.mark.parametrize(
    ("raw", "is_rendered", "expected"),
    [
        (b'{"count":2,"max_model_len":9,"tokens":[7,8],"token_strs":null}', False, [7, 8]),
        (b'{"token_ids":[7,8],"features":null}', True, [7, 8]),
        (b'[{"token_ids":[7]}]', True, [7]),
        (b'[{"token_ids":[7]},{"token_ids":[8]}]', True, None),
        (b"[]", True, None),
        (b'{"token_ids":[7]}', False, None),
        (b'{"tokens":[-1]}', False, None),
        (b'{"tokens":[4294967296]}', False, None),
        (b'{"tokens":["7"]}', False, None),
        (b'{"tokens":[1.5]}', False, None),
        (b"nonsense", False, None),
        (b'{"tokens":[99999999999999999999999]}', False, None),
    ],
)
def test_answers_are_read_or_not_believed(raw: bytes, is_rendered: bool, expected: list[int] | None) -> None:
    found = read_ids(raw, is_rendered=is_rendered)
    assert (None if found is None else list(found)) == expected


def test_the_call_that_tokenizes_is_one_that_a_sidecar_passes_on() -> None:
    assert TOKENIZE in APIS


@pytest.mark.parametrize("value", [{"type": "auto"}, ["text"], 1, True, [[]]])
def test_what_no_api_has_is_neither_text_nor_untruncated(value: object) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": value, "text": "x"}]}]}
    assert has_media(parse(CHAT, **body))
    assert is_truncated(parse("/v1/responses", input="x", truncation=value))


# Any JSON, often under names and with values that are looked at.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["text", "disabled", "none", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": json_values},
        optional={
            "content": json_values | st.lists(st.fixed_dictionaries({"type": json_values}), max_size=2)
        },
    ),
    min_size=1,
    max_size=2,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "messages": messages | json_values,
        "prompt": st.text(max_size=5) | st.lists(st.integers(0, 9), max_size=3) | json_values,
        "input": messages | json_values,
        **dict.fromkeys(
            [
                "truncation",
                "truncate_prompt_tokens",
                "prompt_embeds",
                "tools",
                "chat_template",
                "chat_template_kwargs",
                "reasoning_effort",
                "documents",
                "add_special_tokens",
            ],
            json_values,
        ),
    },
)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/v1/responses", "/v1/messages"])
@given(body=bodies)
def test_no_body_is_too_odd(path: str, body: dict[str, Any]) -> None:
    raw = json.dumps({"model": "m", "max_tokens": 1, **body}).encode()
    try:
        call = parse_call(APIS[path], raw)
    except RefusedError:
        return
    assert is_truncated(call) in {False, True}
    assert has_media(call) in {False, True}
    prompt = call.body.get("prompt")
    with suppress(UnicodeError):
        json.loads(render_question(call, "org/model"))
    with suppress(UnicodeError):
        tokenize_question(call, "org/model", prompt if isinstance(prompt, str) else None)
