"""Tests that the CustomResourceDefinition is sound, and says what the file's rules say."""

import copy
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pdcoord.policy import crd as crd_module
from pdcoord.policy.commands import definition
from pdcoord.policy.crd import CRD_FILE, MESSAGE_LENGTH_MAX, crd, crd_text, main, spec_schema
from pdcoord.policy.errors import PolicyError
from pdcoord.policy.forms import OUTSIDE, document_of
from pdcoord.policy.load import read_policy
from pdcoord.policy.yamltext import read_documents

ROOT = Path(__file__).resolve().parents[4]
EXAMPLES = sorted((ROOT / "deploy/policies").glob("*.yaml"))
JsonSchema = dict[str, Any]
SPEC: JsonSchema = spec_schema()
EXTENSIONS = {
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-validations",
}
KEYWORDS = {
    "description", "type", "format", "nullable", "enum", "pattern", "minLength", "maxLength", "minimum",
    "maximum", "exclusiveMinimum", "minItems", "maxItems", "minProperties", "maxProperties", "items",
    "properties", "additionalProperties", "required",
}  # fmt: skip
FULL = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: llama}
spec:
  model:
    name: meta/llama
    aliases: [llama, small]
    adapters: [sql]
    bytes_per_token: 4.0
    prefix:
      {mode: approximate, block_tokens: 64, blocks_per_endpoint_max: 1000, precise_block_tokens: 16,
       precise_blocks_max: 2000}
    tokenizer: {file: /models/tokenizer.json, render: "10.0.3.1:8000", deadline_ms: 50.0}
  pools:
    - name: fast
      role: prefill
      vendor: nvidia
      engine: vllm
      connector: pdcoord
      layout:
        {preset: cpu-vec, block_tokens: 16, order: HND, dtype: bfloat16, tensor_parallel: 1, tiling: plain,
         split: packed, head_dim_multiple: 1}
      kv_bytes_per_token: 131072
      link_gbit_per_s: 100.0
      endpoints:
        - {name: f0, address: "10.0.0.1:8000", bootstrap_port: 1, kv_port: 2, metrics_port: 3,
           kv_events_port: 4, kv_events_replay_port: 5}
      speed:
        {prefill_base_ms: 8.0, prefill_ms_per_token: 0.2, prefill_ns_per_token_squared: 1.0,
         step_base_ms: 1.0, step_us_per_sequence: 1.0, step_ns_per_context_token: 1.0}
      cost_per_hour: 1.0
      limits: {in_flight_max: 64, context_tokens_max: 1000}
      priority_max: 5
    - name: wide
      role: decode
      vendor: amd
      engine: vllm
      connector: pdcoord
      layout: {block_tokens: 64}
      kv_bytes_per_token: 131072
      selector: {match_labels: {pdcoord.io/pool: wide}}
      speed: {prefill_base_ms: 8.0, prefill_ms_per_token: 0.1, step_base_ms: 12.0}
  disaggregation:
    {mode: auto, order: sequential, uncached_tokens_min: 256, saving_ms_min: 5.0,
     prefill_deadline_ms: 60000.0, transfer_deadline_ms: 20000.0, lease_ms: 30000.0,
     bandwidth_gbit_per_s_min: 8.0}
  fallback:
    ladder: [other-prefill, colocated]
    other_prefill_max: 2
    other_decode_max: 2
    budget: {colocated_share_max: 1.0, decode_kv_usage_max: 0.5, window_requests: 200}
    resume: {tries_max: 3, age_s_max: 600.0, stall_ms_min: 10000.0}
    hedge: {share_max: 0.05, after_ms_min: 250.0}
    quarantine: {share_max: 0.5}
  slo: {ttft_ms: 2000.0, tpot_ms: 50.0}
  admission:
    {queue_ms_max: 5000.0, wait_ms_max: 30000.0, requests_max: 1024, deadline_excess_max: 0.25,
     low_share_min: 0.05, objectives: {batch: -1}}
  canary:
    {mode: enforce, interval_s: 600.0, timeout_ms: 30000.0, prompt_tokens: 400, output_tokens: 16,
     logprob_tolerance: 0.5}
