"""The PoolPolicy CustomResourceDefinition, its structural schema drawn from the classes of the file's format.

Rules of a structural schema: Kubernetes API reference, apiextensions.k8s.io/v1 JSONSchemaProps, and the
custom resources page's "Specifying a structural schema" (release 1.37).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pdcoord.policy.expect import DEFAULT_WORDS, JsonSchema, expectations_of, without_null
from pdcoord.policy.forms import OUTSIDE
from pdcoord.policy.schema import DisaggregationSpec, PoolPolicy

GROUP = "pdcoord.io"
VERSION = "v1alpha1"
KIND = "PoolPolicy"
PLURAL = "poolpolicies"
CONDITION = "Accepted"
MESSAGE_LENGTH_MAX = 4_096
"""Of a condition's message; the API's own bound is 32768."""
CRD_FILE = Path("deploy/charts/pdcoord/crds/poolpolicies.yaml")
HEADER = "# Generated from pdcoord/policy/schema.py by `pdcoord policy crd`; edit there.\n"

_Place = tuple[str, ...]
"""Properties from `spec` down; `[]` is a list's items."""

# An unknown key is none that a structural schema could refuse: a server prunes it, and kubectl's strict
# validation names it. What a schema cannot say at all is judged by the coordinator, which has the same
# document, and told in `status`.
_KEPT = (
    "type",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)
_READ = {
    "$defs",
    "additionalProperties",
    "anyOf",
    "const",
    "default",
    "description",
    "examples",
    "exclusiveMinimum",
    "items",
    "oneOf",
    "patternProperties",
    "properties",
    "propertyNames",
    "required",
    "title",
}

_LISTS: dict[_Place, dict[str, Any]] = {
    ("model", "aliases"): {"x-kubernetes-list-type": "set"},
    ("model", "adapters"): {"x-kubernetes-list-type": "set"},
    ("fallback", "ladder"): {"x-kubernetes-list-type": "set"},
    ("pools",): {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    ("pools", "[]", "endpoints"): {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["address"],
    },
}


def _rules() -> dict[_Place, list[tuple[str, str]]]:
    """CEL rules and what they say, by place.

    A server estimates what a rule may cost at most and refuses a definition in which one is too dear, so
    these only look at single values, enums and names, in lists of at most 256.
    """
    transfer, lease = (
        f"(has(self.{key}) ? self.{key} : {float(DisaggregationSpec.model_fields[key].default)})"
        for key in ("transfer_deadline_ms", "lease_ms")
    )
    return {
        (): [("self.pools.exists(p, p.role != 'prefill')", "no pool decodes; give one role decode or both")],
        ("disaggregation",): [
            (
                f"{transfer} < {lease}",
                "transfer_deadline_ms must be less than lease_ms: KV would be dropped while it is waited for",
            )
        ],
        ("pools", "[]"): [
            ("has(self.endpoints) != has(self.selector)", "set exactly one of endpoints and selector"),
            (
                "self.engine != 'vllm' || self.connector != 'sglang'",
                "connector sglang on a vllm pool, expected one of nixl, pdcoord, none",
            ),
            (
                "self.engine != 'sglang' || self.connector == (self.role == 'both' ? 'none' : 'sglang')",
                "an sglang pool has connector sglang, or none if its role is both",
            ),
        ],
        ("pools", "[]", "layout"): [
            ("has(self.block_tokens) || has(self.preset)", "set block_tokens, or name a preset")
        ],
    }


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition as plain data."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["pp"],
                "categories": ["pdcoord"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _object_schema()},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": list(_columns()),
                }
            ],
        },
    }


def crd_text() -> str:
    """The definition as a YAML document that ends in a newline."""
    return HEADER + yaml.safe_dump(crd(), sort_keys=False, width=110, allow_unicode=True)


def _columns() -> Iterable[dict[str, Any]]:
    condition = f'.status.conditions[?(@.type=="{CONDITION}")]'
    yield {"name": "Model", "type": "string", "jsonPath": ".spec.model.name"}
    yield {
        "name": "Pools",
        "type": "integer",
        "jsonPath": ".status.pools",
        "description": "Pools of the last generation that was accepted.",
    }
    yield {
        "name": CONDITION,
        "type": "string",
        "jsonPath": f"{condition}.status",
        "description": "Whether the object, as it is now, is in force.",
    }
    yield {"name": "Reason", "type": "string", "jsonPath": f"{condition}.reason"}
    yield {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
    yield {"name": "Message", "type": "string", "jsonPath": f"{condition}.message", "priority": 1}


def _object_schema() -> JsonSchema:
    """Of a whole object."""
    return {
        "description": "How one model is served by its pools.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec_schema(),
            "status": _status_schema(),
        },
        "x-kubernetes-validations": [
            {
                # The rest of the rule for names is the API server's own.
                "rule": "size(self.metadata.name) <= 63 && !self.metadata.name.contains('.')",
                "message": "metadata.name must have up to 63 lower-case letters, digits and dashes",
            }
        ],
    }


