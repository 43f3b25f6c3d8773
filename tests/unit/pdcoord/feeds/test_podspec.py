"""Pods to endpoints: what each field does, what is wrong by name, and that no pod breaks anything."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.feeds.podspec import (
    PoolTerms,
    Skipped,
    SkipReason,
    keep_of_pod,
    read_inference_pool,
    read_pod,
)
from pdcoord.policy.endpoints import EndpointEntrySpec

READY = [{"type": "Ready", "status": "True"}]


def pod(
    *,
    annotations: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any] | None = None,
    **status: Any,
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "engine-0",
            "namespace": "ns",
            "uid": "u",
            "labels": {"llm-d.ai/role": "decode"} if labels is None else dict(labels),
            "annotations": {f"pdcoord.io/{key}": value for key, value in (annotations or {}).items()},
            "managedFields": [{"manager": "kubelet"}],
        },
        "spec": dict(spec or {"containers": [{"name": "engine", "image": "x"}]}),
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": READY, **status},
    }


def entries(
    given: Mapping[str, Any], ports: tuple[int, ...] = (), **more: bool
) -> tuple[EndpointEntrySpec, ...]:
    found = read_pod(given, ports, **more)
    assert not isinstance(found, Skipped), found
    return found


def skipped(given: Mapping[str, Any], **more: bool) -> str:
    found = read_pod(given, **more)
    assert isinstance(found, Skipped), found
    return f"{found.reason}: {found.message}"


def test_a_plain_pod_is_one_endpoint() -> None:
    (entry,) = entries(pod())
    assert (entry.address, entry.name, entry.is_draining) == ("10.0.0.1:8000", "engine-0", False)
    assert entry.labels == {"llm-d.ai/role": "decode", "pdcoord.io/role": "decode"}
    ports = (entry.kv_port, entry.metrics_port, entry.bootstrap_port, entry.kv_events_port)
    assert ports == (None, None, None, None)


def test_every_annotation_has_its_place() -> None:
    given = pod(
        annotations={
            "port": "1",
            "metrics-port": "9400",
            "kv-port": "3",
            "bootstrap-port": "4",
            "kv-events-port": "5557",
            "kv-events-replay-port": "5558",
            "revision": "r7",
        }
    )
    (entry,) = entries(given)
    assert entry.address == "10.0.0.1:1"
    assert (entry.metrics_port, entry.kv_port, entry.bootstrap_port) == (9400, 3, 4)
    assert (entry.kv_events_port, entry.kv_events_replay_port) == (5557, 5558)
    assert entry.labels["pdcoord.io/revision"] == "r7"


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        ("prefill", "prefill"),
        ("encode-prefill", "prefill"),
        ("decode", "decode"),
        ("encode-decode", "decode"),
        ("both", "both"),
        ("prefill-decode", "both"),
        ("encode-prefill-decode", "both"),
    ],
)
def test_compound_roles_become_those_that_pools_have(role: str, expected: str) -> None:
    (entry,) = entries(pod(labels={"llm-d.ai/role": role}))
    assert entry.labels["pdcoord.io/role"] == expected
    (entry,) = entries(pod(labels={"llm-d.ai/role": role, "pdcoord.io/role": "own"}))
    assert entry.labels["pdcoord.io/role"] == "own"


def test_a_pod_may_be_picked_by_labels_of_its_own() -> None:
    (entry,) = entries(pod(labels={"app": "x"}))
    assert entry.labels == {"app": "x"}


def test_the_revision_is_the_controllers_if_the_pod_says_none() -> None:
    (entry,) = entries(pod(labels={"pod-template-hash": "5d", "controller-revision-hash": "7f"}))
    assert entry.labels["pdcoord.io/revision"] == "5d"
    (entry,) = entries(pod(labels={"controller-revision-hash": "7f"}))
    assert entry.labels["pdcoord.io/revision"] == "7f"


def test_the_port_called_http_is_where_requests_go_and_a_sidecars_goes_first() -> None:
    engine = {
        "name": "engine",
        "ports": [{"name": "metrics", "containerPort": 1}, {"name": "http", "containerPort": 8200}],
    }
    (entry,) = entries(pod(spec={"containers": [engine]}))
    assert entry.address == "10.0.0.1:8200"
    sidecar = {"name": "proxy", "restartPolicy": "Always", "ports": [{"name": "http", "containerPort": 8001}]}
    given = pod(
        spec={"containers": [engine], "initContainers": [sidecar]},
        initContainerStatuses=[{"name": "proxy", "ready": True}],
    )
    (entry,) = entries(given)
    assert entry.address == "10.0.0.1:8001"


def test_ranks_are_endpoints_at_the_ports_that_follow() -> None:
    given = pod(
        annotations={
            "data-parallel-size": "3",
            "kv-port": "5600",
            "metrics-port": "9400",
            "bootstrap-port": "8998",
        }
    )
    found = entries(given)
    assert [entry.name for entry in found] == ["engine-0_0", "engine-0_1", "engine-0_2"]
    assert [entry.address for entry in found] == ["10.0.0.1:8000", "10.0.0.1:8001", "10.0.0.1:8002"]
    assert [entry.kv_port for entry in found] == [5600, 5601, 5602]
    assert [entry.bootstrap_port for entry in found] == [8998, 8998, 8998]


def test_an_inference_pools_ports_go_before_the_pods() -> None:
    given = pod(annotations={"port": "1", "data-parallel-size": "2"})
    assert [entry.address for entry in entries(given, (9000,))] == ["10.0.0.1:9000", "10.0.0.1:9001"]
    found = entries(given, (9000, 9005, 9001))
    assert [entry.address for entry in found] == ["10.0.0.1:9000", "10.0.0.1:9005", "10.0.0.1:9001"]
    assert [entry.name for entry in found] == ["engine-0_0", "engine-0_1", "engine-0_2"]


def test_addresses_may_be_ipv6() -> None:
    (entry,) = entries(pod(podIP="2001:DB8::1"))
    assert entry.address == "[2001:db8::1]:8000"


def test_a_pod_that_terminates_drains_at_once_whatever_its_readiness() -> None:
    given = pod(conditions=[])
    given["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    (entry,) = entries(given)
    assert entry.is_draining


def test_a_pod_that_was_ready_drains_until_it_is_again() -> None:
    given = pod(conditions=[{"type": "Ready", "status": "False"}])
    assert skipped(given) == "not-ready: is not ready"
    assert [entry.is_draining for entry in entries(given, was_ready=True)] == [True]
    assert [entry.is_draining for entry in entries(pod(), was_ready=True)] == [False]


def test_a_native_sidecar_has_to_be_ready_too() -> None:
    spec = {
        "containers": [{"name": "engine"}],
        "initContainers": [{"name": "fetch"}, {"name": "proxy", "restartPolicy": "Always"}],
    }
    message = 'not-ready: is not ready: its sidecar "proxy" is not'
    assert skipped(pod(spec=spec)) == message
    assert skipped(pod(spec=spec, initContainerStatuses=[{"name": "proxy", "ready": False}])) == message
    entries(pod(spec=spec, initContainerStatuses=[{"name": "proxy", "ready": True}]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (pod(phase="Succeeded"), "not-running: is in phase Succeeded"),
        (pod(podIP=None), "no-address: has no status.podIP yet"),
        (pod(labels={}), "no-labels: has no labels, so no pool's selector can pick it"),
        (
            pod(annotations={"port": "http"}),
            'bad-annotation: has pdcoord.io/port="http", expected a whole number from 1 to 65535',
        ),
        (
            pod(annotations={"kv-port": "0"}),
            'bad-annotation: has pdcoord.io/kv-port="0", expected a whole number from 1 to 65535',
        ),
        (
            pod(annotations={"data-parallel-size": "65"}),
            'bad-annotation: has pdcoord.io/data-parallel-size="65", expected a whole number from 1 to 64',
        ),
        (
            pod(annotations={"data-parallel-size": "2", "port": "65535"}),
            "bad-annotation: has 2 ranks from port 65535 on, expected ports up to 65535",
        ),
        (
            pod(annotations={"data-parallel-size": "2", "kv-port": "65535"}),
            'bad-annotation: has pdcoord.io/kv-port="65535" for 2 ranks, expected up to 65535',
        ),
        (
            pod(annotations={"revision": "a b"}),
            'bad-annotation: has pdcoord.io/revision="a b", expected a label\'s value',
        ),
        (
            pod(labels={"llm-d.ai/role": "encode"}),
            (
                'bad-label: has llm-d.ai/role="encode", which takes no leg; expected prefill, '
                "encode-prefill, decode, encode-decode, both, prefill-decode, encode-prefill-decode"
            ),
        ),
        (pod(labels={"a": 3}), 'bad-label: has a label that is none: "a"'),
        ({}, "malformed: has no metadata.name"),
    ],
)
def test_each_reason_names_what_to_change(given: Mapping[str, Any], expected: str) -> None:
    assert skipped(given) == expected
    assert skipped(keep_of_pod(given)) == expected


def test_an_address_that_is_none_is_named() -> None:
    assert skipped(pod(podIP="not an address")).startswith("malformed: gives no endpoint: address: ")


def test_of_very_many_labels_ours_are_kept() -> None:
    labels = {f"a{i:03}": "x" for i in range(90)} | {"pdcoord.io/pool": "p", "llm-d.ai/role": "both"}
    (entry,) = entries(pod(labels=labels | {"pod-template-hash": "5d"}))
    assert len(entry.labels) == 64
    assert entry.labels["pdcoord.io/pool"] == "p"
    assert entry.labels["pdcoord.io/revision"] == "5d"


def test_reasons_that_pass_by_themselves_are_no_faults() -> None:
    passing = {reason for reason in SkipReason if not reason.is_fault}
    assert passing == {SkipReason.NOT_RUNNING, SkipReason.NO_ADDRESS, SkipReason.NOT_READY}


def test_an_inference_pool_is_read_and_what_is_wrong_with_it_is_named() -> None:
    def pool(labels: object, ports: object) -> dict[str, Any]:
        return {"spec": {"selector": {"matchLabels": labels}, "targetPorts": ports}}

    terms = read_inference_pool(pool({"b": "2", "a": "1"}, [{"number": 8000}, {"number": 8001}]))
    assert terms == PoolTerms({"b": "2", "a": "1"}, (8000, 8001))
    assert isinstance(terms, PoolTerms)
    assert terms.selector == "a=1,b=2"
    for found_wrong, expected in (
        ({}, "spec.selector.matchLabels is empty"),
        (pool({"a": 3}, [{"number": 1}]), "spec.selector.matchLabels has what is no label"),
        (pool({"a": "1"}, []), 'spec.targetPorts is "[]", expected 1 to 8 different port numbers'),
        (pool({"a": "1"}, [{"number": 70_000}]), "spec.targetPorts"),
        (pool({"a": "1"}, [{"number": True}]), "spec.targetPorts"),
        (pool({"a": "1"}, [{"number": 1}, {"number": 1}]), "spec.targetPorts"),
        (pool({"a": "1"}, [{"number": i} for i in range(1, 10)]), "spec.targetPorts"),
    ):
        found = read_inference_pool(found_wrong)
        assert isinstance(found, str)
        assert found.startswith(expected)


NESTED: list[Any] = [[], {}, ["x"], [{"name": []}], [{"name": {}, "ready": True, "restartPolicy": "Always"}]]
SCRAPS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=6), st.sampled_from(NESTED))
PATHS = [
    ("metadata",),
    ("metadata", "name"),
    ("metadata", "labels"),
    ("metadata", "labels", "llm-d.ai/role"),
    ("metadata", "annotations"),
    ("metadata", "annotations", "pdcoord.io/port"),
    ("metadata", "annotations", "pdcoord.io/data-parallel-size"),
    ("metadata", "annotations", "pdcoord.io/revision"),
    ("metadata", "deletionTimestamp"),
    ("spec",),
    ("spec", "containers"),
    ("spec", "initContainers"),
    ("status",),
    ("status", "phase"),
    ("status", "podIP"),
    ("status", "conditions"),
    ("status", "initContainerStatuses"),
]


@given(st.data())
def test_a_pod_of_any_shape_is_read_or_skipped_and_what_is_kept_of_it_reads_the_same(
    data: st.DataObject,
) -> None:
    given = copy.deepcopy(pod(annotations={"data-parallel-size": "2"}))
    for *parents, last in data.draw(st.lists(st.sampled_from(PATHS), max_size=4)):
        at: Any = given
        for key in parents:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at[last] = data.draw(SCRAPS)
    ports = data.draw(st.sampled_from([(), (1,), (1, 2)]))
    was_ready = data.draw(st.booleans())
    found = read_pod(given, ports, was_ready=was_ready)
    assert read_pod(keep_of_pod(given), ports, was_ready=was_ready) == found
    if not isinstance(found, Skipped):
        assert len({entry.address for entry in found}) == len(found) == len({entry.name for entry in found})