"""
FULL_DOCUMENT: dict[str, Any] = yaml.safe_load(FULL)
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 10**12, -0.5, 1e15, "", "a b", "é", "x" * 5000, [], ["a", "a"], {"no": 1},
)  # fmt: skip


# What of a structural schema is a rule of Kubernetes'.


def schemas_in(schema: JsonSchema, place: str = "") -> Iterator[tuple[str, JsonSchema]]:
    yield place, schema
    for key, value in schema.get("properties", {}).items():
        yield from schemas_in(value, f"{place}.{key}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from schemas_in(schema[key], f"{place}[{key}]")


def structural_faults(schema: JsonSchema) -> list[str]:
    """What a server would refuse of a schema (apiextensions.k8s.io/v1, structural schemas)."""
    faults: list[str] = []
    for place, each in schemas_in(schema):
        kind = each.get("type")
        faults += [f"{place}: keyword {key}" for key in each.keys() - KEYWORDS - EXTENSIONS]
        if kind not in {"object", "array", "string", "integer", "number", "boolean"}:
            faults.append(f"{place}: type {kind}")
        if (kind == "array") != ("items" in each):
            faults.append(f"{place}: items")
        if "properties" in each and "additionalProperties" in each:
            faults.append(f"{place}: properties beside additionalProperties")
        if kind != "object" and ("properties" in each or "additionalProperties" in each):
            faults.append(f"{place}: {kind} with properties")
        if set(each.get("required", ())) - set(each.get("properties", ())) and place:
            faults.append(f"{place}: required of what is no property")
        if "exclusiveMinimum" in each and not (each["exclusiveMinimum"] is True and "minimum" in each):
            faults.append(f"{place}: exclusiveMinimum is a boolean beside minimum")
        faults += [f"{place}: {fault}" for fault in _list_faults(each)]
    return faults


def _list_faults(schema: JsonSchema) -> Iterator[str]:
    item, keys = schema.get("items", {}), schema.get("x-kubernetes-list-map-keys")
    match schema.get("x-kubernetes-list-type"):
        case "map":
            scalars = {"string", "integer", "number", "boolean"}
            for key in keys or [""]:
                value = item.get("properties", {}).get(key, {})
                if value.get("type") not in scalars or value.get("nullable") or key not in item["required"]:
                    yield f"map key {key!r}"
        case "set":
            if item.get("type") not in {"string", "integer", "number", "boolean"} or item.get("nullable"):
                yield "a set's items"
        case None:
            if keys:
                yield "map keys without a map"
        case other:
            yield f"list type {other}"


def object_schema() -> JsonSchema:
    (version,) = crd()["spec"]["versions"]
    schema: JsonSchema = version["schema"]["openAPIV3Schema"]
    return schema


def test_the_schema_is_structural() -> None:
    assert structural_faults(object_schema()) == []


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#/b", "type": "string"}}}, ".a: keyword $ref"),
        ({"type": "object", "properties": {"a": {}}}, ".a: type None"),
        ({"type": "object", "properties": {}, "additionalProperties": {"type": "string"}}, "beside"),
        ({"type": "array"}, ": items"),
        ({"type": "number", "exclusiveMinimum": 0}, "exclusiveMinimum"),
        ({"type": "array", "items": {"type": "object"}, "x-kubernetes-list-type": "set"}, "a set's items"),
    ],
)
def test_the_check_of_structure_sees(broken: JsonSchema, fault: str) -> None:
    assert any(fault in found for found in structural_faults(broken))


def test_every_list_and_mapping_that_a_rule_looks_into_is_bounded() -> None:
    """What bounds the cost that a server reckons a rule to have."""
    for place, schema in schemas_in(SPEC):
        if place.endswith(".ladder"):
            continue  # A set of an enum.
        if schema["type"] == "array":
            assert schema["maxItems"] <= 4096, place
        if "additionalProperties" in schema:
            assert schema["maxProperties"] <= 64, place
        if schema["type"] == "string" and "enum" not in schema:
            assert schema["maxLength"] <= 4096, place


def test_the_definition_is_sound_for_the_newest_servers() -> None:
    for version in kubernetes_validate.utils.all_versions()[-3:]:
        kubernetes_validate.validate(crd(), version, strict=True)


def test_the_chart_has_the_definition_as_it_is_printed() -> None:
    assert (ROOT / CRD_FILE).read_text(encoding="utf-8") == crd_text(), "run make docs"
    assert definition() == crd_text()
    assert yaml.safe_load(crd_text()) == crd()


def test_the_file_is_written_where_the_chart_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main()
    assert CRD_FILE.read_text(encoding="utf-8") == crd_text()


def test_a_keyword_that_cannot_be_said_is_no_silent_loss() -> None:
    with pytest.raises(ValueError, match="no structural schema is known for the keywords multipleOf"):
        crd_module._structural({"type": "integer", "multipleOf": 2})


def test_defaults_are_told_and_not_set() -> None:
    """A default that the server wrote would stand for what somebody chose, over a layout's preset."""
    schema = SPEC
    assert all("default" not in each for _, each in schemas_in(schema))
    layout = schema["properties"]["pools"]["items"]["properties"]["layout"]
    assert layout["properties"]["order"]["description"].endswith("Default: NHD.")
    assert "required" not in layout
    assert layout["nullable"]
    ladder = schema["properties"]["fallback"]["properties"]["ladder"]["description"]
    assert ladder.endswith("Default: other-prefill, colocated, other-decode, resume.")


