"""Two vLLM servers that each serve alone, a sidecar before each, and a gateway before both."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

NAMES = ("one", "two")
MODEL = "tiny"
REQUEST_S = 60.0
# A token takes the servers some milliseconds: time to kill one in the middle of a stream.
FLAGS = ("--dtype", "float32")


@dataclass
class Fleet:
    """client -> gateway -> sidecar -> server, twice beneath the gateway."""

    launcher: Any
    folder: Path
    engines: dict[str, Any]
    sidecars: dict[str, Any]
    gateway: Any
    admin: Any

    def start(self, name: str) -> None:
        """Start a server at the port that it had before."""
        flags = (*FLAGS, "--port", str(self.engines[name].port))
        started = self.launcher.begin(name, flags, {}, self.folder)
        self.engines[name] = type(started)(self.engines[name].port, started.process)

    def make_whole(self, wait: Any) -> None:
        """Start what is dead, and wait until the gateway sends requests to both."""
        dead = [name for name in NAMES if self.engines[name].process.popen.poll() is not None]
        for name in dead:
            self.start(name)
        self.launcher.wait(*(self.engines[name] for name in dead))
        wait(lambda: set(self.admin.health()) == {"ready"}, 60, "the gateway finds both servers ready")

    def serving(self) -> list[str]:
        """The servers that generate now."""
        return [name for name in NAMES if self.engines[name].counter("vllm:num_requests_running") > 0]


@pytest.fixture(scope="session")
def pair(launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    launcher.processes.stop_all()
    folder = tmp_path_factory.mktemp("resume")
    engines = {name: launcher.begin(name, FLAGS, {}, folder) for name in NAMES}
    launcher.wait(*engines.values())
    gateway, admin, *ports = launcher.ports(2 + 2 * len(NAMES))
    sidecars = dict(zip(NAMES, ports[::2], strict=True))
    bin_folder = Path(sys.executable).parent
    for (name, sidecar), metrics in zip(sidecars.items(), ports[1::2], strict=True):
        others = ",".join(each.address for each in sidecars.values() if each is not sidecar)
        command = [
            bin_folder / "pdcoord-sidecar",
            *("--host", "127.0.0.1", "--port", str(sidecar.port), "--engine", engines[name].address),
            *("--allow", others, "--metrics-port", str(metrics.port)),
        ]
        (folder / f"sidecar-{name}").mkdir()
        launcher.serve(command, metrics, folder / f"sidecar-{name}")
    policy = folder / "policy.yaml"
    policy.write_text(policy_text([each.address for each in sidecars.values()]))
    launcher.gateway(policy, gateway, admin, folder)
    return Fleet(launcher, folder, engines, sidecars, gateway, admin)


@pytest.fixture
def whole(pair: Fleet, wait: Any) -> Fleet:
    pair.make_whole(wait)
    return pair


@pytest.fixture
def openai(pair: Fleet) -> Iterator[OpenAI]:
    """The official client; it does not retry, so that every failure shows."""
    url = f"http://{pair.gateway.address}/v1"
    with OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=REQUEST_S) as client:
        yield client


def policy_text(addresses: list[str]) -> str:
    endpoints = ", ".join(
        f'{{name: {name}, address: "{address}"}}' for name, address in zip(NAMES, addresses, strict=True)
    )
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: resume}}
model: {{name: {MODEL}, bytes_per_token: 1}}
pools:
  - name: both
    role: both
    vendor: cpu
    engine: vllm
    connector: nixl
    layout: {{block_tokens: 128}}
    kv_bytes_per_token: 4096
    link_gbit_per_s: 10
    endpoints: [{endpoints}]
    speed: {{prefill_base_ms: 5, prefill_ms_per_token: 0.1, step_base_ms: 10}}
disaggregation: {{mode: never}}
"""
