"""Two coordinators over one fleet, all as processes: they see each other's load, and either may be killed."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

MODEL = "org/model"
WAIT_S = 60.0
"""Longest wait for a condition; the box may be busy."""
KEY = "0123456789abcdef0123456789abcdef"
SPEED = {"prefill_base_ms": 5, "prefill_ms_per_token": 0.05, "step_base_ms": 5}
PROMPTS = 8
RATE_PER_S = 50.0
UNDER_WAY_MAX = 24
"""A machine that is slower than the rate is offered less, so that nothing waits past a deadline for it."""
EVENTS = 7
"""Of one request that is served split: it, its two legs and its output begin; it and its legs end."""
COMMANDS = {"pdcoord": "pdcoord.cli", "pdcoord-sidecar": "sidecar.main"}

Ask = Callable[[int], Awaitable[None]]


class NotReadyError(Exception):
    """The replica has not heard of its endpoints yet."""


class Started:
    """One of our commands as a process."""

    def __init__(self, folder: Path, name: str, command: list[str], env: Mapping[str, str]) -> None:
        self.log = folder / f"{name}.log"
        self.command, self.env = command, env
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        word, *arguments = self.command
        with self.log.open("ab") as sink:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                f"import sys; from {COMMANDS[word]} import main; sys.exit(main())",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self.env},
            )

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


class Fleet:
    """Two replicas, three decode pods with sidecars, two prefill pods."""

    def __init__(self, folder: Path, client: Client) -> None:
        self.folder, self.client = folder, client
        ports = iter(free_ports(2 * 5 + 3 * 2 + 2 * 3))
        engines = [*(f"prefill-{n}" for n in range(2)), *(f"decode-{n}" for n in range(3))]
        at = {name: next(ports) for name in engines}
        side = {name: next(ports) for name in engines}
        sidecars = {name: (next(ports), next(ports)) for name in engines if name.startswith("decode")}
        self.gateways, self.admins, controls = ([next(ports), next(ports)] for _ in range(3))
        key = folder / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        fleet = [
            {
                "name": name,
                "profile": "nvidia-h100-8b",
                "role": name.partition("-")[0],
                "port": at[name],
                "side_channel_port": side[name],
                "speed": SPEED,
                "kv_blocks": 4_096,
            }
            for name in engines
        ]
        (folder / "fleet.yaml").write_text(
            json.dumps(
                {
                    "apiVersion": "pdcoord.io/v1alpha1",
                    "kind": "EmulatedFleet",
                    "seed": 1,
                    "model": MODEL,
                    "engines": fleet,
                }
            )
        )
        pools = [
            pool("prefill", {name: at[name] for name in engines[:2]}),
            pool("decode", {name: pair[0] for name, pair in sidecars.items()}),
        ]
        (folder / "policy.yaml").write_text(
            json.dumps(
                {
                    "apiVersion": "pdcoord.io/v1alpha1",
                    "kind": "PoolPolicy",
                    "metadata": {"name": "m"},
                    "model": {"name": MODEL},
                    "pools": pools,
                    "disaggregation": {"mode": "always"},
                }
            )
        )
        self.engines = Started(folder, "engines", ["pdcoord", "emulate", str(folder / "fleet.yaml")], {})
        self.sidecars = [
            Started(
                folder,
                f"sidecar-{name}",
                [
                    *("pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(port)),
                    *("--engine", f"127.0.0.1:{at[name]}", "--metrics-port", str(metrics_port)),
                    *(word for control in controls for word in ("--control", f"127.0.0.1:{control}")),
                    *("--control-key-file", str(key), "--allow-from-control"),
                ],
                {},
            )
            for name, (port, metrics_port) in sidecars.items()
        ]
        self.sidecar_metrics = [metrics_port for _, metrics_port in sidecars.values()]
        self.replicas = [
            Started(
                folder,
                f"replica-{index}",
                ["pdcoord", "serve"],
                {
                    "PDCOORD_POLICY": str(folder / "policy.yaml"),
                    "PDCOORD_PORT": str(self.gateways[index]),
                    "PDCOORD_ADMIN_PORT": str(self.admins[index]),
                    "PDCOORD_CONTROL_PORT": str(controls[index]),
                    "PDCOORD_CONTROL_KEY_FILE": str(key),
                    "PDCOORD_REPLICA": f"replica-{index}",
                },
            )
            for index in range(2)
        ]

    async def get(self, port: int, path: str) -> bytes:
        address = HostPort(f"127.0.0.1:{port}")
        async with await self.client.request("GET", address, path, head_timeout_s=5.0) as response:
            raw = await response.read_all(timeout_s=5.0)
            return raw if response.status == 200 else b""

    async def load(self, index: int) -> dict[str, tuple[int, int]]:
        """What a replica counts on each endpoint: requests, and bytes under way."""
        view = json.loads(await self.get(self.admins[index], "/fleet"))
        return {each["id"]: (each["requests"], each["bytes_in_flight"]) for each in view["endpoints"]}

    async def is_up(self, index: int) -> bool:
        try:
            return bool(await self.get(self.gateways[index], "/readyz")) and await self.streams(index) == 3
        except (WireError, TimeoutError):
            return False

    async def streams(self, index: int) -> int:
        return await self.count(index, "control_streams")

    async def count(self, index: int, series: str) -> int:
        text = (await self.get(self.gateways[index], "/metrics")).decode()
        start = f"pdcoord_gateway_{series} "
        return int(float(next(line for line in text.splitlines() if line.startswith(start))[len(start) :]))

    async def until_count(self, index: int, series: str, count: int) -> None:
        async def is_there() -> bool:
            return await self.count(index, series) == count

        await until(is_there, self)

    async def ask(self, index: int, prompt: str, tokens: int) -> str:
        """One answer through a replica.

        Raises:
            WireError: if the replica broke off.
            NotReadyError: if it has only just started; a load balancer would not have asked it.
        """
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": tokens}).encode()
        async with await self.client.request(
            "POST",
            HostPort(f"127.0.0.1:{self.gateways[index]}"),
            "/v1/completions",
            headers=[(b"content-type", b"application/json")],
            body=body,
            head_timeout_s=WAIT_S,
        ) as response:
            raw = await response.read_all(timeout_s=WAIT_S)
        if response.status == 503 and b"no-endpoints" in raw:
            raise NotReadyError
        assert response.status == 200, raw
        text: str = json.loads(raw)["choices"][0]["text"]
        return text

    def logs(self) -> str:
        started = (self.engines, *self.sidecars, *self.replicas)
        return "\n".join(f"== {each.log.name}\n{each.log.read_text()[-3_000:]}" for each in started)


def pool(role: str, endpoints: Mapping[str, int]) -> dict[str, Any]:
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
        "endpoints": [{"name": name, "address": f"127.0.0.1:{port}"} for name, port in endpoints.items()],
    }


async def until(is_so: Callable[[], Awaitable[bool]], fleet: Fleet) -> float:
    """Wait for a condition; how long that took, in seconds."""
    began_s = time.monotonic()
    while not await is_so():
        assert time.monotonic() < began_s + WAIT_S, fleet.logs()
        await asyncio.sleep(0.01)
    return time.monotonic() - began_s


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Fleet]:
    async with Client() as client, AsyncExitStack() as stack:
        fleet = Fleet(folder, client)
        for started in (fleet.engines, *fleet.sidecars, *fleet.replicas):
            stack.push_async_callback(started.kill)
            await started.start()

        async def is_whole() -> bool:
            return all([await fleet.is_up(index) for index in range(2)])

        await until(is_whole, fleet)
        yield fleet


async def are_equal(fleet: Fleet) -> bool:
    try:
        first, second = await asyncio.gather(fleet.load(0), fleet.load(1))
    except (WireError, TimeoutError):
        return False
    return first == second


@pytest.mark.timeout(240)
async def test_two_replicas_see_each_others_load(tmp_path: Path) -> None:
    async with running(tmp_path) as fleet, asyncio.TaskGroup() as group:
        told_before = [await fleet.count(index, 'control_reports_total{kind="event"}') for index in range(2)]
        asks = [group.create_task(fleet.ask(index % 2, f"prompt {index} " * 100, 400)) for index in range(6)]

        async def is_planned() -> bool:
            return await fleet.count(0, "remote_requests") + await fleet.count(1, "remote_requests") >= 1

        await until(is_planned, fleet)

        async def is_seen() -> bool:
            loads = [await fleet.load(index) for index in range(2)]
            on_decode = [sum(n for id_, (n, _) in load.items() if "decode" in id_) for load in loads]
            return on_decode == [6, 6] and loads[0] == loads[1]

        seen_s = await until(is_seen, fleet)
        said = f"two replicas agree on six requests {seen_s * 1e3:.0f} ms after the first was told of"
        print(said)  # noqa: T201  # to be read; the machine decides it, so it decides nothing
        await asyncio.gather(*asks)
        # Told as it happened, to both: no snapshot stands for what was too late, and nothing was said twice.
        for index, before in enumerate(told_before):
            await fleet.until_count(index, 'control_reports_total{kind="event"}', before + 6 * EVENTS)
            assert await fleet.count(index, 'control_reports_total{kind="snapshot"}') == 3

        async def is_idle() -> bool:
            loads = [await fleet.load(index) for index in range(2)]
            return all(count == 0 for load in loads for count, _ in load.values())

        await until(is_idle, fleet)
        paths = json.loads(await fleet.get(fleet.sidecar_metrics[0], "/paths"))
        assert {row["verdict"] for row in paths["told"]} == {"native"}
        assert len({row["replica"] for row in paths["told"]}) == 2


async def serve_on(fleet: Fleet, expected: list[str], index: int, done: list[int]) -> None:
    """One request of the load: whoever breaks off is left, and the other replica is asked."""
    which, deadline_s = index % 2, time.monotonic() + WAIT_S
    while True:
        try:
            answer = await fleet.ask(which, prompt_of(index), 20)
        except (WireError, NotReadyError):
            assert time.monotonic() < deadline_s, fleet.logs()
            which = 1 - which
            await asyncio.sleep(0.02)
            continue
        assert answer == expected[index % PROMPTS]
        done.append(index)
        return


def prompt_of(index: int) -> str:
    return f"question {index % PROMPTS} " * 60


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [0, 1])
async def test_killing_either_replica_loses_no_request(tmp_path: Path, victim: int) -> None:
    async with running(tmp_path) as fleet:
        expected = [await fleet.ask(0, prompt_of(index), 20) for index in range(PROMPTS)]
        done: list[int] = []
        sent = 0
        room = asyncio.Semaphore(UNDER_WAY_MAX)

        async def serve(index: int) -> None:
            try:
                await serve_on(fleet, expected, index, done)
            finally:
                room.release()

        async with asyncio.TaskGroup() as group:

            async def load_until(stop: asyncio.Event) -> None:
                nonlocal sent
                began_s = time.monotonic()
                while not stop.is_set():
                    await room.acquire()
                    group.create_task(serve(sent))
                    sent += 1
                    await asyncio.sleep(max(0.0, began_s + sent / RATE_PER_S - time.monotonic()))

            stop = asyncio.Event()
            loader = group.create_task(load_until(stop))

            async def is_under_way() -> bool:
                return len(done) >= 50

            await until(is_under_way, fleet)
            await fleet.replicas[victim].kill()
            before = len(done)

            async def others_go_on() -> bool:
                return len(done) >= before + 50

            await until(others_go_on, fleet)
            await fleet.replicas[victim].start()

            async def listens() -> bool:
                with contextlib.suppress(WireError, TimeoutError):
                    return bool(await fleet.get(fleet.gateways[victim], "/metrics"))
                return False

            await until(listens, fleet)

            async def is_back() -> bool:
                return await fleet.is_up(victim)

            back_s = await until(is_back, fleet)

            async def is_equal() -> bool:
                return await are_equal(fleet)

            whole_s = await until(is_equal, fleet)
            said = f"has every stream {back_s:.2f} s after it answers, counts right {whole_s:.2f} s later"
            print(f"a killed replica {said}")  # noqa: T201  # as above
            stop.set()
            await loader
        assert sorted(done) == list(range(sent))
        await until(is_equal, fleet)
