"""Tests of what a model expects, in words."""

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from pdcoord.policy.errors import KeyPath
from pdcoord.policy.expect import EXPECTED, Expectations, expectations_of, in_words


class Inner(BaseModel):
    block_tokens: Annotated[int, Field(ge=1)]
    share: Annotated[float, Field(ge=0, le=1)] = 0.5


class Outer(BaseModel):
    name: str
    kind: Literal["Outer"]
    inner: Inner
    maybe: Inner | None = None
    many: tuple[Inner, ...] = ()
    labels: dict[str, int] = Field(default_factory=dict)
    mode: Literal["on", "off"] = "on"
    speed_ms: Annotated[float, Field(gt=0, lt=10)] = 1.0


@pytest.fixture
def expectations() -> Expectations:
    return Expectations(Outer)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("name",), "text"),
        (("kind",), "Outer"),
        (("inner",), "a mapping"),
        (("inner", "block_tokens"), "a whole number of at least 1"),
        (("maybe", "share"), "a number from 0 to 1"),
        (("many",), "a list"),
        (("many", 3, "block_tokens"), "a whole number of at least 1"),
        (("labels", "any"), "a whole number"),
        (("mode",), "one of on, off"),
        (("speed_ms",), "a number above 0 and below 10"),
        (("no", "such", "place"), "another value"),
    ],
)
def test_every_place_has_words(expectations: Expectations, path: KeyPath, words: str) -> None:
    assert expectations.words(path) == words


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "minItems": 1, "maxItems": 3}, "a list of 1 to 3 entries"),
        ({"type": "array", "minItems": 1}, "a list of at least 1 entry"),
        ({"type": "object", "minProperties": 2}, "a mapping of at least 2 keys"),
        ({"type": "string", "maxLength": 9}, "text of at most 9 characters"),
        ({"type": "integer", "maximum": 5}, "a whole number at most 5"),
        ({"type": "number", "minimum": 0.25, "maximum": 1e20}, "a number from 0.25 to 1e+20"),
        ({"type": "boolean"}, "true or false"),
        ({EXPECTED: "host:port", "type": "string"}, "host:port"),
        ({}, "another value"),
    ],
)
def test_rules_read_as_a_person_says_them(schema: dict[str, object], words: str) -> None:
    assert in_words(schema) == words


@pytest.mark.parametrize(
    ("path", "key", "suggestion"),
    [
        ((), "nmae", "did you mean name?"),
        (("inner",), "blockTokens", "did you mean block_tokens?"),
        (("inner",), "block-token", "did you mean block_tokens?"),
        (("inner",), "speed_ms", "it belongs in the top level"),
        (("inner",), "zzz", "keys here are block_tokens, share"),
        # In three places, so none can be named.
        ((), "share", "keys here are name, kind, inner, maybe, many, labels, mode, speed_ms"),
        (("name",), "zzz", "no keys are expected here"),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(
    expectations: Expectations, path: KeyPath, key: str, suggestion: str
) -> None:
    assert expectations.suggestion(path, key) == suggestion


def test_a_model_is_read_once() -> None:
    assert expectations_of(Outer) is expectations_of(Outer)
