"""The rendered objects in an API server double, and the coordinator that discovers its fleet from them."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from kmock import KubernetesEmulator, Server

from pdcoord.extproc.listener import self_signed
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.extproc import ExtprocFront, ExtprocSettings
from pdcoord.runtime.extproc_flags import read_flags
from pdcoord.runtime.process import Front, Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import CoordinatorSettings, GatewaySettings, load
from pdcoord.wire.client import Client

DEADLINE_S = 30.0
# Bodies of /fleet hold a few endpoints.
BYTES_MAX = 1 << 22
LOCAL = {
    "PDCOORD_PORT": "0",
    "PDCOORD_ADMIN_PORT": "0",
    "PDCOORD_CONTROL_PORT": "0",
    "PDCOORD_CONTROL_HOST": "127.0.0.1",
    "PDCOORD_HOST": "127.0.0.1",
    "PDCOORD_ADMIN_HOST": "127.0.0.1",
    "PDCOORD_DRAIN_NOTICE_S": "0",
    "PDCOORD_RELOAD_INTERVAL_S": "3600",
}
# All certificates here are one.
CERTIFICATES = re.compile("/etc/pdcoord/(control|front|internal)-tls")
PLURALS = {"NetworkPolicy": "networkpolicies", "PoolPolicy": "poolpolicies"}


def plural(kind: str) -> str:
    return PLURALS.get(kind, f"{kind.lower()}s")


def selects(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether a label selector, as the API takes it, selects; the two forms that the chart writes."""
    for part in re.split(r",(?![^(]*\))", selector):
        if " in " in part:
            key, _, values = part.partition(" in ")
            if labels.get(key) not in values.strip("()").split(","):
                return False
        else:
            key, _, value = part.partition("=")
            if labels.get(key) != value:
                return False
    return True


def pods_of(release: Any) -> Iterator[dict[str, Any]]:
    """Pods as controllers make them, running and ready, each with an address of its own."""
    number = 1
    for owner, template in release.templates():
        replicas = owner["spec"].get("replicas", 1)
        for replica in range(replicas):
            number += 1
            given: dict[str, Any] = json.loads(json.dumps(template))
            metadata = given.setdefault("metadata", {})
            metadata |= {
                "name": f"{owner['metadata']['name']}-{number}-{replica}",
                "namespace": "llm",
                "uid": f"uid-{number}",
            }
            metadata["labels"]["pod-template-hash"] = "5d8f"
            yield given | {
                "apiVersion": "v1",
                "kind": "Pod",
                "status": {
                    "phase": "Running",
                    "podIP": f"127.0.9.{number}",
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "initContainerStatuses": [
                        {"name": container["name"], "ready": True}
                        for container in given["spec"].get("initContainers", [])
                    ],
                },
            }


async def create(server: KubernetesEmulator, given: Mapping[str, Any]) -> None:
    group = "api" if "/" not in given["apiVersion"] else "apis"
    path = f"/{group}/{given['apiVersion']}/namespaces/llm/{plural(given['kind'])}"
    async with server.post(path, json=given) as answer:
        assert answer.status == 200, (path, await answer.text())


async def fleet_of(client: Client, port: int) -> list[dict[str, Any]]:
    address = HostPort(f"127.0.0.1:{port}")
    async with await client.request(
        "GET", address, "/fleet", headers=[], body=b"", head_timeout_s=10.0
    ) as response:
        body = await response.read_all(timeout_s=10.0)
    endpoints: list[dict[str, Any]] = json.loads(body)["endpoints"]
    return endpoints


