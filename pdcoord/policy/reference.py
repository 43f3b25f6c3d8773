"""The JSON Schema of a policy, and the tables of docs/policy.md, both drawn from the schema's classes.

`python -m pdcoord.policy.reference` run at the top of the repository writes both.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pdcoord.policy.endpoints import EndpointsSpec
from pdcoord.policy.expect import DEFAULT_WORDS, JsonSchema, expectations_of, in_words
from pdcoord.policy.forms import OBJECT_META, OUTSIDE, SPEC, STATUS
from pdcoord.policy.schema import PoolPolicy
from pdcoord.policy.values import Metadata
from transfer.presets import PRESETS

SCHEMA_FILE = Path("deploy/policies/poolpolicy.schema.json")
DOCS_FILE = Path("docs/policy.md")
BEGIN = "<!-- generated from pdcoord/policy/schema.py; edit there -->"
END = "<!-- end of the generated part -->"


def json_schema_text() -> str:
    """JSON Schema (2020-12) of a PoolPolicy document in either form, as text that ends in no newline."""
    flat = _without_titles(PoolPolicy.model_json_schema(by_alias=True))
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "description": flat.pop("description")}
    schema = {**head, "$defs": flat.pop("$defs"), "if": {"required": [SPEC]}}
    return json.dumps({**schema, "then": _beneath_spec(schema, flat), "else": flat}, indent=2)


def _beneath_spec(schema: JsonSchema, flat: JsonSchema) -> JsonSchema:
    """The schema of the form that a Kubernetes object has, from that of the other."""
    outer = {key: value for key, value in flat["properties"].items() if key in OUTSIDE}
    inner = {key: value for key, value in flat["properties"].items() if key not in OUTSIDE}
    metadata = schema["$defs"][Metadata.__name__]
    outer["metadata"] = {
        **metadata,
        "properties": {**metadata["properties"], **{key: {} for key in sorted(OBJECT_META)}},
    }
    spec = {
        **flat,
        "properties": inner,
        "required": [key for key in flat["required"] if key in inner],
    }
    return {
        **flat,
        "properties": {**outer, SPEC: spec, STATUS: {}},
        "required": [*(key for key in flat["required"] if key in outer), SPEC],
    }


def _without_titles(schema: JsonSchema) -> JsonSchema:
    """Drop the titles that pydantic makes of names; they say nothing that the names do not."""
    cleaned: JsonSchema = {}
    for key, value in schema.items():
        if key == "title" and isinstance(value, str):
            continue
        if isinstance(value, dict):
            cleaned[key] = _without_titles(value)
        elif key == "anyOf":
            cleaned[key] = [_without_titles(branch) for branch in value]
        else:
            cleaned[key] = value
    return cleaned


def reference_text() -> str:
    """The generated part of docs/policy.md, markers included."""
    lines = [BEGIN, ""]
    lines += _describe(PoolPolicy, "PoolPolicy")
    lines += _describe(EndpointsSpec, "Endpoints")
    lines += _describe_presets()
    return "\n".join([*lines, END])


def with_reference(page: str) -> str:
    """A page with the part between its markers drawn anew.

    Raises:
        ValueError: if the page does not have both markers, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r} after it")
    return before + reference_text() + after


def _describe(model_class: type[BaseModel], kind: str) -> Iterator[str]:
    """A heading and a table for the document and for each mapping in it, outer ones first."""
    expectations = expectations_of(model_class)
    pending: list[tuple[str, JsonSchema]] = [(kind, expectations.root)]
    while pending:
        place, schema = pending.pop(0)
        inner: list[tuple[str, JsonSchema]] = []
        yield f"## {place}" if place == kind else f"### {place}"
        yield ""
        yield from schema.get("description", "").split("\n")
        yield ""
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        required = schema.get("required", ())
        for key, written in schema["properties"].items():
            value = expectations.resolve(written)
            yield _row(key, value, is_required=key in required)
            # A mapping's section says what its class says; the row above, what the key is for.
            undescribed = {name: part for name, part in written.items() if name != "description"}
            item = expectations.resolve(value.get("items", undescribed))
            if "properties" in item:
                name = f"{key}[]" if "items" in value else key
                inner.append((name if place == kind else f"{place}.{name}", item))
        pending = inner + pending
        yield ""


def _describe_presets() -> Iterator[str]:
    """What `pools[].layout.preset` may name."""
    yield "## Layout presets"
    yield ""
    yield "Each backend at its own defaults. Keys that are not shown are as for any layout."
    yield ""
    yield "| preset | layout | known by | note |"
    yield "|---|---|---|---|"
    for preset in PRESETS.values():
        unusual = [
            f"{field.name}: {getattr(preset.layout, field.name)}"
            for field in fields(preset.layout)
            if field.name in {"block_tokens", "order"} or getattr(preset.layout, field.name) != field.default
        ]
        cells = (f"`{preset.name}`", ", ".join(unusual), f"{preset.evidence}: {preset.source}", preset.note)
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _row(key: str, schema: JsonSchema, *, is_required: bool) -> str:
    if is_required:
        default = "required"
    elif DEFAULT_WORDS in schema:
        default = schema[DEFAULT_WORDS]
    elif "default" in schema:
        default = _show_default(schema["default"])
    else:
        default = "see below" if "properties" in schema else "`{}`"
    cells = (f"`{key}`", in_words(schema), default, schema.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _show_default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float) and value == int(value):
        return f"`{int(value)}`"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def main() -> None:
    """Write both generated files anew."""
    SCHEMA_FILE.write_text(json_schema_text() + "\n", encoding="utf-8")
    DOCS_FILE.write_text(with_reference(DOCS_FILE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
