"""Reading calls: any bytes give a call or a refusal that quotes no prompt."""

import itertools
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.protocol.openai import (
    APIS,
    CHOICE_COUNT_MAX,
    SHOWN_CHARS_MAX,
    TOKEN_ID_MAX,
    TOKEN_IDS_MAX,
    Api,
    Call,
    parse_call,
)

CHAT, COMPLETIONS = APIS["/v1/chat/completions"], APIS["/v1/completions"]
SECRET = "Kx7-secret"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "/v1/embeddings": {"input": ["hi"]},
    "/v1/rerank": {"query": "q", "documents": ["a", "b"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
apis = st.sampled_from(list(APIS.values()))
FIELDS = sorted({name for api in APIS.values() for name in (*api.prompt_fields, *api.token_limit_fields)})
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**60), 10**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.just(SECRET)
    | st.text(max_size=6)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
bodies = st.dictionaries(
    st.sampled_from(["model", "n", "stream", "cache_salt", *FIELDS]), values, max_size=8
).flatmap(lambda body: st.sampled_from([body, body | {"model": "m"}]))


def parse(path: str, body: Any) -> Call:
    return parse_call(APIS[path], json.dumps(body).encode())


def outcome(api: Api, raw: bytes) -> Call | Refusal:
    try:
        return parse_call(api, raw)
    except RefusedError as error:
        return error.refusal


def refused(path: str, body: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        parse(path, body)
    return caught.value


@given(apis, bodies | values)
def test_any_json_is_a_call_or_a_refusal_that_quotes_no_prompt(api: Api, body: Any) -> None:
    found = outcome(api, json.dumps(body).encode())
    if isinstance(found, Refusal):
        assert found.status == 400
        assert SECRET not in found.message
        assert len(found.message) < 200 + SHOWN_CHARS_MAX
        assert json.loads(found.body())["error"]["param"] == found.param
    else:
        assert found.model
        assert found.choice_count >= 1
        assert found.output_tokens_max is None or found.output_tokens_max >= 0
        assert found.prompt_token_count is None or len(found.prompt) == 4 * found.prompt_token_count


@given(apis, st.binary(max_size=64))
def test_any_bytes_are_refused_or_read(api: Api, raw: bytes) -> None:
    found = outcome(api, raw)
    if isinstance(found, Refusal):
        assert found.reason in {RefuseReason.MALFORMED_JSON, RefuseReason.INVALID_FIELD}


@pytest.mark.parametrize("depth", [900, 990, 1_000, 1_100, 100_000])
def test_deep_nesting_is_refused_or_read(depth: int) -> None:
    nest = b"[" * depth + b"]" * depth
    found = outcome(CHAT, b'{"model":"m","messages":[{"role":"u","content":' + nest + b"}]}")
    if isinstance(found, Refusal):
        assert found.reason is RefuseReason.MALFORMED_JSON


@pytest.mark.parametrize("path", sorted(APIS))
def test_a_minimal_call_of_each_api(path: str) -> None:
    call = parse(path, {"model": "m"} | BODIES[path])
    assert (call.api.path, call.model, call.is_stream, call.choice_count) == (path, "m", False, 1)
    assert call.prompt
    assert call.body == {"model": "m"} | BODIES[path]


@pytest.mark.parametrize("path", [path for path in sorted(APIS) if APIS[path].required])
def test_each_required_field_is_asked_for_by_name(path: str) -> None:
    for alternatives in APIS[path].required:
        body = {"model": "m"} | {k: v for k, v in BODIES[path].items() if k not in alternatives}
        error = refused(path, body)
        assert error.refusal.param == alternatives[0]
        assert all(f"'{name}'" in str(error) for name in alternatives)


def test_generative_calls_are_the_four_that_decode() -> None:
    generative = {path for path, api in APIS.items() if api.is_generative}
    assert generative == {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
    assert all(APIS[path].token_limit_fields for path in generative)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("model", None, "missing or empty"),
        ("model", "", "missing or empty"),
        ("model", 5, "is 5"),
        ("model", ["m"], "a list"),
        ("n", 0, "is 0"),
        ("n", -1, "is -1"),
        ("n", CHOICE_COUNT_MAX + 1, "is 1025"),
        ("n", 10**60, "a number of 61 characters"),
        ("n", 1.5, "is 1.5"),
        ("n", True, "is True"),
        ("n", "2", "a str"),
        ("stream", 1, "is 1"),
        ("stream", "true", "a str"),
        ("max_tokens", -1, "is -1"),
        ("max_tokens", -(10**60), "a number of 62 characters"),
        ("max_tokens", "9", "a str"),
        ("max_completion_tokens", False, "is False"),
        ("cache_salt", 5, "is 5"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(field: str, value: Any, shown: str) -> None:
    error = refused("/v1/completions", {"model": "m", "prompt": "hi"} | {field: value})
    assert error.refusal.param == field
    assert f"'{field}'" in str(error)
    assert shown in str(error)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": None}, None),
        ({"min_tokens": 3}, None),
        ({"min_tokens": 3, "max_tokens": 9}, 9),
    ],
)
def test_the_output_limit_is_the_least_of_those_given(limits: dict[str, Any], expected: int | None) -> None:
    assert (
        parse(
            "/v1/chat/completions", BODIES["/v1/chat/completions"] | {"model": "m"} | limits
        ).output_tokens_max
        == expected
    )


@pytest.mark.parametrize(
    ("prompt", "n", "choice_count"),
    [
        ("hi", 1, 1),
        ("hi", 3, 3),
        (["a"], 1, 1),
        (["a", "b"], 1, 2),
        (["a", "b"], 2, 4),
        ([1, 2, 3], 1, 1),
        ([[1], [2, 3]], 2, 4),
        ([], 1, 1),
    ],
)
def test_choices_are_counted_over_prompts(prompt: Any, n: int, choice_count: int) -> None:
    assert parse("/v1/completions", {"model": "m", "prompt": prompt, "n": n}).choice_count == choice_count


@given(st.lists(st.integers(0, TOKEN_ID_MAX), max_size=50))
def test_token_ids_are_counted_exactly(ids: list[int]) -> None:
    call = parse("/v1/completions", {"model": "m", "prompt": ids})
    assert call.prompt_token_count == len(ids)
    assert call.prompt == struct.pack(f"<{len(ids)}I", *ids)


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": SECRET},
        [SECRET, 1],
        [1, SECRET],
        [[1], SECRET],
        [[SECRET]],
        [1, True],
        [1, -1],
        [1, TOKEN_ID_MAX + 1],
        [1.5],
        [None],
        7,
        True,
    ],
)
def test_a_prompt_of_the_wrong_kind_is_refused_unquoted(prompt: Any) -> None:
    error = refused("/v1/completions", {"model": "m", "prompt": prompt})
    assert error.refusal.param == "prompt"
    assert SECRET not in str(error)


