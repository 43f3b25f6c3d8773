"""deploy/kind/values.yaml: the pods that the chart makes of it, started as processes, split a request.

Each pod has a loopback address of its own. What a kubelet does is done by hand: the environment, the Secret's
files, addresses in place of 0.0.0.0 and 127.0.0.1. The coordinator has the pods from a file.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
WAIT_S = 40.0
CONTROL = "pdcoord-pdcoord-control"


@dataclass
class Pod:
    ip: str
    name: str
    spec: dict[str, Any]
    metadata: dict[str, Any]

    def environment(self, container: dict[str, Any], keys: Path) -> dict[str, str]:
        made = {"POD_IP": self.ip}
        for entry in container.get("env", []):
            if "value" in entry:
                value = entry["value"].replace("$(POD_IP)", self.ip)
                made[entry["name"]] = value.replace("/etc/pdcoord/keys", str(keys))
        # The files of the transfer image are those that are tested here anyway.
        made.pop("PYTHONPATH", None)
        return made

    def command(self, container: dict[str, Any], keys: Path) -> list[str]:
        """The container's command with its own addresses, and ours where vLLM's would be."""
        words = [*container["command"], *container["args"]]
        placed = [word.replace("0.0.0.0", self.ip).replace("127.0.0.1:", f"{self.ip}:") for word in words]
        placed = [word.replace("/etc/pdcoord/keys", str(keys)) for word in placed]
        if placed[0] == "vllm":
            placed = ["pdcoord", "emulate-vllm", *placed[1:]]
        return [str(PROGRAMS / placed[0]), *placed[1:]]


def rendered() -> list[dict[str, Any]]:
    values = yaml.safe_load((ROOT / "deploy/kind/values.yaml").read_text())
    files = Chart.load(str(ROOT / "deploy/charts/pdcoord")).render(
        values | {"pd": {"enabled": True}}, name="pdcoord", namespace="pdcoord"
    )
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [one for text in texts for one in yaml.safe_load_all(text) if one]


def pods(objects: list[dict[str, Any]]) -> list[Pod]:
    """One for each replica of each pool, on addresses that nobody else has."""
    made: list[Pod] = []
    net = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    for one in (each for each in objects if each["kind"] == "Deployment"):
        template = one["spec"]["template"]
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == "engine":
            for number in range(one["spec"]["replicas"]):
                name = f"{one['metadata']['name']}-{number}"
                made.append(Pod(f"{net}.{len(made) + 1}", name, template["spec"], template["metadata"]))
    return made


def endpoints(fleet: list[Pod]) -> str:
    """What the coordinator would read of the pods."""
    ports = {
        "metrics_port": "pdcoord.io/metrics-port",
        "kv_port": "pdcoord.io/kv-port",
        "kv_events_port": "pdcoord.io/kv-events-port",
    }
    entries = []
    for pod in fleet:
        notes = pod.metadata["annotations"]
        told = {key: int(notes[note]) for key, note in ports.items() if note in notes}
        address = f"{pod.ip}:{notes['pdcoord.io/port']}"
        entries.append({"name": pod.name, "address": address, "labels": pod.metadata["labels"]} | told)
    return json.dumps({"apiVersion": "pdcoord.io/v1alpha1", "kind": "Endpoints", "endpoints": entries})


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[str]:
    """The address of a coordinator before all pods of the chart."""
    objects = rendered()
    fleet = pods(objects)
    keys = tmp_path / "keys"
    keys.mkdir()
    for name in ("control", "kv"):
        (keys / name).write_text(secrets.token_hex(32))
        (keys / name).chmod(0o440)
    policy = next(
        one["data"]["policy.yaml"]
        for one in objects
        if one["kind"] == "ConfigMap" and "policy.yaml" in one.get("data", {})
    )
    (tmp_path / "policy.yaml").write_text(policy)
    (tmp_path / "endpoints.yaml").write_text(endpoints(fleet))
    own = f"{fleet[0].ip.rpartition('.')[0]}.250"
    coordinator = next(
        one["spec"]["template"]["spec"]["containers"][0]
        for one in objects
        if one["kind"] == "Deployment" and one["metadata"]["name"] == "pdcoord"
    )
    environment = Pod(own, "pdcoord-0", {}, {}).environment(coordinator, keys)
    kubernetes = [name for name in environment if name.startswith("PDCOORD_KUBERNETES")]
    environment = {name: value for name, value in environment.items() if name not in kubernetes}
    environment |= {
        "PDCOORD_POLICY": str(tmp_path / "policy.yaml"),
        "PDCOORD_ENDPOINTS": str(tmp_path / "endpoints.yaml"),
        "PDCOORD_HOST": own,
        "PDCOORD_CONTROL_HOST": own,
        "PDCOORD_ADMIN_HOST": own,
        "PDCOORD_REPLICA": "pdcoord-0",
    }
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w"))

        def start(command: list[str], given: dict[str, str]) -> None:
            process = subprocess.Popen(
                command, env={"PATH": os.environ["PATH"], **given}, stdout=log, stderr=log, cwd=tmp_path
            )
            stack.callback(process.wait, timeout=60)
            stack.callback(process.terminate)

        for pod in fleet:
            for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
                if container["name"] != "connector":
                    command = pod.command(container, keys)
                    command = [_dialled(word, own) for word in command]
                    if container["name"] == "pdcoord-sidecar":
                        # A pod dials from its own address; here that is 127.0.0.1 for all.
                        command += ["--host", pod.ip, "--control-address", f"{pod.ip}:8000"]
                    start(command, pod.environment(container, keys))
        start([str(PROGRAMS / coordinator["command"][0]), *coordinator["command"][1:]], environment)
        yield own


def _dialled(word: str, own: str) -> str:
    """The coordinators' Service is a name that only a cluster resolves."""
    return f"--control={own}:9010" if word.startswith("--control=") else word


def ask(host: str, prompt: str) -> tuple[int, str, Any]:
    """Status, decision and body of a completion."""
    body = json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 8}).encode()
    connection = HTTPConnection(host, 8080, timeout=30)
    try:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers.get("x-pdcoord-decision", ""), json.load(answer)
    finally:
        connection.close()


def test_the_pods_of_the_kind_cluster_split_a_request(gateway: str, tmp_path: Path) -> None:
    prompt = "".join(f"Line {number} of a report. " for number in range(400))
    deadline_s = time.monotonic() + WAIT_S
    seen = "nothing"
    tries = 0
    while time.monotonic() < deadline_s:
        tries += 1
        try:
            # A prefix that nobody has cached.
            status, decision, answer = ask(gateway, f"{tries} {prompt}")
        except OSError as error:
            seen = str(error)
        else:
            seen = f"{status} {decision} {answer}"
            if decision.startswith("split"):
                assert status == 200
                assert answer["usage"]["completion_tokens"] == 8
                return
        time.sleep(0.3)
    connection = HTTPConnection(gateway, 8081, timeout=30)
    connection.request("GET", "/paths")
    paths = connection.getresponse().read().decode()
    connection.close()
    raise AssertionError(f"never split: {seen}\n{paths}\n{(tmp_path / 'log').read_text()[-4000:]}")
