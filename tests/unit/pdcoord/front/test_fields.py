"""Which fields of a body an API key may not use."""

import json
from typing import Any

import pytest

from pdcoord.front.fields import DROPPED, UNCOUNTED, refused_field
from pdcoord.protocol.openai import APIS, parse_call
from pdcoord.protocol.tickets import is_steering


def field_of(**fields: Any) -> tuple[str, str] | None:
    raw = json.dumps({"model": "m", "prompt": "x", **fields}).encode()
    return refused_field(parse_call(APIS["/v1/completions"], raw))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_path", "adapter"),
        ("lora_path", [None, "adapter"]),
        ("lora_path", ""),
        ("session_params", {"id": "s", "rid": "r"}),
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("custom_logit_processor", "{}"),
    ],
)
def test_what_would_make_it_another_call_is_refused_with_a_remedy(name: str, value: object) -> None:
    found = field_of(**{name: value})
    assert found is not None
    assert found[0] == name
    assert "; " in found[1]


@pytest.mark.parametrize("value", [None, False])
def test_a_field_that_says_nothing_is_let_be(value: object) -> None:
    for name in ("lora_path", "session_params", "previous_response_id", "background"):
        assert field_of(**{name: value}) is None


def test_a_field_is_either_refused_or_dropped() -> None:
    for name in DROPPED | UNCOUNTED:
        assert field_of(**{name: 1}) is None
        assert not is_steering(name)