def test_the_status_holds_what_is_written() -> None:
    message = object_schema()["properties"]["status"]["properties"]["conditions"]["items"]["properties"]
    assert message["message"]["maxLength"] >= MESSAGE_LENGTH_MAX


# The schema and its rules, as a server applies them.


def as_draft4(schema: JsonSchema) -> JsonSchema:
    """For jsonschema: OpenAPI v3.0 is draft 4 with `nullable`, and a server's own words left out."""
    made = {
        key: value for key, value in schema.items() if key in KEYWORDS - {"description", "nullable", "format"}
    }
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = as_draft4(made[key])
    if "properties" in made:
        made["properties"] = {key: as_draft4(value) for key, value in made["properties"].items()}
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@functools.lru_cache(maxsize=1)
def spec_validator() -> jsonschema.Draft4Validator:
    return jsonschema.Draft4Validator(as_draft4(SPEC))


def is_taken(spec: Any) -> bool:
    """Whether a server would store a spec: types and ranges, sets and maps, then rules."""
    if not spec_validator().is_valid(spec):
        return False
    return all(_is_lawful(each, found) for each, found in _pairs(SPEC, spec))


def pruned(schema: JsonSchema, value: Any) -> Any:
    """What a server keeps of a value that it takes: no key that the schema does not have."""
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return {key: pruned(known[key], beneath) for key, beneath in value.items() if key in known}
    return [pruned(schema["items"], each) for each in value] if isinstance(value, list) else value


def _pairs(schema: JsonSchema, value: Any) -> Iterator[tuple[JsonSchema, Any]]:
    if value is None:
        return
    yield schema, value
    for key, beneath in schema.get("properties", {}).items():
        if key in value:
            yield from _pairs(beneath, value[key])
    for each in value if "items" in schema else ():
        yield from _pairs(schema["items"], each)


def _is_lawful(schema: JsonSchema, value: Any) -> bool:
    if kind := schema.get("x-kubernetes-list-type"):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        seen = [json.dumps([each[key] for key in keys] if kind == "map" else each) for each in value]
        if len(set(seen)) < len(seen):
            return False
    return all(holds(rule["rule"], value) for rule in schema.get("x-kubernetes-validations", ()))


def holds(rule: str, value: Any) -> bool:
    """One of our CEL rules, with the few things that they say put into Python; null counts as absent."""
    said = re.sub(r"self\.pools\.exists\(p, (.*)\)", r"any(\1 for p in value['pools'])", rule)
    said = re.sub(r"!?has\(self\.(\w+)\)", r"(value.get('\1') is not None)", said)
    said = re.sub(r"\((.*?) \? (.*?) : (.*?)\)(?= <|$)", r"(\2 if \1 else \3)", said)
    said = re.sub(r"\bself\.(\w+)", r"value['\1']", re.sub(r"\bp\.(\w+)", r"p['\1']", said))
    assert "!has" not in rule, "negation is not put into Python here"
    code = said.replace("||", " or ").replace("&&", " and ")
    return bool(eval(code, {"value": value, "any": any}))  # noqa: S307  # our own constants


def full() -> dict[str, Any]:
    return copy.deepcopy(FULL_DOCUMENT)


