"""A decode pod that goes while it has streams: emulated engines, sidecars and the gateway, each a process."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.sim.profiles import PROFILES, policy_layout, policy_speed
from pdcoord.wire.client import Client

MODEL = "demo/llama-8b"
PROFILES_OF = {"prefill": "intel-gaudi3-8b", "decode": "amd-mi300x-8b"}
API_VERSION = "pdcoord.io/v1alpha1"
WAIT_S = 120.0
"""For what takes a second on a machine with nothing else to do."""
TOKENS = 120
STREAMS = 6
DRAIN_S = 0.5
"""Of a sidecar: less than a stream has yet to come when it is told to end."""
SEEN_MIN = 8
"""Parts that each stream has had when the pod dies."""


class Stream:
    """One client's answer as it comes."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.path = path
        self.body = body
        self.raw = b""
        self.is_complete = False
        self.has_begun = asyncio.Event()

    async def run(self, client: Client, gateway: HostPort) -> None:
        raw = json.dumps(self.body).encode()
        headers = [(b"content-type", b"application/json")]
        async with await client.request(
            "POST", gateway, self.path, headers=headers, body=raw, head_timeout_s=WAIT_S
        ) as response:
            assert response.status == 200
            while part := await response.read_chunk(idle_timeout_s=WAIT_S):
                self.raw += part
                if self.raw.count(b"\n\n") >= SEEN_MIN:
                    self.has_begun.set()
            self.is_complete = True

    @property
    def chunks(self) -> list[dict[str, Any]]:
        data = [line.removeprefix(b"data: ") for line in self.raw.split(b"\n") if line.startswith(b"data: ")]
        assert data[-1] == b"[DONE]", data[-1]
        return [json.loads(each) for each in data[:-1]]

    @property
    def text(self) -> str:
        choices = [chunk["choices"][0] for chunk in self.chunks if chunk["choices"]]
        said = [each["delta"].get("content") if "delta" in each else each["text"] for each in choices]
        return "".join(each or "" for each in said)

    def tokens(self, name: str) -> int:
        """One figure of the usage that ends the stream."""
        count: int = self.chunks[-1]["usage"][name]
        return count


