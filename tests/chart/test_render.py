"""Every value set renders to objects that Kubernetes takes, and to a policy that pdcoord takes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import referencing
import yaml
from helm_python import lint

from pdcoord.policy.compile import CompiledPolicy, compile_policy
from pdcoord.policy.load import parse_policies

MINORS = kubernetes_validate.utils.all_versions()[-3:]
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Kinds of others, whose schemas are in no package here.
FOREIGN = {
    "DestinationRule",
    "HTTPRoute",
    "InferencePool",
    "LeaderWorkerSet",
    "PodMonitor",
    "PrometheusRule",
    "ScaledObject",
    "ServiceMonitor",
}


@cache
def validator(minor: str, kind: str, api: str) -> Any:
    """As kubernetes_validate.validate makes one for each object, but once."""
    folder = SCHEMAS / f"v{minor}-local-strict"
    group, _, version = api.rpartition("/")
    name = "-".join(part for part in (group.split(".")[0], version) if part)
    schema = json.loads((folder / f"{kind.lower()}-{name}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=definitions(minor))


@cache
def definitions(minor: str) -> Any:
    contents = json.loads((SCHEMAS / f"v{minor}-local-strict" / "_definitions.json").read_text())
    resource = referencing.Resource.from_contents(contents)
    return resource @ referencing.Registry()


@cache
def custom(path: Path) -> Any:
    """A CRD's own schema, with unknown keys refused as an API server would prune them."""
    definition = yaml.safe_load(path.read_text())
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    close(schema)
    return jsonschema.Draft202012Validator(schema)


def close(node: Any) -> None:
    if isinstance(node, dict):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        for value in node.values():
            close(value)
    elif isinstance(node, list):
        for value in node:
            close(value)


def kinds_and_versions(release: Any) -> list[tuple[str, Any]]:
    owners = [owner for owner, _ in release.templates() if owner["metadata"].get("annotations")]
    return [(given["kind"], given) for given in (*release.objects, *owners)]


@pytest.mark.parametrize("minor", MINORS)
def test_every_object_is_one_that_kubernetes_takes(release: Any, minor: str) -> None:
    for kind, given in kinds_and_versions(release):
        if kind in FOREIGN or kind == "PoolPolicy":
            continue
        faults = list(validator(minor, kind, given["apiVersion"]).iter_errors(given))
        assert not faults, f"{kind} {given['metadata']['name']}: {faults[0].json_path}: {faults[0].message}"


@pytest.mark.parametrize("minor", MINORS)
def test_pod_templates_of_others_are_pods_that_kubernetes_takes(release: Any, minor: str) -> None:
    """A LeaderWorkerSet holds pod templates: each is judged as a Deployment's."""
    for owner, template in release.templates():
        selector = {"matchLabels": template["metadata"]["labels"]}
        given = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": owner["metadata"]["name"]},
            "spec": {"selector": selector, "template": template},
        }
        faults = list(validator(minor, "Deployment", "apps/v1").iter_errors(given))
        assert not faults, f"{owner['metadata']['name']}: {faults[0].json_path}: {faults[0].message}"


def test_the_cached_validator_judges_as_kubernetes_validate_does(release_named: Any) -> None:
    given = release_named("two-vendors").of("Service")[0]
    assert kubernetes_validate.validate(given, MINORS[-1], strict=True)
    broken = {**given, "spec": {**given["spec"], "nonsense": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, MINORS[-1], strict=True)
    assert list(validator(MINORS[-1], "Service", "v1").iter_errors(broken))


def test_custom_resources_are_what_their_definition_takes(release: Any, chart_folder: Path) -> None:
    for given in release.of("PoolPolicy"):
        faults = list(custom(chart_folder / "crds" / "poolpolicies.yaml").iter_errors(given))
        assert not faults, f"{faults[0].json_path}: {faults[0].message}"


def test_every_object_has_a_name_of_its_own_and_the_namespace(release: Any) -> None:
    names = [(given["kind"], given["metadata"]["name"]) for given in release.objects]
    assert len(names) == len(set(names))
    for given in release.objects:
        assert given["metadata"]["namespace"] == "llm"
        assert given["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"
        assert len(given["metadata"]["name"]) <= 63


def policy_of(release: Any) -> CompiledPolicy:
    """The policy as coordinators will have it, from whatever source."""
    documents = [
        {key: given[key] for key in ("apiVersion", "kind")}
        | {"metadata": {"name": given["metadata"]["name"]}}
        | given["spec"]
        for given in release.of("PoolPolicy")
    ]
    maps = [given for given in release.of("ConfigMap") if given["metadata"]["name"].endswith("-policy")]
    text = yaml.safe_dump_all(documents) if documents else maps[0]["data"]["policy.yaml"]
    assert bool(documents) != bool(maps)
    return compile_policy(parse_policies(text.encode(), "policy.yaml"))


def test_the_policy_is_one_that_pdcoord_takes(release: Any) -> None:
    policy = policy_of(release)
    assert len(policy.bindings) == sum(len(model["pools"]) for model in release.values["models"])
    assert all(binding.match_labels for binding in policy.bindings)


def test_off_the_same_values_serve_whole_requests(release_named: Any) -> None:
    on, off = release_named("two-vendors"), release_named("colocated")
    assert [pool.role for pool in pools_of(on)] == ["prefill", "decode"]
    assert [(pool.role, pool.connector) for pool in pools_of(off)] == [("both", "none")] * 2
    servers = [given["metadata"]["name"] for given in off.of("Deployment")]
    assert servers == [given["metadata"]["name"] for given in on.of("Deployment")]
    for _, template in off.templates():
        assert "initContainers" not in template["spec"]
        arguments = " ".join(template["spec"]["containers"][0].get("args", []))
        assert "kv-transfer-config" not in arguments
    assert not off.of("Secret")


def pools_of(release: Any) -> list[Any]:
    text = release.one("ConfigMap", "demo-pdcoord-policy")["data"]["policy.yaml"]
    return [pool for document in parse_policies(text.encode(), "policy.yaml") for pool in document.spec.pools]


def test_helm_lints_it(chart_folder: Path, release: Any) -> None:
    report = lint(chart_folder, dict(release.values), strict=True)
    found = [message for message in report["messages"] if message["severity"] >= 2]
    assert not found
    assert not report["errors"]