def coordinator_of(
    release: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[CoordinatorSettings, Front]:
    """The process that the coordinator's container starts, with this machine's ports and files."""
    template = release.one("Deployment", "demo-pdcoord")["spec"]["template"]
    container = template["spec"]["containers"][0]
    filled = {"metadata.name": "demo-0", "metadata.namespace": "llm"}
    for entry in container["env"]:
        value = entry.get("value") or filled[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        # The test asks the admin listener in clear.
        if not entry["name"].startswith("PDCOORD_ADMIN_TLS_"):
            monkeypatch.setenv(entry["name"], CERTIFICATES.sub(str(folder), LOCAL.get(entry["name"], value)))
    for name in ("PDCOORD_ADMIN_PORT", "PDCOORD_RELOAD_INTERVAL_S", "PDCOORD_HOST"):
        monkeypatch.setenv(name, LOCAL[name])
    for given in release.of("ConfigMap"):
        if given["metadata"]["name"] == "demo-pdcoord-policy":
            (folder / "policy.yaml").write_text(given["data"]["policy.yaml"])
            monkeypatch.setenv("PDCOORD_POLICY", str(folder / "policy.yaml"))
    key = folder / "control"
    key.write_text("k" * 48)
    key.chmod(0o440)
    if release.values["pd"]["enabled"]:
        monkeypatch.setenv("PDCOORD_CONTROL_KEY_FILE", str(key))
    private, chain = self_signed()
    for file, content in (("tls.key", private), ("tls.crt", chain), ("ca.crt", chain)):
        (folder / file).write_bytes(content)
    if release.values["auth"]["planKeysSecret"]:
        (folder / "plan-keys").write_text(f"one:{'0f' * 32}\n")
        (folder / "plan-keys").chmod(0o440)
        monkeypatch.setenv("PDCOORD_PLAN_KEYS_FILE", str(folder / "plan-keys"))
    if container["command"][1] == "serve":
        settings = load(GatewaySettings, {})
        return settings, GatewayFront(settings)
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    arguments = [CERTIFICATES.sub(str(folder), argument) for argument in container["args"]]
    flags = read_flags(arguments, environment)
    ports = {"grpc_port": 0, "grpc_health_port": 0, "metrics_port": 0}
    picked = load(ExtprocSettings, {**flags.settings, **ports})
    return picked, ExtprocFront(picked, picked.certificates())


async def test_the_coordinator_finds_every_pool(
    release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pods = list(pods_of(release))
    async with KubernetesEmulator() as server, Server(server) as listener, Client() as client:
        for given in (*release.objects, *pods):
            server.resources[f"{given['apiVersion']}/{plural(given['kind'])}"] = {}
        config = tmp_path / "kubeconfig"
        config.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, users: [],"
            " contexts: [{name: c, context: {cluster: c, user: u, namespace: llm}}],"
            f' clusters: [{{name: c, cluster: {{server: "{str(listener.url).rstrip("/")}"}}}}]}}'
        )
        monkeypatch.setenv("KUBECONFIG", str(config))
        settings, front = coordinator_of(release, tmp_path, monkeypatch)
        for number, given in enumerate(release.objects):
            stamped = {"uid": f"object-{number}", "generation": 1, "resourceVersion": "1"}
            await create(server, {**given, "metadata": {**given["metadata"], **stamped}})
        # The double knows no label selectors, so that what the API server would leave out is left out here.
        selected = [pod for pod in pods if selects(settings.kubernetes_selector, pod["metadata"]["labels"])]
        for pod in selected:
            await create(server, pod)
        wanted = expected(release, selected)
        log = structlog.wrap_logger(None, processors=[lambda *_: (_ for _ in ()).throw(structlog.DropEvent)])
        process = Process(settings, front, log)
        process.files.load_first()
        stop, up = asyncio.Event(), asyncio.Event()
        async with asyncio.timeout(2 * DEADLINE_S), asyncio.TaskGroup() as group:
            task = group.create_task(process.run(stop, up.set))
            try:
                await up.wait()
                found: set[tuple[str, str]] = set()
                with suppress(TimeoutError):
                    async with asyncio.timeout(DEADLINE_S):
                        while found != wanted:
                            await asyncio.sleep(0.02)
                            listed = await fleet_of(client, process.ports[-1])
                            found = {(each["pool"], each["address"]) for each in listed}
                assert found == wanted
            finally:
                stop.set()
                assert await task == 0


def expected(release: Any, selected: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """(pool, address) of every server, by hand from the values."""
    wanted = set()
    for model in release.values["models"]:
        for pool in model["pools"]:
            labels = pool.get("existing", {}).get("matchLabels", {"pdcoord.io/pool": pool["name"]})
            mine = [pod for pod in selected if labels.items() <= pod["metadata"]["labels"].items()]
            if "existing" not in pool:
                assert len(mine) == pool.get("replicas", 1), "the selector leaves no server out"
            for pod in mine:
                port = 8000
                if "existing" in pool:
                    is_split = release.values["pd"]["enabled"]
                    port = 8001 if is_split else pool["existing"].get("port", 8000)
                wanted.add((pool["name"], f"{pod['status']['podIP']}:{port}"))
    assert wanted
    return wanted
