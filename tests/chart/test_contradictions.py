"""Values that contradict each other render nothing, and the message names value, content and remedy."""

import copy
from typing import Any

import pytest
from helm_python import HelmError

EXISTING = {"matchLabels": {"app": "a"}}
# (what differs, by path; what the message says)
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"models": []}, "models is empty: name at least one model with its pools"),
    (
        {"models.0.pools.1.role": "prefill"},
        (
            "pd.enabled is true but no pool of models[0] (granite) decodes: "
            "set role: decode or both on one of models[0].pools"
        ),
    ),
    (
        {"models.0.pools.0.role": "decode"},
        "pd.enabled is true but no pool of models[0] (granite) prefills: set role: prefill or both",
    ),
    (
        {"models.0.pools.0.terminationGracePeriodSeconds": 20},
        "models[0].pools[0].terminationGracePeriodSeconds is 20, below pd.leaseSeconds (30)",
    ),
    (
        {"transfer.image.repository": ""},
        'models[0].pools[0].connector is "pdcoord" but transfer.image.repository is empty',
    ),
    (
        {"models.0.pools.1.vendor": "tpu"},
        'models[0].pools[1].vendor is "tpu", expected one of amd, cpu, gaudi, nvidia, xpu',
    ),
    (
        {"models.0.pools.1.name": "prefill"},
        'models[0].pools[1].name is "prefill", which models[0].pools[0] has too',
    ),
    (
        {"models.0.aliases": ["ibm/granite"]},
        'models[0].aliases[0] is "ibm/granite", which models[0].name is too',
    ),
    (
        {"models.0.adapters": ["sql", "g"]},
        'models[0].adapters[1] is "g", which models[0].aliases[0] is too',
    ),
    (
        {
            "models.0.adapters": ["ibm/granite:sql", "law"],
            "models.0.pools.0.engine": "sglang",
            "models.0.pools.0.connector": "sglang",
        },
        (
            'models[0].adapters[1] is "law"; name it "ibm/granite:<name>": '
            "so SGLang (models[0].pools[0]) knows an adapter"
        ),
    ),
    ({"gateway.mode": "attach"}, "gateway.mode is attach but gateway.attach.gateway.name is empty"),
    (
        {"gateway.attach.gateway.name": "main"},
        'gateway.attach.gateway.name is "main" but gateway.mode is embedded',
    ),
    (
        {"gateway.mode": "envoy", "gateway.extproc.failureMode": "FailOpen"},
        "gateway.extproc.failureMode is FailOpen with gateway.mode envoy",
    ),
    (
        {"gateway.attach.destinationRule.enabled": True},
        "gateway.attach.destinationRule.enabled is true: it needs gateway.mode attach",
    ),
    (
        {"coordinator.replicas": 0},
        "coordinator.replicas is 0 with coordinator.podDisruptionBudget.enabled true",
    ),
    (
        {"coordinator.terminationGracePeriodSeconds": 20},
        (
            "coordinator.terminationGracePeriodSeconds is 20, below coordinator.drainNoticeSeconds + "
            "coordinator.drainSeconds (35)"
        ),
    ),
    ({"coordinator.env.PDCOORD_PORT": "1"}, 'coordinator.env.PDCOORD_PORT is "1", but the chart sets it'),
    ({"serviceAccount.create": False}, "serviceAccount.create is false and serviceAccount.name is empty"),
    (
        {"models.0.pools.0.connector": "none"},
        'models[0].pools[0].connector is "none" with role prefill: its KV could not move',
    ),
    (
        {"models.0.pools.0.connector": "sglang"},
        'models[0].pools[0].connector is "sglang" with engine vllm',
    ),
    (
        {"models.0.pools.0.engine": "sglang", "models.0.pools.0.connector": "nixl"},
        'models[0].pools[0].connector is "nixl" with engine sglang',
    ),
    (
        {
            "models.0.pools.1.engine": "sglang",
            "models.0.pools.1.role": "both",
            "models.0.pools.1.connector": "sglang",
        },
        'models[0].pools[1].role is "both" with connector sglang',
    ),
    ({"models.0.pools.0.linkGbitPerSecond": None}, "models[0].pools[0].linkGbitPerSecond is not set"),
    (
        {"models.0.pools.0.vendor": "gaudi"},
        "models[0].pools[0].image.repository is empty, and so is vendors.gaudi",
    ),
    (
        {"models.0.pools.0.vendor": "gaudi", "models.0.pools.0.image": {"repository": "x"}},
        "models[0].pools[0].image.tag is empty",
    ),
    (
        {"models.0.pools.0.accelerators": 4, "models.0.pools.0.tensorParallel": 3},
        "models[0].pools[0].tensorParallel is 3 with 4 accelerators",
    ),
    (
        {"models.0.pools.0.size": 2, "models.0.pools.0.tensorParallel": 1},
        "models[0].pools[0].tensorParallel is 1 with size 2",
    ),
    (
        {"models.0.pools.0.size": 2, "models.0.pools.0.engine": "sglang"},
        "models[0].pools[0].size is 2 with engine sglang",
    ),
    (
        {"models.0.pools.0.vendor": "cpu", "models.0.pools.0.rdma": {"count": 1}},
        (
            "models[0].pools[0].rdma.count is 1 but neither models[0].pools[0].rdma.resource nor "
            "vendors.cpu.rdmaResource"
        ),
    ),
    (
        {"models.0.policy.disaggregation.transfer_deadline_ms": 30000},
        "models[0].policy.disaggregation.transfer_deadline_ms is 30000, not below pd.leaseSeconds (30000 ms)",
    ),
    (
        {"models.0.policy.disaggregation.lease_ms": 30000},
        "models[0].policy.disaggregation.lease_ms is set: set pd.leaseSeconds",
    ),
    (
        {"models.0.pools.0.existing": EXISTING},
        "models[0].pools[0].existing is set but adopt.enabled is false",
    ),
    ({"adopt.enabled": True}, "adopt.enabled is true but no pool has existing"),
    (
        {"adopt.enabled": True, "models.0.pools.0.existing": EXISTING},
        "adopt.podSelector is empty, and no one label key selects all pools",
    ),
    (
        {"adopt.enabled": True, "models.0.pools.1.existing": EXISTING},
        "models[0].pools[1].existing.deployment is not set: the patch that puts the sidecar in needs",
    ),
    (
        {
            "adopt.enabled": True,
            "models.0.pools.1.existing": {**EXISTING, "deployment": "d", "port": 8001},
        },
        "models[0].pools[1].existing.sidecarPort is 8001, the port of the engine itself",
    ),
    (
        {"models.0.pools.0.autoscaling": {"min": 1, "max": 2}},
        "models[0].pools[0].autoscaling is set but autoscaling.mode is none",
    ),
    (
        {
            "autoscaling.mode": "hpa",
            "models.0.pools.0.replicas": 1,
            "models.0.pools.0.autoscaling": {"min": 1, "max": 2},
        },
        "models[0].pools[0].replicas is 1 beside autoscaling",
    ),
    (
        {"autoscaling.mode": "hpa", "models.0.pools.0.autoscaling": {"min": 3, "max": 2}},
        "models[0].pools[0].autoscaling.max is 2, below models[0].pools[0].autoscaling.min (3)",
    ),
    (
        {"autoscaling.mode": "hpa", "models.0.pools.0.autoscaling": {"min": 0, "max": 2}},
        "models[0].pools[0].autoscaling.min is 0: calls for a pool without servers are refused at once",
    ),
    (
        {"autoscaling.mode": "keda"},
        "autoscaling.mode is keda but autoscaling.keda.prometheusAddress is empty",
    ),
    (
        {"autoscaling.mode": "hpa", "autoscaling.keda.prometheusAddress": "http://p"},
        'autoscaling.keda.prometheusAddress is "http://p" but autoscaling.mode is hpa',
    ),
    (
        {
            "fullnameOverride": "a-name-that-is-nearly-forty-letters-long",
            "models.0.pools.0.name": "a-long-pool-name",
        },
        'models[0].pools[0].name is "a-long-pool-name", which makes the object name',
    ),
]
# (what differs; the place that the schema's complaint names)
NOT_OF_THE_SCHEMA: list[tuple[dict[str, Any], str]] = [
    ({"pd.enable": True}, "/pd"),
    ({"models.0.pools.0.role": "encode"}, "/models/0/pools/0/role"),
    ({"models.0.pools.0.layout": {"odrer": "HND"}}, "/models/0/pools/0/layout"),
    ({"models.0.policy": {"slo": {"ttft": 1}}}, "/models/0/policy/slo"),
    ({"models.0.policy": {"model": {"aliases": ["a"]}}}, "/models/0/policy/model"),
    ({"models.0.policy": {"model": {"adapters": ["a"]}}}, "/models/0/policy/model"),
    ({"models.0.kvBytesPerToken": "many"}, "/models/0/kvBytesPerToken"),
    ({"gateway.mode": "nginx"}, "/gateway/mode"),
    ({"pd.leaseSeconds": 0}, "/pd/leaseSeconds"),
    ({"unheard": 1}, "unheard"),
]