def is_sound(given: dict[str, Any]) -> bool:
    try:
        read_policy(document_of(given))
    except PolicyError:
        return False
    return True


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_taken(path: Path) -> None:
    for document in read_documents(path):
        assert isinstance(document.data, dict)
        if document.data["kind"] != "PoolPolicy":
            continue
        spec = {key: value for key, value in document.data.items() if key not in OUTSIDE}
        assert list(spec_validator().iter_errors(spec)) == []
        assert is_taken(spec)


def test_a_policy_with_every_key_is_taken() -> None:
    given = full()
    assert is_sound(given)
    assert is_taken(given["spec"])
    written = {place.replace("[items]", "") for place, _ in schemas_in(SPEC)}
    assert {re.sub(r"\[\d+\]", "", place) for place, *_ in places_in(given["spec"])} >= {
        place for place in written if place and "[" not in place
    }


def places_in(value: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, container, key) of every value in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, beneath in entries:
        beneath_place = f"{place}.{key}" if isinstance(value, dict) else f"{place}[{key}]"
        yield beneath_place, value, key
        if isinstance(beneath, dict | list):
            yield from places_in(beneath, beneath_place)


def mutations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The full policy with one value of it changed or left out, everywhere and in every way."""
    count = sum(1 for _ in places_in(full()["spec"]))
    for index in range(count):
        for wrong in (*WRONG, ...):
            given = full()
            place, container, key = list(places_in(given["spec"]))[index]
            if wrong is ...:
                del container[key]
            else:
                container[key] = copy.deepcopy(wrong)
            yield place, "nothing" if wrong is ... else str(wrong)[:20], given


BEYOND = {
    ".pools[0].endpoints[0].kv_events_port",
    ".pools[0].speed",
    ".pools[1].speed",
    ".pools[1].speed.step_base_ms",
}
"""Where what is wrong lies between several values, in more places than a rule may look at."""


def test_a_server_refuses_what_the_file_refuses_and_nothing_else() -> None:
    """Every key with every kind of wrong value: one that one of both takes is taken by the other."""
    differing: dict[str, str] = {}
    count = 0
    for place, what, given in mutations():
        count += 1
        is_stored = is_taken(given["spec"])
        if is_stored:
            given["spec"] = pruned(SPEC, given["spec"])
        if is_stored != is_sound(given):
            differing[place] = what
            assert is_stored, f"only the server refuses {what} at {place}"
    assert count > 1000
    assert differing.keys() == BEYOND, differing


@pytest.mark.parametrize(
    ("change", "is_good"),
    [
        (lambda spec: spec["pools"][0].update(role="both", endpoints=None), False),
        (lambda spec: spec["pools"][0].update(selector={"match_labels": {"a": "b"}}), False),
        (lambda spec: spec["pools"][0].update(engine="sglang"), False),
        (lambda spec: spec["pools"][0].update(connector="sglang"), False),
        (lambda spec: spec["pools"][0].update(engine="sglang", connector="sglang"), True),
        (lambda spec: spec["pools"][1].update(role="prefill"), False),
        (lambda spec: spec["pools"][1].update(name="fast"), False),
        (lambda spec: spec["pools"][1]["layout"].clear(), False),
        (lambda spec: spec["pools"][0]["layout"].pop("block_tokens"), True),
        (lambda spec: spec["disaggregation"].update(lease_ms=20000.0), False),
        (lambda spec: spec["disaggregation"].pop("lease_ms"), True),
        (lambda spec: spec["fallback"].update(ladder=["colocated", "colocated"]), False),
        (lambda spec: spec["pools"][0]["endpoints"].append({"address": "10.0.0.1:8000"}), False),
    ],
)
def test_rules_between_values(change: Callable[[dict[str, Any]], object], is_good: bool) -> None:
    given = full()
    change(given["spec"])
    assert is_taken(given["spec"]) is is_good


@pytest.mark.parametrize("name", ["llama", "a" * 63, "a" * 64, "llama-3.1"])
def test_names_of_objects(name: str) -> None:
    given = full() | {"metadata": {"name": name}}
    (rule,) = object_schema()["x-kubernetes-validations"]
    assert rule["rule"] == "size(self.metadata.name) <= 63 && !self.metadata.name.contains('.')"
    assert is_sound(given) is (len(name) <= 63 and "." not in name)
