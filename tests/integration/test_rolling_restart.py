"""Every part is restarted in turn under thirty streams, and no client sees more than a pause."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.demo.processes import Processes, free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import ConnectError, ResetError, WireError

pytestmark = pytest.mark.timeout(300)

MODEL = "demo/llama-8b"
STREAMS = 30
OUTPUT_TOKENS = 60
STEP_MS = 20
WAIT_S = 60.0
# As a pod's grace period: longer than a stream takes.
GRACE_S = 60.0
SPEED = {"prefill_base_ms": 2, "prefill_ms_per_token": 0.02, "step_base_ms": STEP_MS}
PREFILLS, DECODES, GATEWAYS = (
    tuple(f"{kind}-{index}" for index in range(2)) for kind in ("pre", "dec", "gw")
)
HEAD = {"apiVersion": "pdcoord.io/v1alpha1"}
JSON = [(b"content-type", b"application/json")]


@dataclass
class Part:
    """One process that is restarted."""

    command: list[str]
    address: HostPort
    path: str
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class Site:
    """All parts, and how many streams have come whole."""

    processes: Processes
    client: Client
    parts: dict[str, Part]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    is_over: bool = False

    async def start(self, name: str) -> None:
        part = self.parts[name]
        await self.processes.start(name, part.command, part.env)
        await self.processes.wait_ready(name, part.address, part.path, self.client)

    async def get(self, address: HostPort, path: str) -> tuple[int, bytes]:
        with suppress(WireError):
            async with await self.client.request("GET", address, path, head_timeout_s=5.0) as response:
                return response.status, await response.read_all(timeout_s=5.0)
        return 0, b""

    async def is_settled(self) -> bool:
        """Both gateways find every endpoint ready."""
        for name in GATEWAYS:
            admin = HostPort(f"127.0.0.1:{self.parts[name].env['PDCOORD_ADMIN_PORT']}")
            _, raw = await self.get(admin, "/fleet")
            if not raw or any(each["health"] != "ready" for each in json.loads(raw)["endpoints"]):
                return False
        return True

    async def until_settled(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not await self.is_settled():  # another process sets no event
                await asyncio.sleep(0.1)

    async def alone(self, prompt: str) -> str:
        """What the model answers, undisturbed: of a prefill engine, asked whole."""
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True})
        async with await self.client.request(
            "POST",
            self.parts["reference"].address,
            "/v1/completions",
            headers=JSON,
            body=body.encode(),
            head_timeout_s=WAIT_S,
        ) as response:
            answer = json.loads(await response.read_all(timeout_s=WAIT_S))
            text: str = answer["choices"][0]["text"]
            return text

    async def ready_gateway(self, rng: random.Random) -> HostPort:
        """As a Service does it: any gateway whose readiness says so."""
        while True:
            for name in rng.sample(GATEWAYS, len(GATEWAYS)):
                status, _ = await self.get(self.parts[name].address, "/readyz")
                if status == 200:
                    return self.parts[name].address
            await asyncio.sleep(0.05)

    async def run_client(self, index: int) -> None:
        """Stream after stream until the restarts are over."""
        rng = random.Random(index)
        while not self.is_over:
            prompt = f"{rng.getrandbits(64):x} " + "word " * rng.randrange(20, 400)
            text, error = await self.stream(await self.ready_gateway(rng), prompt)
            if error in {"refused", "reset"}:
                continue  # Nothing was answered: any client or proxy sends such a call again.
            self.outcomes[error or "whole"] += 1
            if not error and text != await self.alone(prompt):
                self.wrong.append(prompt[:20])

    async def stream(self, gateway: HostPort, prompt: str) -> tuple[str, str]:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        raw = b""
        try:
            async with await self.client.request(
                "POST",
                gateway,
                "/v1/completions",
                headers=JSON,
                body=json.dumps(body | {"stream": True}).encode(),
                head_timeout_s=WAIT_S,
            ) as response:
                if response.status != 200:
                    why = response.header(b"x-pdcoord-reason") or b"?"
                    return "", f"{response.status} {why.decode()}"
                while part := await response.read_chunk(idle_timeout_s=WAIT_S):
                    raw += part
        except ConnectError:
            return "", "refused"
        except ResetError:
            return "", "reset"
        except WireError as error:
            return "", f"{type(error).__name__} after {len(raw)} bytes"
        return read_stream(raw)


def read_stream(raw: bytes) -> tuple[str, str]:
    """The text of a stream, and what is wrong with it."""
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return "", f"no end: {events[-1:]!r}"[:200]
    chunks = [msgspec.json.decode(event) for event in events[:-1]]
    if len({chunk.get("id") for chunk in chunks}) != 1:
        return "", f"several ids, or an error: {chunks[-1]}"[:200]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), ""


def lay_out(folder: Path) -> dict[str, Part]:
    names = ["reference", *PREFILLS, *DECODES]
    ports = iter(free_ports(2 * len(names) + 2 * len(DECODES) + 2 * len(GATEWAYS)))
    engines = {name: (next(ports), next(ports)) for name in names}
    sidecars = {name: (next(ports), next(ports)) for name in DECODES}
    gateways = {name: (next(ports), next(ports)) for name in GATEWAYS}
    fleet = [
        {
            "name": name,
            "profile": "nvidia-h100-8b",
            "role": {"pre": "prefill", "dec": "decode"}.get(name[:3], "both"),
            "port": port,
            "side_channel_port": side,
            "speed": SPEED,
        }
        for name, (port, side) in engines.items()
    ]
    write(folder / "fleet.yaml", {"kind": "EmulatedFleet", "seed": 3, "model": MODEL, "engines": fleet})
    write(folder / "policy.yaml", policy(engines, sidecars))
    parts = {
        name: Part(["pdcoord", "emulate", str(folder / "fleet.yaml"), "--engine", name], at(port), "/health")
        for name, (port, _) in engines.items()
    }
    for name, (port, metrics) in sidecars.items():
        command = [
            "pdcoord-sidecar",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--metrics-port",
            str(metrics),
        ]
        allowed = ",".join(at(engines[each][0]) for each in PREFILLS)
        command += ["--engine", at(engines[name][0]), "--allow", allowed]
        parts[f"sidecar-{name}"] = Part(command, at(port), "/health")
    for name, (port, admin) in gateways.items():
        env = {
            "PDCOORD_PORT": str(port),
            "PDCOORD_ADMIN_PORT": str(admin),
            "PDCOORD_POLICY": str(folder / "policy.yaml"),
            "PDCOORD_DRAIN_NOTICE_S": "0.5",
        }
        parts[name] = Part(["pdcoord", "serve"], at(port), "/livez", env)
    return parts


def at(port: int) -> HostPort:
    return HostPort(f"127.0.0.1:{port}")


def policy(engines: dict[str, tuple[int, int]], sidecars: dict[str, tuple[int, int]]) -> dict[str, Any]:
    def pool(role: str, addresses: Sequence[HostPort]) -> dict[str, Any]:
        return {
            "name": role,
            "role": role,
            "vendor": "v",
            "engine": "vllm",
            "connector": "pdcoord",
            "layout": {"block_tokens": 16},
            "kv_bytes_per_token": 131_072,
            "link_gbit_per_s": 400,
            "speed": SPEED,
            "endpoints": [{"name": str(i), "address": each} for i, each in enumerate(addresses)],
        }

    return {
        "kind": "PoolPolicy",
        "metadata": {"name": "rolling"},
        "model": {"name": MODEL},
        "disaggregation": {"mode": "always"},
        "pools": [
            pool("prefill", [at(engines[name][0]) for name in PREFILLS]),
            pool("decode", [at(port) for port, _ in sidecars.values()]),
        ],
    }


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps({**HEAD, **document}))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with Client() as client, Processes(tmp_path) as processes:
        made = Site(processes, client, lay_out(tmp_path))
        for name in made.parts:
            await made.start(name)
        await made.until_settled()
        yield made


async def test_a_rolling_restart_of_all_parts_loses_nothing(site: Site) -> None:
    statuses: dict[str, int] = {}
    async with asyncio.TaskGroup() as group:
        for index in range(STREAMS):
            group.create_task(site.run_client(index))
        try:
            for name in [each for each in site.parts if each != "reference"]:
                before = site.outcomes.total()
                statuses[name] = await site.processes.terminate(name, GRACE_S)
                await site.start(name)
                await site.until_settled()
                async with asyncio.timeout(WAIT_S):
                    while site.outcomes.total() < before + STREAMS // 2:  # clients set no event
                        await asyncio.sleep(0.05)
        finally:
            site.is_over = True
    assert set(site.outcomes) == {"whole"}, site.outcomes
    assert site.wrong == []
    assert set(statuses.values()) == {0}, statuses