def streams() -> list[Stream]:
    """Chats, completions from text and completions from token ids, each with a prompt of its own."""
    made = []
    limits = {"max_tokens": TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    limits["skip_special_tokens"] = False  # Without it a text would not say all that ignore_eos lets come.
    usual = {"model": MODEL, "stream": True, "temperature": 0, **limits}
    for index in range(STREAMS):
        prompt = f"{index}: " + f"Tell of the number {index} and of its friends. " * 40
        match index % 3:
            case 0:
                messages = [{"role": "user", "content": prompt}]
                made.append(Stream("/v1/chat/completions", {**usual, "messages": messages}))
            case 1:
                made.append(Stream("/v1/completions", {**usual, "prompt": prompt}))
            case _:
                made.append(Stream("/v1/completions", {**usual, "prompt": prompt, "return_token_ids": True}))
    return made


class Fleet:
    """Where everything listens, and how each process is started."""

    def __init__(self, folder: Path) -> None:
        names = ["prefill-0", "decode-0", "decode-1"]
        ports = iter(free_ports(2 + 4 * len(names)))
        self.gateway, self.admin = (HostPort(f"127.0.0.1:{next(ports)}") for _ in range(2))
        self.commands: dict[str, list[str]] = {}
        self.ready: dict[str, tuple[HostPort, str]] = {}
        engines: list[dict[str, Any]] = []
        self.addresses: dict[str, HostPort] = {}
        fleet_file, policy_file = folder / "fleet.yaml", folder / "policy.yaml"
        for name in names:
            role = name.partition("-")[0]
            port, side_port, pod_port, metrics_port = (next(ports) for _ in range(4))
            engine = HostPort(f"127.0.0.1:{port}")
            engines.append(
                {
                    "name": name,
                    "profile": PROFILES_OF[role],
                    "role": role,
                    "port": port,
                    "side_channel_port": side_port,
                }
            )
            self.commands[name] = ["pdcoord", "emulate", str(fleet_file), "--engine", name]
            self.ready[name] = (engine, "/health")
            self.addresses[name] = engine
            if role == "decode":
                self.addresses[name] = HostPort(f"127.0.0.1:{pod_port}")
                flags = {
                    "--host": "127.0.0.1",
                    "--port": pod_port,
                    "--engine": engine,
                    "--metrics-port": metrics_port,
                    "--allow": self.addresses["prefill-0"],
                    "--drain-s": DRAIN_S,
                }
                words = [str(word) for flag in flags.items() for word in flag]
                self.commands[f"{name}-sidecar"] = ["pdcoord-sidecar", *words]
                self.ready[f"{name}-sidecar"] = (self.addresses[name], "/health")
        _dump(fleet_file, {"kind": "EmulatedFleet", "seed": 5, "model": MODEL, "engines": engines})
        _dump(policy_file, self._policy())
        serve = ["pdcoord", "serve", "--policy", str(policy_file)]
        serve += ["--port", self.gateway.rpartition(":")[2], "--admin-port", self.admin.rpartition(":")[2]]
        self.commands["gateway"] = serve
        self.ready["gateway"] = (self.gateway, "/readyz")

    def _policy(self) -> dict[str, Any]:
        return {
            "kind": "PoolPolicy",
            "metadata": {"name": "fleet"},
            "model": {"name": MODEL},
            "pools": [self._pool(role) for role in PROFILES_OF],
            "disaggregation": {"uncached_tokens_min": 64, "mode": "always"},
            # Requests are counted here, and the first one is to be split.
            "canary": {"mode": "off"},
        }

    def _pool(self, role: str) -> dict[str, Any]:
        profile = PROFILES[PROFILES_OF[role]]
        named = [(name, address) for name, address in self.addresses.items() if name.startswith(role)]
        return {
            "name": role,
            "role": role,
            "vendor": profile.vendor,
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": policy_layout(profile.layout),
            "kv_bytes_per_token": profile.kv_bytes_per_token,
            "link_gbit_per_s": profile.link_gbit_per_s.value,
            "endpoints": [{"name": name, "address": str(address)} for name, address in named],
            "speed": policy_speed(profile),
        }


def _dump(path: Path, document: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump({"apiVersion": API_VERSION, **document}, sort_keys=False))


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[tuple[Fleet, Processes, Client]]:
    fleet = Fleet(folder)
    async with Processes(folder) as processes, Client() as client:
        for name, command in fleet.commands.items():
            await processes.start(name, command)
        for name, (address, path) in fleet.ready.items():
            await processes.wait_ready(name, address, path, client)
        # The gateway is ready with one endpoint that decodes.
        async with asyncio.timeout(WAIT_S):
            while set(await healths(client, fleet.admin)) != {"ready"}:
                await asyncio.sleep(0.05)
        yield fleet, processes, client


async def healths(client: Client, admin: HostPort) -> list[str]:
    async with await client.request("GET", admin, "/fleet", head_timeout_s=WAIT_S) as response:
        endpoints = json.loads(await response.read_all(timeout_s=WAIT_S))["endpoints"]
    return [each["health"] for each in endpoints]


async def metric(client: Client, gateway: HostPort, start: str) -> float:
    async with await client.request("GET", gateway, "/metrics", head_timeout_s=WAIT_S) as response:
        text = (await response.read_all(timeout_s=WAIT_S)).decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(start))


async def run_all(made: list[Stream], client: Client, gateway: HostPort) -> None:
    async with asyncio.TaskGroup() as group:
        for each in made:
            group.create_task(each.run(client, gateway))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("victims", "how"),
    [
        (("decode-0", "decode-0-sidecar"), signal.SIGKILL),
        (("decode-0",), signal.SIGKILL),
        (("decode-0-sidecar",), signal.SIGTERM),
    ],
    ids=["pod-killed", "engine-killed", "sidecar-drained"],
)
async def test_a_decode_pod_lost_in_mid_stream_costs_no_client_a_token(
    tmp_path: Path, victims: tuple[str, ...], how: signal.Signals
) -> None:
    async with asyncio.timeout(4 * WAIT_S), running(tmp_path) as (fleet, processes, client):
        undisturbed, disturbed = streams(), streams()
        await run_all(undisturbed, client, fleet.gateway)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_all(disturbed, client, fleet.gateway))
            for each in disturbed:
                await each.has_begun.wait()
            for victim in victims:
                processes[victim].handle.send_signal(how)
        for got, wanted in zip(disturbed, undisturbed, strict=True):
            assert got.is_complete
            assert got.text == wanted.text
            assert len({chunk["id"] for chunk in got.chunks}) == 1
            assert got.tokens("completion_tokens") == wanted.tokens("completion_tokens") == TOKENS
            if got.body.get("return_token_ids"):
                # What a text has become as part of a prompt may be other tokens than those it came as.
                assert got.tokens("prompt_tokens") == wanted.tokens("prompt_tokens")
        resumed = await metric(client, fleet.gateway, "pdcoord_gateway_resume_gap_seconds_count")
        assert resumed >= 1, "the pod that was killed had no stream"
        assert await metric(client, fleet.gateway, "pdcoord_gateway_ledger_open") == 0