def spec_schema() -> JsonSchema:
    """Structural schema of what stands beneath `spec`.

    Raises:
        ValueError: if the classes use a JSON Schema keyword that this does not know how to say.
    """
    expectations = expectations_of(PoolPolicy)
    root = {
        **expectations.root,
        "properties": {
            key: value for key, value in expectations.root["properties"].items() if key not in OUTSIDE
        },
        "required": [key for key in expectations.root["required"] if key not in OUTSIDE],
    }
    schema = _structural(root)
    for place, extension in _LISTS.items():
        _at(schema, place).update(extension)
    for place, rules in _rules().items():
        said = [{"rule": rule, "message": message} for rule, message in rules]
        _at(schema, place)["x-kubernetes-validations"] = said
    return schema


def _structural(written: JsonSchema) -> JsonSchema:
    """One value of pydantic's JSON Schema (2020-12) as a structural schema (OpenAPI v3.0).

    Defaults are told, not set: what a server wrote into an object would stand for what somebody chose, as
    with a key that a layout's preset says.
    """
    expectations = expectations_of(PoolPolicy)
    schema = expectations.resolve(written)
    unknown = {key for key in schema if not key.startswith("x-")} - _READ - {*_KEPT}
    if unknown:
        raise ValueError(f"no structural schema is known for the keywords {', '.join(sorted(unknown))}")
    made: JsonSchema = {}
    if description := _description(schema):
        made["description"] = description
    made |= {key: _plain(schema[key]) for key in _KEPT if key in schema}
    if "const" in schema:
        made["enum"] = [schema["const"]]
    if "exclusiveMinimum" in schema:
        made |= {"minimum": _plain(schema["exclusiveMinimum"]), "exclusiveMinimum": True}
    if without_null(written) is not written:
        made["nullable"] = True
    if "items" in schema:
        made["items"] = _structural(schema["items"])
    if "properties" in schema:
        made["properties"] = {key: _structural(value) for key, value in schema["properties"].items()}
        if schema.get("required"):
            made["required"] = list(schema["required"])
    elif schema["type"] == "object":
        made["additionalProperties"] = _structural(_values_of(schema))
    return made


def _values_of(schema: JsonSchema) -> JsonSchema:
    """Of a mapping with keys of any name; the rule for its keys is beyond a structural schema."""
    patterns = schema.get("patternProperties")
    values = next(iter(patterns.values())) if patterns else schema["additionalProperties"]
    assert isinstance(values, dict)
    return values


def _description(schema: JsonSchema) -> str:
    text = " ".join(schema.get("description", "").split())
    default = schema.get("default")
    if DEFAULT_WORDS in schema:
        return f"{text} Default: {schema[DEFAULT_WORDS]}."
    if default is None or isinstance(default, dict) or default == []:
        return text
    shown = ", ".join(default) if isinstance(default, list) else str(_plain(default))
    return f"{text} Default: {shown}."


def _plain(value: Any) -> Any:
    """A whole number without the point that pydantic's floats have."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at(schema: JsonSchema, place: _Place) -> JsonSchema:
    for part in place:
        schema = schema["items"] if part == "[]" else schema["properties"][part]
    return schema


def _status_schema() -> JsonSchema:
    generation = {"type": "integer", "format": "int64", "minimum": 0}
    return {
        "description": "What became of the object; written by pdcoord.",
        "type": "object",
        "properties": {
            "observedGeneration": {
                **generation,
                "description": "The newest generation that was judged.",
            },
            "acceptedGeneration": {
                **generation,
                "description": (
                    "The newest generation that was accepted. While a later one is refused, this one stays "
                    "in force in every process that knew it."
                ),
            },
            "pools": {
                "type": "integer",
                "format": "int32",
                "minimum": 0,
                "description": "How many pools the newest accepted generation has.",
            },
            "conditions": {
                "description": f"{CONDITION}: whether the newest generation is in force, and why not.",
                "type": "array",
                "maxItems": 32,
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": _condition_schema(),
            },
        },
    }


def _condition_schema() -> JsonSchema:
    """As metav1.Condition (Kubernetes 1.37)."""
    return {
        "type": "object",
        "required": ["type", "status", "lastTransitionTime", "reason", "message"],
        "properties": {
            "type": {
                "type": "string",
                "maxLength": 316,
                "pattern": (
                    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
                    r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
                ),
            },
            "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
            "observedGeneration": {"type": "integer", "format": "int64", "minimum": 0},
            "lastTransitionTime": {"type": "string", "format": "date-time"},
            "reason": {
                "type": "string",
                "minLength": 1,
                "maxLength": 1024,
                "pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
            },
            "message": {"type": "string", "maxLength": 32_768},
        },
    }


def main() -> None:
    """Write the definition that the chart installs."""
    CRD_FILE.parent.mkdir(parents=True, exist_ok=True)
    CRD_FILE.write_text(crd_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
