"""A coordinator process that has its fleet from an API server."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from kmock import KubernetesEmulator, Server
from structlog.testing import LogCapture

from pdcoord.policy.crd import GROUP, PLURAL, VERSION
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim.emulator import running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

MODEL = "org/model"
DEADLINE_S = 20.0
PODS, POLICIES = "v1/pods", f"{GROUP}/{VERSION}/{PLURAL}"

POOL = {
    "name": "picked",
    "role": "both",
    "vendor": "v",
    "engine": "vllm",
    "connector": "none",
    "kv_bytes_per_token": 1024,
    "selector": {"match_labels": {"llm-d.ai/role": "both"}},
    "speed": {"prefill_base_ms": 8, "prefill_ms_per_token": 0.1, "step_base_ms": 8},
}
POLICY = {
    "apiVersion": f"{GROUP}/{VERSION}",
    "kind": "PoolPolicy",
    "metadata": {"name": "m", "namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "3"},
    "spec": {"model": {"name": MODEL}, "pools": [POOL]},
}
FLEET = {
    "apiVersion": "pdcoord.io/v1alpha1",
    "kind": "EmulatedFleet",
    "model": MODEL,
    "engines": [
        {
            "name": "e",
            "profile": "nvidia-h100-8b",
            "port": 0,
            "speed": {"prefill_base_ms": 1, "prefill_ms_per_token": 0.01, "step_base_ms": 1},
        }
    ],
}


def pod(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "a",
            "namespace": "ns",
            "uid": "u",
            "labels": {"llm-d.ai/inference-serving": "true", "llm-d.ai/role": "both"},
            "annotations": {"pdcoord.io/port": port},
            # So that its deletion shows before it is gone, as a grace period does.
            "finalizers": ["test/hold"],
        },
        "spec": {"containers": [{"name": "engine"}]},
        "status": {"phase": "Running", "podIP": host, "conditions": [{"type": "Ready", "status": "True"}]},
    }


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not is_so():
            await asyncio.sleep(0.005)


async def complete(client: Client, port: int) -> int:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
    async with await client.request(
        "POST",
        HostPort(f"127.0.0.1:{port}"),
        "/v1/completions",
        headers=[],
        body=json.dumps(body).encode(),
        head_timeout_s=30.0,
    ) as response:
        await response.read_all(timeout_s=30.0)
        return response.status


async def test_a_coordinator_discovers_policies_and_pods_and_lets_them_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = EmulatedFleet.model_validate_json(json.dumps(FLEET))
    captured = LogCapture()
    log = structlog.wrap_logger(
        None, processors=[captured], wrapper_class=structlog.make_filtering_bound_logger("info")
    )
    async with (
        KubernetesEmulator() as server,
        Server(server) as listener,
        running(fleet, fleet.engines) as ((emulated,), _),
        Client() as client,
    ):
        server.resources[PODS] = {}
        server.resources[POLICIES] = {}
        path = tmp_path / "kubeconfig"
        path.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, users: [],"
            " contexts: [{name: c, context: {cluster: c, user: u, namespace: ns}}],"
            f' clusters: [{{name: c, cluster: {{server: "{str(listener.url).rstrip("/")}"}}}}]}}'
        )
        monkeypatch.setenv("KUBECONFIG", str(path))
        settings = load_settings(
            kubernetes_policies=True,
            kubernetes_pods=True,
            port=0,
            admin_port=0,
            scrape_interval_s=0.02,
            reload_interval_s=3_600.0,  # What is seen sooner was pushed.
        )
        process = Process(settings, GatewayFront(settings), log)
        process.files.load_first()
        stop, up = asyncio.Event(), asyncio.Event()
        states = process.coordinator.fleet.states
        async with asyncio.timeout(90.0), asyncio.TaskGroup() as group:
            task = group.create_task(process.run(stop, up.set))
            try:
                await up.wait()
                assert process.loop.unready() is not None
                given = pod(str(emulated.address))
                async with server.post("/api/v1/namespaces/ns/pods", json=given) as answer:
                    assert answer.status == 200
                at = f"/apis/{GROUP}/{VERSION}/namespaces/ns/{PLURAL}"
                async with server.post(at, json=POLICY) as answer:
                    assert answer.status == 200
                await until(lambda: any(state.is_eligible for state in states()))
                assert process.loop.unready() is None
                assert await complete(client, process.ports[0]) == 200
                async with server.delete("/api/v1/namespaces/ns/pods/a") as answer:
                    assert answer.status == 200
                await until(lambda: not any(state.is_eligible for state in states()))
                assert [state.endpoint.id for state in states()] == ["picked/a"]
                assert await complete(client, process.ports[0]) == 503
                released = {"metadata": {"finalizers": []}}
                async with server.patch("/api/v1/namespaces/ns/pods/a", json=released) as answer:
                    assert answer.status == 200
                await until(lambda: not list(states()))
            finally:
                stop.set()
                assert await task == 0
        metrics = process._metrics.render().decode()
    for resource in ("pods", "poolpolicies"):
        assert f'pdcoord_gateway_kubernetes_lists_total{{resource="{resource}"}} 1.0' in metrics
        assert f'pdcoord_gateway_kubernetes_watches_total{{resource="{resource}"}} 1.0' in metrics
    assert [entry["event"] for entry in captured.entries if entry["log_level"] == "error"] == []
