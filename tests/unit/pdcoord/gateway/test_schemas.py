"""The documented request bodies against the code that reads them: each accepts what the other does."""

import json
from functools import cache
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.front.intake import RESERVED_FIELDS, check_reserved
from pdcoord.gateway.schemas import body_schema, request_body
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.openai import APIS, Api, parse_call

SCALARS = st.none() | st.booleans() | st.integers(-2, 2**31) | st.text(max_size=3) | st.just("org/model")
VALUES = SCALARS | st.lists(
    SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), SCALARS),
    max_size=3,
)
NAMES = (
    "messages",
    "prompt",
    "prompt_embeds",
    "input",
    "query",
    "documents",
    "tokens",
    "stream",
    "n",
    "cache_salt",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "min_tokens",
    *RESERVED_FIELDS,
)


@cache
def validator(path: str) -> Any:
    return jsonschema_rs.validator_for(body_schema(APIS[path]))


def is_accepted(api: Api, body: dict[str, Any]) -> bool:
    try:
        check_reserved(parse_call(api, json.dumps(body).encode()))
    except RefusedError:
        return False
    return True


@given(
    st.sampled_from(sorted(APIS)),
    st.fixed_dictionaries({"model": st.just("m") | SCALARS}, optional=dict.fromkeys(NAMES, VALUES)),
)
def test_the_schema_and_the_code_accept_the_same_bodies(path: str, body: dict[str, Any]) -> None:
    assert validator(path).is_valid(body) == is_accepted(APIS[path], body)


@pytest.mark.parametrize("path", list(APIS))
def test_a_minimal_body_is_accepted_by_both(path: str) -> None:
    api = APIS[path]
    body: dict[str, Any] = {"model": "m"} | {group[0]: [{"role": "user"}] for group in api.required}
    if path == "/v1/completions":
        body["prompt"] = ""
    assert validator(path).is_valid(body)
    assert is_accepted(api, body)


def test_a_request_body_is_required() -> None:
    assert request_body(APIS["/v1/completions"])["required"] is True
