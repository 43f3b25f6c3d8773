"""Calls that wait in the gateway process, before an emulated engine that runs one request at a time."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from structlog.testing import LogCapture

from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim.emulator import running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

MODEL = "demo/tiny"
STEP_MS = 4.0
HOLD_TOKENS = 15_000
"""A minute of steps: longer than any test here may take."""
POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: demo/tiny}}
pools:
  - name: one
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 131072
    endpoints: [{{name: e, address: "{address}"}}]
    speed: {{prefill_base_ms: 1, prefill_ms_per_token: 0.01, step_base_ms: 4}}
    limits: {{in_flight_max: 1}}
admission:
  wait_ms_max: {wait_ms_max}
  requests_max: {requests_max}
  objectives: {{gold: 10, batch: -1}}
"""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: Any
    at_s: float


@dataclass
class Bench:
    process: Process
    client: Client
    answers: dict[str, Answer] = field(default_factory=dict)

    async def call(self, name: str, tokens: int = 20, **headers: str) -> Answer:
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "min_tokens": tokens}
        given = {"x-request-id": name} | {key.replace("_", "-"): value for key, value in headers.items()}
        async with await self.client.request(
            "POST",
            HostPort(f"127.0.0.1:{self.process.ports[0]}"),
            "/v1/completions",
            headers=[(key.encode(), value.encode()) for key, value in given.items()],
            body=json.dumps(body).encode(),
            head_timeout_s=30.0,
        ) as response:
            raw = await response.read_all(timeout_s=30.0)
            shown = {key.decode(): value.decode() for key, value in response.headers}
            at_s = asyncio.get_running_loop().time()
            self.answers[name] = Answer(response.status, shown, json.loads(raw), at_s)
        return self.answers[name]

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """The engine's one place is taken for as long as the block lasts, or until its client gives up."""
        async with asyncio.TaskGroup() as group:
            holder = group.create_task(self.call("holder", tokens=HOLD_TOKENS))
            await until(lambda: self.process.coordinator.live_count == 1)
            yield
            assert not holder.done()
            holder.cancel()

    @property
    def waiting_count(self) -> int:
        return self.process.coordinator.admission.count

    def decision(self, name: str) -> Any:
        view = self.process.loop.decision_view(name)
        assert view is not None
        return view


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.002)


@asynccontextmanager
async def started(folder: Path, wait_ms_max: int = 20_000, requests_max: int = 100) -> AsyncIterator[Bench]:
    engine = {
        "name": "e",
        "profile": "nvidia-h100-8b",
        "port": 0,
        "running_max": 1,
        "speed": {"prefill_base_ms": 1, "prefill_ms_per_token": 0.01, "step_base_ms": STEP_MS},
    }
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": MODEL,
                "engines": [engine],
            }
        )
    )
    log = structlog.wrap_logger(
        None, processors=[LogCapture()], wrapper_class=structlog.make_filtering_bound_logger("info")
    )
    async with running(fleet, fleet.engines) as ((emulated,), _), Client() as client:
        path = folder / "policy.yaml"
        path.write_text(
            POLICY.format(address=emulated.address, wait_ms_max=wait_ms_max, requests_max=requests_max)
        )
        settings = load_settings(policy=path, port=0, admin_port=0, scrape_interval_s=0.02, drain_s=5.0)
        process = Process(settings, GatewayFront(settings), log)
        process.files.load_first()
        stop, up = asyncio.Event(), asyncio.Event()
        async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
            serving = group.create_task(process.run(stop, up.set))
            try:
                await up.wait()
                await until(lambda: all(state.is_eligible for state in process.coordinator.fleet.states()))
                yield Bench(process, client)
            finally:
                stop.set()
                assert await serving == 0
        assert process.coordinator.live_count == 0
        process.coordinator.validate()


async def test_calls_wait_for_their_turn_and_are_all_served(tmp_path: Path) -> None:
    async with started(tmp_path) as bench, asyncio.TaskGroup() as group:
        async with bench.held():
            calls = [group.create_task(bench.call(f"r{i}", tokens=5)) for i in range(8)]
            await until(lambda: bench.waiting_count == 8)
        assert {(await call).status for call in calls} == {200}
        shown = bench.decision("r7")
        assert shown.waited_ms > 0.0
        assert shown.outcome == "ok"


async def test_priorities_overtake_and_the_sheddable_is_refused_at_once(tmp_path: Path) -> None:
    async with started(tmp_path) as bench, asyncio.TaskGroup() as group:
        async with bench.held():
            group.create_task(bench.call("plain"))
            await until(lambda: bench.waiting_count == 1)
            group.create_task(bench.call("gold", x_llm_d_inference_objective="gold"))
            await until(lambda: bench.waiting_count == 2)
            batch = await bench.call("batch", x_llm_d_inference_objective="batch")
            assert (batch.status, batch.headers["x-pdcoord-reason"]) == (429, "shed")
            assert batch.body["error"]["type"] == "rate_limit_error"
        await until(lambda: len(bench.answers) == 3)
        assert list(bench.answers) == ["batch", "gold", "plain"]


async def test_a_flood_is_told_at_once_when_to_come_back_and_shuts_out_nobody_else(tmp_path: Path) -> None:
    async with started(tmp_path, requests_max=6) as bench, asyncio.TaskGroup() as group:
        async with bench.held():
            flood = [
                group.create_task(bench.call(f"f{i}", tokens=5, x_llm_d_inference_fairness_id="flood"))
                for i in range(30)
            ]
            await until(lambda: len(bench.answers) == 24)
            assert {answer.headers["x-pdcoord-reason"] for answer in bench.answers.values()} == {"queue-full"}
            assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in bench.answers.values())
            coming = group.create_task(bench.call("small", tokens=5, x_llm_d_inference_fairness_id="small"))
            await until(lambda: len(bench.answers) == 25)
        small = await coming
        assert small.status == 200
        answers = [await call for call in flood]
        statuses = [answer.status for answer in answers]
        assert (statuses.count(200), statuses.count(429)) == (5, 25)
        assert "shed" in {answer.headers.get("x-pdcoord-reason") for answer in answers}
        assert sum(answer.at_s < small.at_s for answer in answers if answer.status == 200) <= 1


async def test_a_client_that_leaves_frees_its_place(tmp_path: Path) -> None:
    async with started(tmp_path, requests_max=1) as bench, asyncio.TaskGroup() as group:
        async with bench.held():
            leaver = group.create_task(bench.call("leaver"))
            await until(lambda: bench.waiting_count == 1)
            assert (await bench.call("full")).headers["x-pdcoord-reason"] == "queue-full"
            leaver.cancel()
            await until(lambda: bench.waiting_count == 0)
            stayer = group.create_task(bench.call("stayer"))
            await until(lambda: bench.waiting_count == 1)
        assert (await stayer).status == 200
        assert bench.decision("leaver").outcome == "client-gone"


async def test_who_waited_too_long_is_refused_by_the_clock_alone(tmp_path: Path) -> None:
    async with started(tmp_path, wait_ms_max=150) as bench, bench.held():
        answer = await bench.call("second", tokens=5)
        assert (answer.status, answer.headers["x-pdcoord-reason"]) == (429, "waited-too-long")


async def test_tokens_of_answers_reach_the_core(tmp_path: Path) -> None:
    async with started(tmp_path) as bench:
        speed = bench.process.coordinator._speed
        seen = []
        learn = speed.learn
        speed.learn = lambda observation: (seen.append(observation), learn(observation))
        await bench.call("a", tokens=7)
        await until(lambda: bool(seen))
        assert 7 in {getattr(observation, "output_tokens", None) for observation in seen}
