# ruff: noqa: INP001  # a script beside the chart, in no package
"""Writes the chart's values.schema.json and the reference in docs/chart.md; with --check, says what is stale.

python deploy/charts/generate.py [--check]
"""

import copy
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from transfer.settings import RANGES, AgentSettings

CHARTS = Path(__file__).resolve().parent
ROOT = CHARTS.parent.parent
SOURCE = CHARTS / "values.schema.yaml"
SCHEMA = CHARTS / "pdcoord" / "values.schema.json"
VALUES = CHARTS / "pdcoord" / "values.yaml"
POLICY = ROOT / "deploy" / "policies" / "poolpolicy.schema.json"
REFERENCE = ROOT / "docs" / "chart.md"
BEGIN, END = "<!-- drawn: values -->", "<!-- end -->"

QUANTITY = {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"}
IMAGE: dict[str, dict[str, Any]] = {
    "repository": {
        "type": "string",
        "about": "Repository; see global.imageRegistry and engineImageRegistry.",
    },
    "tag": {
        "type": "string",
        "pattern": "^([A-Za-z0-9_][A-Za-z0-9._-]{0,127}|sha256:[0-9a-f]{64})?$",
        "about": "Tag, or a digest that begins with sha256:; the chart's appVersion if empty.",
    },
    "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"], "about": "As in a pod."},
}
PARTIAL_LEAVES_OUT = {"anyOf", "oneOf", "allOf", "required", "dependentRequired"}


