"""A gateway that tries an unlike pair before it is used: emulated engines, a sidecar process, requests."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import LogCapture

from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim.emulator import running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

MODEL = "demo/tiny"
WAIT_S = 60.0
FAST = {
    "profile": "nvidia-h100-8b",
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
    "context_tokens_max": 4_096,
    "handshake_s": 0.01,
}
BLOCKS_32 = {"layout": {"block_tokens": 32, "order": "NHD"}, "kv_blocks": 256}
BLOCKS_128 = {"layout": {"block_tokens": 128, "order": "NHD"}, "kv_blocks": 64}
SIDECAR = "import sys; from sidecar.main import main; sys.exit(main())"
LABELS = {"model": MODEL, "prefill_pool": "fast", "decode_pool": "wide"}
PROMPT = " ".join(f"word{number}" for number in range(700))
CANARY = {"interval_s": 600}


def fleet_of(name: str, port: int, side_port: int, **more: Any) -> EmulatedFleet:
    engine = {**FAST, "name": name, "port": port, "side_channel_port": side_port, **more}
    document = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "EmulatedFleet", "seed": 7, "model": MODEL}
    return EmulatedFleet.model_validate_json(json.dumps({**document, "engines": [engine]}))


def pool(name: str, role: str, vendor: str, port: int, declared: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "role": role,
        "vendor": vendor,
        "engine": "vllm",
        "kv_bytes_per_token": 131_072,
        "link_gbit_per_s": 100,
        "endpoints": [{"name": "a", "address": f"127.0.0.1:{port}"}],
        "speed": {"prefill_base_ms": 8, "prefill_ms_per_token": 0.1, "step_base_ms": 8},
        **declared,
    }


class Site:
    """A prefill engine, a decode engine that can be exchanged, its sidecar, and a gateway."""

    def __init__(self, folder: Path, client: Client) -> None:
        self.folder, self.client = folder, client
        self.ports = dict(zip(("p", "d", "pod", "p-side", "d-side"), free_ports(5), strict=True))
        self.log = LogCapture()
        self._engine: AsyncExitStack | None = None
        self.decode_port = "pod"

    async def start_decode(self, **more: Any) -> None:
        """The decode engine, at the address where the sidecar expects it; another one is stopped first."""
        await self.stop_decode()
        self._engine = AsyncExitStack()
        fleet = fleet_of("d", self.ports["d"], self.ports["d-side"], **more)
        await self._engine.enter_async_context(running(fleet, fleet.engines))

    async def stop_decode(self) -> None:
        if self._engine is not None:
            await self._engine.aclose()
            self._engine = None

    async def get(self, path: str, port_index: int) -> str:
        address = HostPort(f"127.0.0.1:{self.process.ports[port_index]}")
        async with await self.client.request("GET", address, path, head_timeout_s=WAIT_S) as response:
            return (await response.read_all(timeout_s=WAIT_S)).decode()

    async def path(self) -> dict[str, Any]:
        (row,) = json.loads(await self.get("/paths", 1))["paths"]
        found: dict[str, Any] = row
        return found

    async def metric(self, name: str, **labels: str) -> float | None:
        for family in text_string_to_metric_families(await self.get("/metrics", 0)):
            for sample in family.samples:
                if sample.name == name and sample.labels == LABELS | labels:
                    return float(sample.value)
        return None

    async def state(self, state: str) -> float | None:
        return await self.metric("pdcoord_gateway_canary_state", state=state)

    async def ask(self) -> tuple[str, str]:
        """One client's request: how it was served, and what it was answered."""
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
        address = HostPort(f"127.0.0.1:{self.process.ports[0]}")
        async with await self.client.request(
            "POST", address, "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=WAIT_S
        ) as response:
            raw = await response.read_all(timeout_s=WAIT_S)
            assert response.status == 200, raw
            decision = (response.header(b"x-pdcoord-decision") or b"").decode()
        return decision, json.loads(raw)["choices"][0]["text"]

    async def ask_engine(self) -> str:
        """The same at the prefill engine alone, which has never had anybody's KV but its own."""
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True}
        address = HostPort(f"127.0.0.1:{self.ports['p']}")
        async with await self.client.request(
            "POST", address, "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=WAIT_S
        ) as response:
            answer = json.loads(await response.read_all(timeout_s=WAIT_S))
        text: str = answer["choices"][0]["text"]
        return text

    def judged(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self.log.entries if entry["event"] == "canary.judged"]

    async def until(self, is_so: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not await is_so():  # What the code under test does sets no event.
                await asyncio.sleep(0.02)

    async def is_up(self, port: str) -> bool:
        try:
            async with await self.client.request(
                "GET", HostPort(f"127.0.0.1:{self.ports[port]}"), "/health", head_timeout_s=WAIT_S
            ) as response:
                await response.read_all(timeout_s=WAIT_S)
                return response.status == 200
        except WireError:
            return False

    def write_policy(self, declared: dict[str, Any], prefill: dict[str, Any], canary: dict[str, Any]) -> Path:
        path = self.folder / "policy.yaml"
        policy = {
            "apiVersion": "pdcoord.io/v1alpha1",
            "kind": "PoolPolicy",
            "metadata": {"name": "m"},
            "model": {"name": MODEL},
            "disaggregation": {"mode": "always"},
            "canary": canary,
            "pools": [
                pool("fast", "prefill", "nvidia", self.ports["p"], declared | prefill),
                pool("wide", "decode", "intel-gaudi", self.ports[self.decode_port], declared),
            ],
        }
        path.write_text(json.dumps(policy))
        return path


@asynccontextmanager
async def site(
    folder: Path,
    *,
    declared: dict[str, Any],
    prefill: dict[str, Any],
    decode: dict[str, Any],
    declared_prefill: dict[str, Any] | None = None,
    canary: dict[str, Any] | None = None,
    decode_port: str = "pod",
) -> AsyncIterator[Site]:
    """Everything started, and both endpoints ready.

    Args:
        decode_port: where the policy has the decode endpoint: at the sidecar, or past it at the engine.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(2.0 * WAIT_S))
        client = await stack.enter_async_context(Client())
        made = Site(folder, client)
        made.decode_port = decode_port
        fleet = fleet_of("p", made.ports["p"], made.ports["p-side"], **prefill)
        await stack.enter_async_context(running(fleet, fleet.engines))
        await made.start_decode(**decode)
        stack.push_async_callback(made.stop_decode)
        sidecar = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SIDECAR, "--host", "127.0.0.1", "--port", str(made.ports["pod"])),
            *("--engine", f"127.0.0.1:{made.ports['d']}", "--allow", f"127.0.0.1:{made.ports['p']}"),
            *("--metrics-port", "0"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )

        async def end_sidecar() -> None:
            sidecar.kill()
            await sidecar.wait()

        stack.push_async_callback(end_sidecar)
        await made.until(lambda: made.is_up("pod"))
        path = made.write_policy(declared, declared_prefill or {}, canary or CANARY)
        settings = load_settings(policy=path, port=0, admin_port=0, scrape_interval_s=0.02, drain_s=5.0)
        log = structlog.wrap_logger(None, processors=[made.log])
        made.process = Process(settings, GatewayFront(settings), log)
        made.process.files.load_first()
        stop, started = asyncio.Event(), asyncio.Event()
        group = await stack.enter_async_context(asyncio.TaskGroup())
        group.create_task(made.process.run(stop, started.set))
        stack.callback(stop.set)
        await started.wait()
        yield made


NIXL = {"connector": "nixl", "layout": {"block_tokens": 32, "order": "NHD"}}
"""What the policy says of both pools: equal layouts, which stock connectors may exchange."""
WRONG = {"connector": "nixl", **BLOCKS_128, "stock_silent_corruption": True}
"""What the decode engine really has: it takes KV of other blocks, and answers 200 with wrong tokens."""


async def test_a_pair_that_is_wrong_is_shut_and_opens_once_it_is_mended(tmp_path: Path) -> None:
    prefill = {"connector": "nixl", **BLOCKS_32}
    async with site(tmp_path, declared=NIXL, prefill=prefill, decode=WRONG) as made:

        async def has_failed() -> bool:
            return await made.state("failed") == 1.0

        await made.until(has_failed)
        row = await made.path()
        assert (row["breaker"], row["fault"]) == ("open", "canary-tokens")
        assert row["canary"]["position"] == 0
        assert row["canary"]["prefill_layout"].startswith("nvidia nixl")
        assert "block_tokens=32" in row["canary"]["decode_layout"]
        assert row["canary"]["decode_layout"].startswith("intel-gaudi nixl")
        count = await made.metric("pdcoord_gateway_canaries_total", outcome="canary-tokens")
        assert count is not None
        assert count >= 1.0
        # Nobody is refused, and nobody gets a wrong token.
        decision, text = await made.ask()
        assert decision == "colocated; no-open-path"
        assert text == await made.ask_engine()
        failed = [entry for entry in made.judged() if entry["outcome"] == "canary-tokens"]
        assert failed[0]["prefill_layout"] == row["canary"]["prefill_layout"]

        await made.start_decode(connector="nixl", **BLOCKS_32)

        async def has_passed() -> bool:
            return await made.state("passed") == 1.0

        await made.until(has_passed)
        row = await made.path()
        assert (row["breaker"], row["fault"], row["canary"]["state"]) == ("closed", "", "passed")
        decision, text = await made.ask()
        assert decision == "split; split-always"
        assert text == await made.ask_engine()


async def test_an_unlike_pair_that_works_is_opened(tmp_path: Path) -> None:
    ours = {"connector": "pdcoord"}
    async with site(
        tmp_path,
        declared=ours | {"layout": BLOCKS_128["layout"]},
        declared_prefill={"layout": BLOCKS_32["layout"]},
        prefill=ours | BLOCKS_32,
        decode=ours | BLOCKS_128,
    ) as made:

        async def has_passed() -> bool:
            return await made.state("passed") == 1.0

        await made.until(has_passed)
        row = await made.path()
        assert (row["verdict"], row["breaker"], row["fault"]) == ("regroup", "closed", "")
        assert made.judged()[-1]["outcome"] == "passed"
        decision, text = await made.ask()
        assert decision == "split; split-always"
        assert text == await made.ask_engine()


async def test_without_a_sidecar_of_ours_a_right_pair_is_open_and_unproven(tmp_path: Path) -> None:
    nixl = {"connector": "nixl", **BLOCKS_32}
    async with site(tmp_path, declared=NIXL, prefill=nixl, decode=nixl, decode_port="d") as made:

        async def is_unproven() -> bool:
            return await made.state("unproven") == 1.0

        await made.until(is_unproven)
        row = await made.path()
        assert (row["breaker"], row["fault"], row["canary"]["state"]) == ("closed", "", "unproven")
        assert "no sidecar of ours" in row["canary"]["detail"]
        judged = made.judged()[-1]
        assert (judged["outcome"], judged["log_level"]) == ("unproven", "warning")
        assert await made.metric("pdcoord_gateway_canaries_total", outcome="unproven") == 1.0
        decision, text = await made.ask()
        assert decision == "split; split-always"
        assert text == await made.ask_engine()


async def test_observed_pairs_are_told_of_and_not_shut(tmp_path: Path) -> None:
    prefill = {"connector": "nixl", **BLOCKS_32}
    canary = CANARY | {"mode": "observe"}
    async with site(tmp_path, declared=NIXL, prefill=prefill, decode=WRONG, canary=canary) as made:

        async def has_failed() -> bool:
            return await made.state("failed") == 1.0

        await made.until(has_failed)
        row = await made.path()
        assert (row["breaker"], row["fault"], row["canary"]["fault"]) == ("closed", "", "canary-tokens")
        decision, _ = await made.ask()
        assert decision == "split; split-always"


async def test_a_pair_over_which_no_kv_comes_is_shut(tmp_path: Path) -> None:
    # The stock connector sees that the blocks differ, and answers the decode leg with an error.
    wrong = {"connector": "nixl", **BLOCKS_128}
    async with site(
        tmp_path, declared=NIXL, prefill={"connector": "nixl", **BLOCKS_32}, decode=wrong
    ) as made:

        async def has_failed() -> bool:
            return await made.state("failed") == 1.0

        await made.until(has_failed)
        row = await made.path()
        assert (row["breaker"], row["fault"]) == ("open", "canary-error")
        assert row["canary"]["detail"] == "the split request failed: transfer-failed"
        decision, text = await made.ask()
        assert decision == "colocated; no-open-path"
        assert text == await made.ask_engine()
