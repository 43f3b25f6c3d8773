"""What a pydantic model expects at a place, in words, and what a person may have meant instead."""

from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from pdcoord.policy.errors import KeyPath, format_key_path

EXPECTED = "x-expected"
"""JSON Schema keyword of ours: words for a value whose rule (a pattern) no person wants to read."""
DEFAULT_WORDS = "x-default"
"""JSON Schema keyword of ours: words for the default of a key that needs no value in some cases only."""

JsonSchema = dict[str, Any]


class Expectations:
    """Answers from a model's JSON Schema."""

    def __init__(self, model_class: type[BaseModel]) -> None:
        self.root: JsonSchema = model_class.model_json_schema(by_alias=True)

    def at(self, path: KeyPath) -> JsonSchema | None:
        """The schema of the value at a path; None where the model has no such place."""
        schema: JsonSchema | None = self.resolve(self.root)
        for part in path:
            if schema is None:
                return None
            schema = self._child(schema, part)
        return schema

    def keys_at(self, path: KeyPath) -> list[str]:
        """Keys that the mapping at a path may have, in the order of the model."""
        schema = self.at(path)
        return list(schema.get("properties", {})) if schema else []

    def words(self, path: KeyPath) -> str:
        """What is expected at a path, as in `a whole number from 1 to 65535`."""
        schema = self.at(path)
        return "another value" if schema is None else in_words(schema)

    def key_words(self, path: KeyPath) -> str:
        """What a key of the mapping at a path may be."""
        schema = self.at(path) or {}
        return in_words({"type": "string", **schema.get("propertyNames", {})})

    def suggestion(
        self, path: KeyPath, key: str, top: str = "the top level", outside: frozenset[str] = frozenset()
    ) -> str:
        """What to do about an unknown key of the mapping at a path.

        `top` is what the root is called, and `outside` are keys of it that stand elsewhere in the text.
        """
        known = [name for name in self.keys_at(path) if path or name not in outside]
        folded = {_fold(name): name for name in known}
        if close := get_close_matches(_fold(key), folded, n=1, cutoff=0.7):
            return f"did you mean {folded[close[0]]}?"
        places = [place for place in self._places_of(key, self.root, ()) if place != path]
        if len(places) == 1:
            inside = format_key_path(places[0]).replace("[0]", "[]") or top
            return f"it belongs in {inside}"
        return f"keys here are {', '.join(known)}" if known else "no keys are expected here"

    def resolve(self, schema: JsonSchema) -> JsonSchema:
        """Follow references, and the non-null branch of an optional value."""
        while True:
            if "$ref" in schema:
                schema = {
                    **self.root["$defs"][schema["$ref"].rpartition("/")[2]],
                    **_without(schema, "$ref"),
                }
            elif (value := without_null(schema)) is not schema:
                schema = value
            else:
                return schema

    def _child(self, schema: JsonSchema, part: str | int) -> JsonSchema | None:
        if isinstance(part, int):
            found = schema.get("items")
        else:
            # Labels have one pattern for all keys, and pydantic gives it as the only one.
            others = next(iter(schema.get("patternProperties", {}).values()), None)
            found = schema.get("properties", {}).get(part, others or schema.get("additionalProperties"))
        return self.resolve(found) if isinstance(found, dict) else None

    def _places_of(self, key: str, schema: JsonSchema, path: KeyPath) -> Iterator[KeyPath]:
        """Paths of the mappings that have a key of this name; models are trees, so this ends."""
        schema = self.resolve(schema)
        properties: dict[str, JsonSchema] = schema.get("properties", {})
        if key in properties:
            yield path
        for name, value in properties.items():
            yield from self._places_of(key, value, (*path, name))
        if isinstance(schema.get("items"), dict):
            yield from self._places_of(key, schema["items"], (*path, 0))


def without_null(schema: JsonSchema) -> JsonSchema:
    """The other branch of a value that may be null; any other schema as it is."""
    branches = [branch for branch in schema.get("anyOf", ()) if branch.get("type") != "null"]
    return {**branches[0], **_without(schema, "anyOf")} if len(branches) == 1 else schema


@lru_cache(maxsize=32)
def expectations_of(model_class: type[BaseModel]) -> Expectations:
    return Expectations(model_class)


def in_words(schema: JsonSchema) -> str:
    """Say what a (resolved) schema allows."""
    if EXPECTED in schema:
        return str(schema[EXPECTED])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    noun, sizes = _NOUNS.get(schema.get("type", ""), ("another value", None))
    return noun + (_range_in_words(schema) if sizes is None else _size_in_words(schema, *sizes))


_NOUNS: dict[str, tuple[str, tuple[str, str, str] | None]] = {
    "integer": ("a whole number", None),
    "number": ("a number", None),
    "boolean": ("true or false", None),
    "array": ("a list", ("Items", "entry", "entries")),
    "object": ("a mapping", ("Properties", "key", "keys")),
    "string": ("text", ("Length", "character", "characters")),
}


def _range_in_words(schema: JsonSchema) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    bounds = [
        f"{words} {_number(bound)}"
        for words, bound in (("of at least", low), ("above", above), ("at most", high), ("below", below))
        if bound is not None
    ]
    return " " + " and ".join(bounds) if bounds else ""


def _size_in_words(schema: JsonSchema, what: str, one: str, many: str) -> str:
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    if low and high:
        return f" of {low} to {high} {many}"
    if low:
        return f" of at least {low} {one if low == 1 else many}"
    return f" of at most {high} {many}" if high else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:g}"


def _fold(key: str) -> str:
    """Write blockTokens, block-tokens and block_tokens alike."""
    return key.lower().replace("_", "").replace("-", "")


def _without(schema: JsonSchema, key: str) -> JsonSchema:
    return {name: value for name, value in schema.items() if name != key}
