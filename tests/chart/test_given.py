"""What people hand to engines and pools: refused where the chart or the coordinator has it otherwise."""

from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from helm_python import HelmError

A = {"matchLabels": {"app": "a"}, "deployment": "a"}
B = {"matchLabels": {"app": "b"}, "deployment": "b"}
ADOPTED = {"adopt.enabled": True, "models.0.pools.0.existing": A, "models.0.pools.1.existing": B}
OTHER = {"vendor": "nvidia", "linkGbitPerSecond": 100}
POOL = "models[0].pools[0]"
SGLANG = {
    "models.0.pools": [
        {**OTHER, "name": "p", "role": "prefill", "engine": "sglang"},
        {**OTHER, "name": "d", "role": "decode", "engine": "sglang"},
    ]
}
GIVEN = f"which the chart gives the engine of {POOL} itself"
# (what differs, by path; what the message says)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"models.0.pools.0.env": {"PYTHONPATH": "/x"}},
        f'{POOL}.env.PYTHONPATH is "/x", but the chart sets it for the engine of {POOL}: leave it out',
    ),
    ({"vendors.nvidia.env.PYTHONPATH": "/x"}, 'vendors.nvidia.env.PYTHONPATH is "/x", but the chart sets it'),
    ({"vendors.nvidia.tcpEnv.POD_IP": "::1"}, 'vendors.nvidia.tcpEnv.POD_IP is "::1", but the chart sets it'),
    (
        {
            "models.0.pools.0.env": {"VLLM_KV_CACHE_LAYOUT": "HND"},
            "models.0.pools.0.layout": {"order": "NHD"},
        },
        (
            f'{POOL}.env.VLLM_KV_CACHE_LAYOUT is "HND", but the chart sets it for the engine of {POOL}: '
            "set models[].pools[].layout.order"
        ),
    ),
    (
        {"pd.connector": "nixl", "models.0.pools.0.env": {"VLLM_NIXL_SIDE_CHANNEL_PORT": "1"}},
        f"{POOL}.env.VLLM_NIXL_SIDE_CHANNEL_PORT",
    ),
    (
        {"models.0.huggingFaceToken": {"secret": "a"}, "models.0.pools.0.env": {"HF_TOKEN": "a"}},
        f'{POOL}.env.HF_TOKEN is "a", but the chart sets it',
    ),
    (
        {"models.0.pools.0.args": ["--x", "--block-size=32"]},
        f'{POOL}.args[1] is "--block-size=32", {GIVEN}: set models[].pools[].layout.block_tokens',
    ),
    ({"models.0.pools.0.args": ["--port=1"]}, f'{POOL}.args[0] is "--port=1", {GIVEN}: leave it out'),
    ({"models.0.pools.0.args": ["--block_size", "8"]}, f'{POOL}.args[0] is "--block_size", {GIVEN}'),
    (
        {"models.0.pools.0.args": ["--kv-transfer-config.kv_port=1"]},
        (f'{POOL}.args[0] is "--kv-transfer-config.kv_port=1", {GIVEN}: set models[].pools[].connector'),
    ),
    (
        {"vendors.nvidia.args": ["-tp=2"]},
        f'vendors.nvidia.args[0] is "-tp=2", {GIVEN}: set models[].pools[].tensorParallel',
    ),
    (
        {
            "models.0.pools.0.args": ["--max-model-len=9"],
            "models.0.pools.0.limits": {"context_tokens_max": 8},
        },
        f'{POOL}.args[0] is "--max-model-len=9", {GIVEN}',
    ),
    (
        {**SGLANG, "models.0.pools.0.args": ["--page-size=1"]},
        f'{POOL}.args[0] is "--page-size=1", {GIVEN}',
    ),
    (
        {**SGLANG, "models.0.pools.0.args": ["--disaggregation-mode=null"]},
        f"{GIVEN}: set models[].pools[].role",
    ),
    (
        {**ADOPTED, "models.0.pools.1.existing": {**B, "matchLabels": A["matchLabels"]}},
        (
            'models[0].pools[1].existing.matchLabels is {"app":"a"}, and '
            'models[0].pools[0].existing.matchLabels is {"app":"a"}: one selects all that the other does'
        ),
    ),
    (
        ADOPTED
        | {"adopt.podSelector": "app=a"}
        | {"models.0.pools.1.existing": {**B, "matchLabels": {"app": "a", "x": "y"}}},
        'models[0].pools[1].existing.matchLabels is {"app":"a","x":"y"}, and',
    ),
    (
        {**ADOPTED, "models.0.pools.1.existing": {**B, "deployment": "a"}},
        'models[0].pools[1].existing.deployment is "a", which models[0].pools[0].existing.deployment is too',
    ),
]
TAKEN: list[dict[str, Any]] = [
    {"models.0.pools.0.env": {"UCX_TLS": "tcp", "HF_TOKEN": "a"}},
    {"models.0.pools.0.args": ["--max-model-len=9", "--portable", "8"]},
    {"models.0.pools.0.command": ["other"], "models.0.pools.0.args": ["--port=1"]},
    {"pd.enabled": False, "models.0.pools.0.args": ["--kv-transfer-config={}"]},
    {"pd.enabled": False, "models.0.pools.0.env": {"PYTHONPATH": "/x"}},
    {**SGLANG, "models.0.pools.0.args": ["--block-size=8"]},
    ADOPTED | {"adopt.podSelector": "x", "models.0.pools.1.existing": {**B, "matchLabels": {"other": "a"}}},
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda given: str(given)[:60])
def test_it_is_refused_by_name(render: Any, changed: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HelmError) as caught:
        render(changed(changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", TAKEN, ids=lambda given: str(given)[:60])
def test_its_neighbour_is_taken(render: Any, changed: Any, changes: dict[str, Any]) -> None:
    assert render(changed(changes)).of("Deployment")


def test_all_arguments_of_the_chart_are_refused_from_others(release: Any, render: Any) -> None:
    """Each flag that the chart gives a pool's engine, given by the pool too."""
    for m, model in enumerate(release.values["models"]):
        for p, pool in enumerate(model["pools"]):
            if "existing" in pool or "command" in pool:
                continue
            name = f"demo-pdcoord-{pool['name']}"
            servers = release.of("Deployment") + release.of("LeaderWorkerSet")
            owner = next(given for given in servers if given["metadata"]["name"] == name)
            own = set(pool.get("args", [])) | set(release.values["vendors"][pool["vendor"]]["args"])
            for word in set(engine(owner)["args"]) - own:
                if word.startswith("--"):
                    altered = yaml.safe_load(yaml.safe_dump(dict(release.values)))
                    altered["models"][m]["pools"][p]["args"] = [word]
                    with pytest.raises(HelmError, match="which the chart gives the engine of"):
                        render(altered)


def engine(owner: Mapping[str, Any]) -> Any:
    spec = owner["spec"]
    template = spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["leaderTemplate"]
    return template["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("changes", "message_timeout", "idle"),
    [
        ({}, "300s", "1800s"),
        ({"models.0.policy": {"admission": {"wait_ms_max": 400000}}}, "470s", "1800s"),
        ({"models.0.policy": {"admission": {"wait_ms_max": 3600000}}}, "3670s", "3730s"),
        ({"coordinator.env": {"PDCOORD_BODY_TIMEOUT_S": "290.5"}}, "331s", "1800s"),
    ],
    ids=str,
)
def test_envoy_waits_as_long_as_calls_may(
    render: Any, changed: Any, changes: dict[str, Any], message_timeout: str, idle: str
) -> None:
    release = render(changed({"gateway.mode": "envoy", **changes}))
    config = yaml.safe_load(release.one("ConfigMap", "demo-pdcoord-envoy")["data"]["envoy.yaml"])
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    (found,) = [
        each["typed_config"]["message_timeout"]
        for each in manager["http_filters"]
        if "message_timeout" in each["typed_config"]
    ]
    assert (found, manager["stream_idle_timeout"]) == (message_timeout, idle)