def test_what_the_cases_change_renders(render: Any, changed: Any) -> None:
    assert render(changed({})).of("Deployment")


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS, ids=lambda given: str(given)[:60])
def test_a_contradiction_is_named(render: Any, changed: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(("changes", "place"), NOT_OF_THE_SCHEMA, ids=lambda given: str(given)[:60])
def test_what_the_schema_does_not_know_is_named(
    render: Any, changed: Any, changes: dict[str, Any], place: str
) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert place in str(caught.value)


def test_two_models_may_not_share_a_name_in_objects(render: Any, changed: Any) -> None:
    values = changed({})
    other = {**copy.deepcopy(values["models"][0]), "name": "another/granite", "aliases": []}
    other["pools"] = [{**pool, "name": f"{pool['name']}-2"} for pool in other["pools"]]
    values["models"].append(other)
    with pytest.raises(HelmError, match=r'models\[1\].id is "granite", as of models\[0\]'):
        render(values)
    other["id"] = "granite-2"
    assert render(values).of("Deployment")


def test_a_gateway_asks_all_pods_at_one_port(render: Any, changed: Any) -> None:
    decode = changed({})["models"][0]["pools"][1]
    pools = [
        {**decode, "name": "a", "role": "both", "existing": {**EXISTING, "deployment": "a"}},
        {
            **decode,
            "name": "b",
            "role": "both",
            "existing": {**EXISTING, "deployment": "b", "sidecarPort": 8002},
        },
    ]
    values = changed({"gateway.mode": "attach", "gateway.attach.gateway.name": "main", "adopt.enabled": True})
    values["models"][0]["pools"] = pools
    with pytest.raises(HelmError, match=r"models\[0\].pools\[1\] takes requests at port 8002"):
        render(values)
