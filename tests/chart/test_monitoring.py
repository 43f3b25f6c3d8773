"""What is scraped, and the rules, dashboards and scaling that live off it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
SIDECAR_PORT = 9400
EXISTING = {"matchLabels": {"app": "vllm-d"}, "deployment": "vllm-d"}
POOL = {"vendor": "nvidia", "linkGbitPerSecond": 100}
ADOPTED = {
    "adopt": {"enabled": True},
    "models": [
        {
            "name": "m",
            "kvBytesPerToken": 1024,
            "pools": [
                {**POOL, "name": "p", "role": "prefill", "existing": {"matchLabels": {"app": "vllm-p"}}},
                {**POOL, "name": "d", "role": "decode", "existing": EXISTING},
            ],
        }
    ],
}


def numbers_scraped(release: Any, template: Mapping[str, Any]) -> Iterator[int]:
    """Ports of a pod that some monitor has scraped, with the Services between followed."""
    labels = template["metadata"]["labels"]
    spec = template["spec"]
    open_ports = [
        port
        for container in (*spec.get("initContainers", []), *spec["containers"])
        for port in container.get("ports", [])
    ]
    for monitor in release.of("PodMonitor"):
        if monitor["spec"]["selector"]["matchLabels"].items() <= labels.items():
            wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
            yield from (port["containerPort"] for port in open_ports if port.get("name") in wanted)
    for monitor in release.of("ServiceMonitor"):
        wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        for service in release.of("Service"):
            selects = monitor["spec"]["selector"]["matchLabels"].items()
            is_ours = selects <= service["metadata"]["labels"].items()
            if is_ours and service["spec"]["selector"].items() <= labels.items():
                yield from (port["port"] for port in service["spec"]["ports"] if port["name"] in wanted)


@pytest.mark.parametrize("mode", ["podmonitor", "servicemonitor"])
def test_the_sidecars_of_adopted_servers_are_scraped(render: Any, mode: str) -> None:
    release = render({**ADOPTED, "pd": {"enabled": True}, "monitoring": {"mode": mode}})
    (patched,) = [
        template for owner, template in release.templates() if owner["metadata"]["name"] == "vllm-d"
    ]
    assert list(numbers_scraped(release, patched)) == [SIDECAR_PORT]
    # What has no sidecar is left as it is.
    names = {
        monitor["metadata"]["name"]
        for kind in ("PodMonitor", "ServiceMonitor")
        for monitor in release.of(kind)
    }
    assert names == {"demo-pdcoord-coordinator", "demo-pdcoord-d-sidecars"}


def test_where_nothing_is_split_no_sidecar_is_looked_for(render: Any) -> None:
    release = render({**ADOPTED, "monitoring": {"mode": "podmonitor"}})
    assert [monitor["metadata"]["name"] for monitor in release.of("PodMonitor")] == [
        "demo-pdcoord-coordinator"
    ]


@pytest.mark.parametrize("name", ["nvidia-nixl", "envoy"])
def test_the_charts_own_servers_are_scraped_with_their_sidecars(release_named: Any, name: str) -> None:
    release = release_named(name)
    for _, template in release.templates():
        if "pdcoord.io/pool" in template["metadata"]["labels"]:
            has_sidecar = "pdcoord.io/entry" in template["metadata"]["labels"]
            wanted = [8000, SIDECAR_PORT] if has_sidecar else [8000]
            assert sorted(numbers_scraped(release, template)) == wanted


def test_the_rules_are_those_that_are_tested(release_named: Any) -> None:
    (rule,) = release_named("nvidia-nixl").of("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_every_dashboard_is_there_for_grafana_to_find(release_named: Any) -> None:
    dashboards = release_named("nvidia-nixl").one("ConfigMap", "demo-pdcoord-dashboards")
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    there = {name: json.loads(text) for name, text in dashboards["data"].items()}
    wanted = {
        f"pdcoord-{path.name}": json.loads(path.read_text()) for path in (MONITORING / "dashboards").iterdir()
    }
    assert there == wanted


def test_neither_is_rendered_unasked(release_named: Any) -> None:
    release = release_named("envoy")
    assert not release.of("PrometheusRule")
    assert not [
        given for given in release.of("ConfigMap") if given["metadata"]["name"].endswith("-dashboards")
    ]


def test_pools_shrink_late_whoever_scales_them(release_named: Any) -> None:
    (scaler,) = release_named("hpa").of("HorizontalPodAutoscaler")
    scaled = release_named("keda").of("ScaledObject")
    assert scaled
    for given in scaled:
        assert given["spec"]["minReplicaCount"] >= 1
        behavior = given["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior == scaler["spec"]["behavior"]
        assert (
            behavior["scaleDown"]["stabilizationWindowSeconds"]
            > behavior["scaleUp"]["stabilizationWindowSeconds"]
        )
