"""Two coordinators, three sidecars and emulated engines as processes: how soon replicas agree."""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

AGREE_S, BACK_S = 0.2, 2.0
"""What is promised of both times."""
MODEL = "org/model"
SPEED = {"prefill_base_ms": 5, "prefill_ms_per_token": 0.05, "step_base_ms": 5}
HELD_COUNT, HELD_TOKENS = 30, 8_000
WAIT_S = 60.0
_HEAD = {"apiVersion": "pdcoord.io/v1alpha1"}
_JSON = [(b"content-type", b"application/json")]
_ENTRIES = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}


@dataclass(frozen=True, slots=True)
class Times:
    """In seconds.

    Attributes:
        agree: for each request, from its client's sending it to its being in the other replica's ledger.
        back: from a killed replica's listening again to its ledger's being that of the other.
        start: from its process's beginning to its listening.
    """

    agree: list[float]
    back: float
    start: float


class Processes:
    """All of them, with what is asked of them."""

    def __init__(self, folder: Path, client: Client, stack: AsyncExitStack) -> None:
        self._folder, self._client, self._stack = folder, client, stack
        names = ["prefill-0", *(f"decode-{index}" for index in range(3))]
        ports = iter(free_ports(2 * len(names) + 6 + 6))
        engines = {name: (next(ports), next(ports)) for name in names}
        sidecars = {name: (next(ports), next(ports)) for name in names[1:]}
        self.gateways, self.admins, controls = ([next(ports), next(ports)] for _ in range(3))
        self._fleet(engines)
        self._policy(engines, sidecars)
        self.commands = [["pdcoord", "emulate", str(folder / "fleet.yaml")]]
        dial = [word for port in controls for word in ("--control", f"127.0.0.1:{port}")]
        self.commands += [
            [
                *("pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(port), *dial),
                *("--engine", f"127.0.0.1:{engines[name][0]}", "--metrics-port", str(metrics)),
                *("--allow", f"127.0.0.1:{engines['prefill-0'][0]}"),
            ]
            for name, (port, metrics) in sidecars.items()
        ]
        self._replicas = [
            {
                "PDCOORD_POLICY": str(folder / "policy.yaml"),
                "PDCOORD_PORT": str(self.gateways[index]),
                "PDCOORD_ADMIN_PORT": str(self.admins[index]),
                "PDCOORD_CONTROL_PORT": str(controls[index]),
                "PDCOORD_REPLICA": f"replica-{index}",
            }
            for index in range(2)
        ]

    def _fleet(self, engines: Mapping[str, tuple[int, int]]) -> None:
        listed = [
            {
                "name": name,
                "profile": "nvidia-h100-8b",
                "role": name.partition("-")[0],
                "port": port,
                "side_channel_port": side,
                "speed": SPEED,
                "kv_blocks": 65_536,
            }
            for name, (port, side) in engines.items()
        ]
        self._write("fleet", {"kind": "EmulatedFleet", "seed": 1, "model": MODEL, "engines": listed})

    def _policy(
        self, engines: Mapping[str, tuple[int, int]], sidecars: Mapping[str, tuple[int, int]]
    ) -> None:
        at = {"prefill": {"prefill-0": engines["prefill-0"]}, "decode": sidecars}
        pools = [
            {
                "name": role,
                "role": role,
                "vendor": "v",
                "engine": "vllm",
                "connector": "pdcoord",
                "layout": {"block_tokens": 16},
                "kv_bytes_per_token": 131_072,
                "link_gbit_per_s": 400,
                "speed": SPEED,
                "endpoints": [
                    {"name": name, "address": f"127.0.0.1:{port}"} for name, (port, _) in listed.items()
                ],
            }
            for role, listed in at.items()
        ]
        policy = {"metadata": {"name": "m"}, "model": {"name": MODEL}, "pools": pools}
        self._write("policy", {"kind": "PoolPolicy", "disaggregation": {"mode": "always"}, **policy})

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        (self._folder / f"{name}.yaml").write_text(json.dumps({**_HEAD, **document}))

    async def start(self, command: list[str], env: Mapping[str, str]) -> asyncio.subprocess.Process:
        word, *arguments = command
        code = f"import sys; from {_ENTRIES[word]} import main; sys.exit(main())"
        null = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, *arguments),
            stdin=null,
            stdout=null,
            stderr=null,
            env={**os.environ, **env},
        )
        self._stack.push_async_callback(end, process)
        return process

    async def start_replica(self, index: int) -> asyncio.subprocess.Process:
        return await self.start(["pdcoord", "serve"], self._replicas[index])

    async def get(self, port: int, path: str) -> bytes:
        address = HostPort(f"127.0.0.1:{port}")
        with suppress(WireError, TimeoutError):
            async with await self._client.request("GET", address, path, head_timeout_s=5.0) as response:
                raw = await response.read_all(timeout_s=5.0)
                return raw if response.status == 200 else b""
        return b""

    async def load(self, index: int) -> dict[str, int]:
        """Requests of each endpoint as a replica counts them; empty while it does not answer."""
        raw = await self.get(self.admins[index], "/fleet")
        return {each["id"]: each["requests"] for each in json.loads(raw)["endpoints"]} if raw else {}

    async def is_up(self, index: int) -> bool:
        metrics = await self.get(self.gateways[index], "/metrics")
        is_ready = bool(await self.get(self.gateways[index], "/readyz"))
        return is_ready and b"pdcoord_gateway_control_streams 3.0" in metrics

    async def ask(self, index: int, tokens: int) -> None:
        body = json.dumps({"model": MODEL, "prompt": "word " * 200, "max_tokens": tokens}).encode()
        address = HostPort(f"127.0.0.1:{self.gateways[index]}")
        async with await self._client.request(
            "POST", address, "/v1/completions", headers=_JSON, body=body, head_timeout_s=10 * WAIT_S
        ) as response:
            await response.read_all(timeout_s=WAIT_S)


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def until(is_so: Callable[[], Awaitable[bool]]) -> float:
    began_s = time.monotonic()
    async with asyncio.timeout(WAIT_S):
        while not await is_so():  # noqa: ASYNC110  # another process sets no event
            await asyncio.sleep(0.001)
    return time.monotonic() - began_s