class Schema:
    """Turns the source into JSON Schema, and collects the parts of the policy's schema that it names."""

    def __init__(self, policy: Mapping[str, Any]) -> None:
        self._policy = policy
        self.definitions: dict[str, Any] = {}

    def closed(self, properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
        """An object of just these properties."""
        drawn: dict[str, Any] = {
            "type": "object",
            "additionalProperties": False,
            "properties": {name: self.node(node) for name, node in properties.items()},
        }
        return drawn | ({"required": required} if required else {})

    def node(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """One key's schema."""
        if "policy" in node:
            return self._part(node["policy"])
        if "partial" in node:
            return self._partial(node["partial"])
        if "image" in node:
            return {"description": "The image.", **self.closed(IMAGE)}
        about = {"description": node["about"]} if "about" in node else {}
        if node.get("quantity"):
            return about | QUANTITY
        if node.get("agent"):
            return about | {"type": "object", "properties": dict(agent_properties())}
        if "properties" in node:
            drawn = about | self.closed(node["properties"], node.get("required"))
            return {k: v for k, v in drawn.items() if k != "additionalProperties" or not node.get("open")}
        drawn = about | {key: value for key, value in node.items() if key not in {"about", "open"}}
        for key in ("items", "additionalProperties"):
            if isinstance(drawn.get(key), dict):
                drawn[key] = self.node(drawn[key])
        return drawn

    def _part(self, path: str) -> dict[str, Any]:
        self._define(path.split("/", maxsplit=1)[0])
        return {"$ref": f"#/$defs/{path}"}

    def _partial(self, name: str) -> dict[str, Any]:
        own = f"Partial{name}"
        if own not in self.definitions:
            whole = self._policy["$defs"][name]
            self.definitions[own] = {k: v for k, v in whole.items() if k not in PARTIAL_LEAVES_OUT}
            self._define_all(whole)
        return {"$ref": f"#/$defs/{own}"}

    def _define(self, name: str) -> None:
        if name not in self.definitions:
            self.definitions[name] = self._policy["$defs"][name]
            self._define_all(self._policy["$defs"][name])

    def _define_all(self, part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                self._define(part["$ref"].removeprefix("#/$defs/").split("/")[0])
            for value in part.values():
                self._define_all(value)
        elif isinstance(part, list):
            for value in part:
                self._define_all(value)


def agent_properties() -> Iterator[tuple[str, dict[str, Any]]]:
    """Types and ranges of the transfer agent's settings; which of them the chart takes, its templates say."""
    for setting in fields(AgentSettings):
        if setting.name in RANGES:
            low, high = RANGES[setting.name]
            kind_of = "number" if isinstance(setting.default, float) else "integer"
            yield setting.name, {"type": kind_of, "minimum": low, "maximum": high}
        elif isinstance(setting.default, tuple):
            yield setting.name, {"type": "array", "items": {"type": "string", "minLength": 1}}
        elif isinstance(setting.default, str):
            yield setting.name, {"type": "string"}
        elif setting.name != "key":
            yield setting.name, {"type": "object", "additionalProperties": {"type": "object"}}


def schema_text() -> str:
    """values.schema.json."""
    source = yaml.safe_load(SOURCE.read_text())
    schema = Schema(json.loads(POLICY.read_text()))
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the pdcoord chart",
        **schema.closed(source),
    }
    # The coordinator refuses a rung that comes twice; the policy's own schema cannot say so.
    fallback = copy.deepcopy(schema.definitions["FallbackSpec"])
    fallback["properties"]["ladder"]["uniqueItems"] = True
    whole["$defs"] = dict(sorted((schema.definitions | {"FallbackSpec": fallback}).items()))
    return json.dumps(whole, indent=1) + "\n"


def rows(path: str, node: Mapping[str, Any], default: Any) -> Iterator[str]:
    """Lines of the reference: one for each key that is no mapping of known keys."""
    if "policy" in node or "partial" in node:
        part = (node.get("policy") or node["partial"]).split("/")[0]
        yield f"| `{path}` | a mapping | {shown(default)} | As `{part}` of docs/policy.md: its own keys. |"
    elif "image" in node:
        for name, part in IMAGE.items():
            yield from rows(f"{path}.{name}", part, (default or {}).get(name))
    elif "properties" in node:
        yield f"| `{path}` | a mapping | | {node.get('about', '')} |"
        for name, part in node["properties"].items():
            yield from rows(f"{path}.{name}", part, default.get(name) if isinstance(default, dict) else None)
    elif "properties" in node.get("items", {}):
        yield f"| `{path}` | a list | {shown(default)} | {node['about']} |"
        for name, part in node["items"]["properties"].items():
            yield from rows(f"{path}[].{name}", part, None)
    elif isinstance(node.get("additionalProperties"), dict) and "properties" in node["additionalProperties"]:
        yield f"| `{path}` | a mapping | see values.yaml | {node['about']} |"
        for name, part in node["additionalProperties"]["properties"].items():
            yield from rows(f"{path}.*.{name}", part, None)
    else:
        yield f"| `{path}` | {kind(node)} | {shown(default)} | {node['about']} |"


def kind(node: Mapping[str, Any]) -> str:
    """What a value of a key is, in words."""
    if node.get("quantity"):
        return "a quantity"
    if node.get("agent"):
        return "a mapping"
    if "enum" in node:
        return "one of " + ", ".join(str(value) for value in node["enum"])
    names = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
    names |= {"array": "a list", "object": "a mapping", "null": "nothing"}
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    return " or ".join(names[name] for name in types)


def shown(default: Any) -> str:
    """A default, or nothing."""
    return "" if default in (None, "") else f"`{json.dumps(default)}`"


def reference_text() -> str:
    """docs/chart.md with its drawn part made anew."""
    source, defaults = yaml.safe_load(SOURCE.read_text()), yaml.safe_load(VALUES.read_text())
    lines = ["| value | type | default | meaning |", "|---|---|---|---|"]
    for name, node in source.items():
        lines += rows(name, node, defaults.get(name))
    before, _, rest = REFERENCE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def main() -> int:
    """Write both, or with --check return 1 and name what differs."""
    stale = 0
    for path, text in ((SCHEMA, schema_text()), (REFERENCE, reference_text())):
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif path.read_text() != text:
            sys.stderr.write(f"{path.relative_to(ROOT)} is stale: run python deploy/charts/generate.py\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