def test_text_prompts_have_no_exact_count() -> None:
    assert parse("/v1/completions", {"model": "m", "prompt": "hi"}).prompt_token_count is None
    assert parse("/v1/completions", {"model": "m", "prompt_embeds": "AAAA"}).prompt_token_count is None


@pytest.mark.parametrize("messages", [[], {}, "hi", 5, [SECRET], [["role", SECRET]], [None]])
def test_messages_of_the_wrong_kind_are_refused_unquoted(messages: Any) -> None:
    error = refused("/v1/chat/completions", {"model": "m", "messages": messages})
    assert error.refusal.param == "messages"
    assert SECRET not in str(error)


def test_a_longer_conversation_continues_the_rendering_of_a_shorter_one() -> None:
    turns = [
        {"role": r, "content": f"text {i}"} for i, r in enumerate(["system", "user", "assistant", "user"])
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    rendered = [
        parse("/v1/chat/completions", {"model": "m", "messages": turns[:count], "tools": tools}).prompt
        for count in range(1, len(turns) + 1)
    ]
    for shorter, longer in itertools.pairwise(rendered):
        assert longer.startswith(shorter)


def test_all_that_an_engine_renders_is_in_the_prompt() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:abc"}}]
    prompts = [
        parse("/v1/chat/completions", {"model": "m", "messages": messages} | extra).prompt
        for messages, extra in [
            ([{"role": "user", "content": "look"}], {}),
            ([{"role": "user", "content": parts}], {}),
            ([{"role": "user", "content": "look", "name": "ann"}], {}),
            ([{"role": "system", "content": "look"}], {}),
            ([{"role": "user", "content": "look"}], {"tools": [{"type": "function"}]}),
        ]
    ]
    assert len(set(prompts)) == len(prompts)


def test_what_is_not_of_the_prompt_does_not_change_it() -> None:
    base = {"model": "m", "prompt": "hi"}
    call = parse("/v1/completions", base | {"temperature": 0.3, "stream": True, "cache_salt": "tenant"})
    assert call.prompt == parse("/v1/completions", base).prompt
    assert call.is_stream
    assert call.cache_salt == "tenant"


def test_a_call_keeps_the_clients_body() -> None:
    body = {"model": "m", "prompt": "hi", "unknown_field": {"deep": [1, 2.5, None]}}
    assert parse("/v1/completions", body).body == body


@pytest.mark.parametrize(
    "raw", [b"", b"{", b'{"model": "m",}', b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"nul"]
)
def test_what_is_not_json_is_refused_as_such(raw: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_call(COMPLETIONS, raw)
    assert caught.value.refusal.reason is RefuseReason.MALFORMED_JSON


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"text"'])
def test_json_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RefusedError, match="expected a JSON object"):
        parse_call(COMPLETIONS, raw)


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({}, ""),
        ({"n": 1, "best_of": 1, "echo": False, "prompt_logprobs": None, "use_beam_search": False}, ""),
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 5}, "prompt_logprobs"),
        ({"echo": True}, "echo"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_the_field_that_keeps_a_call_on_one_engine_is_named(extra: dict[str, Any], field: str) -> None:
    assert parse("/v1/completions", {"model": "m", "prompt": "hi"} | extra).one_engine_field == field


def test_more_token_ids_than_any_engine_takes_are_refused_before_they_are_read() -> None:
    error = refused("/v1/completions", {"model": "m", "prompt": [1] * (TOKEN_IDS_MAX + 1)})
    assert error.refusal.reason is RefuseReason.CONTEXT_TOO_LONG
    assert error.refusal.param == "prompt"
