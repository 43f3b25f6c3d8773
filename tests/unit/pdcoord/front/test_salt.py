"""Cache salts part those who do not trust each other, and are the same on every replica."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.salt import SALTED_PATHS, cache_salt, media_id_field, named_group, tenant_group
from pdcoord.protocol.openai import APIS, parse_call

SECRET = bytes(range(32))
TEXTS = st.text(max_size=8)
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
NAMED = {"type": "image_url", "image_url": None, "uuid": "sku-1"}


def test_a_salt_is_what_it_was_before_a_restart() -> None:
    salt = cache_salt(SECRET, tenant_group("team-a"), "")
    assert salt == "gES0ucZAeAK-0UU2YCF8Q3Q-yJjW8ae4mfXwT9XgDfI"


@given(st.tuples(TEXTS, TEXTS), st.tuples(TEXTS, TEXTS))
def test_salts_are_equal_where_group_and_own_salt_are(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (cache_salt(SECRET, *one) == cache_salt(SECRET, *other)) == (one == other)


@given(st.text())
def test_engines_take_every_salt(own: str) -> None:
    salt = cache_salt(SECRET, "g", own)
    assert len(salt) == 43
    assert not {*salt} & set("@/\\\0")


def test_nobody_makes_a_salt_without_the_secret() -> None:
    assert cache_salt(SECRET, "g", "") != cache_salt(bytes(32), "g", "")


@given(TEXTS, TEXTS)
def test_no_tenant_is_a_named_group(tenant: str, name: str) -> None:
    assert tenant_group(tenant) != named_group(name)


def test_calls_that_leave_kv_behind_are_salted() -> None:
    assert frozenset(APIS) - SALTED_PATHS == {"/tokenize", "/detokenize"}


def media_id_of(path: str, **body: Any) -> str | None:
    given = {"messages": [{}], "prompt": "", "input": "", "query": "", "documents": [], "tokens": []}
    return media_id_field(parse_call(APIS[path], msgspec.json.encode(given | {"model": "m"} | body)))


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [{}, {"content": [IMAGE, NAMED]}]}, "messages[1].content[1]"),
        (
            "/v1/chat/completions",
            {"messages": [{"content": [{**IMAGE, "uuid": 0}]}]},
            "messages[0].content[0]",
        ),
        (
            "/v1/messages",
            {"messages": [{"content": [{"content": [NAMED]}]}]},
            "messages[0].content[0].content[0]",
        ),
        ("/v1/responses", {"input": [{"content": [NAMED]}]}, "input[0].content[0]"),
        ("/v1/responses", {"input": [{"output": [NAMED]}]}, "input[0].output[0]"),
        (
            "/v1/responses",
            {"previous_input_messages": [{"content": [NAMED]}]},
            "previous_input_messages[0].content[0]",
        ),
        ("/v1/embeddings", {"messages": [{"content": [NAMED]}]}, "messages[0].content[0]"),
        ("/v1/rerank", {"query": {"content": [NAMED]}}, "query.content[0]"),
        ("/v1/rerank", {"documents": [NAMED]}, "documents[0]"),
        ("/v1/score", {"items": [{"content": [NAMED]}]}, "items[0].content[0]"),
        ("/v1/score", {"data_2": [{"content": [NAMED]}]}, "data_2[0].content[0]"),
        ("/tokenize", {"messages": [{"content": [NAMED]}]}, "messages[0].content[0]"),
    ],
)
def test_media_that_are_named_by_an_id_are_found(path: str, body: dict[str, Any], field: str) -> None:
    assert media_id_of(path, **body) == f"{field}.uuid"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": [IMAGE, {**IMAGE, "uuid": None}]}]},
        {"messages": [{"content": "uuid", "uuid": "of the client's own"}]},
        {"tools": [{"content": [NAMED]}], "messages": [{"tool_calls": [NAMED]}]},
        {"uuid": "a", "metadata": {"uuid": "b"}},
    ],
)
def test_what_means_nothing_to_a_media_cache_may_stay(body: dict[str, Any]) -> None:
    assert media_id_of("/v1/chat/completions", **body) is None


def test_content_that_is_nested_without_end_is_walked_in_bounds() -> None:
    nested: Any = NAMED
    for _ in range(100):
        nested = {"content": [nested]}
    assert str(media_id_of("/v1/chat/completions", messages=[nested])).endswith(".content[0].uuid")