async def measure(rounds: int) -> Times:
    """Start all, send requests through one replica and look at the other, then kill that one.

    Raises:
        TimeoutError: if something does not come about in WAIT_S.
    """
    with tempfile.TemporaryDirectory() as folder:
        async with Client() as client, AsyncExitStack() as stack:
            at = Processes(Path(folder), client, stack)
            for command in at.commands:
                await at.start(command, {})
            replicas = [await at.start_replica(index) for index in range(2)]

            async def is_up() -> bool:
                return await at.is_up(0) and await at.is_up(1)

            await until(is_up)
            agree = [await _seen_by_other(at) for _ in range(rounds)]
            async with asyncio.TaskGroup() as group:
                held = [group.create_task(at.ask(0, HELD_TOKENS)) for _ in range(HELD_COUNT)]

                async def is_whole() -> bool:
                    loads = [await at.load(index) for index in range(2)]
                    count = sum(n for name, n in loads[1].items() if "decode" in name)
                    return loads[0] == loads[1] and count == HELD_COUNT

                await until(is_whole)
                await end(replicas[1])
                await at.start_replica(1)

                async def listens() -> bool:
                    return bool(await at.get(at.gateways[1], "/metrics"))

                start_s = await until(listens)
                back_s = await until(is_whole)
                for task in held:
                    task.cancel()
    return Times(agree, back_s, start_s)


async def _seen_by_other(at: Processes) -> float:
    """One request through replica 0, until replica 1 counts it."""

    async def is_idle() -> bool:
        return not any([*(await at.load(0)).values(), *(await at.load(1)).values()])

    async def is_seen() -> bool:
        return any((await at.load(1)).values())

    await until(is_idle)
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(at.ask(0, HELD_TOKENS))
        took_s = await until(is_seen)
        asking.cancel()
    return took_s


def report(times: Times) -> None:
    agree_ms = sorted(seconds * 1e3 for seconds in times.agree)
    print(
        f"processes: a request through one replica is in the other's ledger after "
        f"{statistics.median(agree_ms):.0f} ms, worst of {len(agree_ms)} {agree_ms[-1]:.0f} ms "
        f"(bar {AGREE_S * 1e3:.0f} ms: {_met(agree_ms[-1] <= AGREE_S * 1e3)})"
    )
    print(
        f"processes: a killed replica counts {HELD_COUNT} requests again {times.back:.2f} s after it listens "
        f"(bar {BACK_S:.0f} s: {_met(times.back <= BACK_S)}); its start took {times.start:.2f} s"
    )


def _met(is_met: bool) -> str:  # noqa: FBT001  # a word for it is all that this gives
    return "met" if is_met else "MISSED"
