"""The emulator behind HTTP and the simulator: the same calls take the same time."""

import asyncio
import json
import selectors
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Any

from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Sample
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import ServedHeader
from pdcoord.sim.coarse.cluster import run
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.sim.routers.base import Place, Released, Route, Surroundings
from pdcoord.sim.workload.call import Call, CallId
from pdcoord.wire.client import Client
from transfer.verdict import Side

MODEL = "demo/tiny"
SEED = 5
CALL_COUNT = 40
RATE = 10.0
SHARE_MAX = 0.02
ON_ITS_WAY_S = 0.002
"""What was sent over loopback and cannot be read yet is waited for so long."""
ALONE, PREFILL, DECODE = range(3)
ENGINE = {
    "profile": "nvidia-h100-8b",
    "port": 0,
    "speed": {
        "prefill_base_ms": 5.0,
        "prefill_ms_per_token": 0.4,
        "prefill_ns_per_token_squared": 0.0,
        "step_base_ms": 30.0,
        "step_us_per_sequence": 1_000.0,
        "step_ns_per_context_token": 0.0,
    },
    "layout": {"block_tokens": 16, "order": "HND"},
    "kv_blocks": 512,
    "context_tokens_max": 4_096,
    "step_tokens_max": 512,
    "link_gbit_per_s": 4,
}


def make_fleet() -> EmulatedFleet:
    roles = ("both", "prefill", "decode")
    text = json.dumps(
        {
            "apiVersion": "pdcoord.io/v1alpha1",
            "kind": "EmulatedFleet",
            "seed": SEED,
            "model": MODEL,
            "engines": [{**ENGINE, "name": f"{role}-0", "role": role} for role in roles],
        }
    )
    return EmulatedFleet.model_validate_json(text)


@dataclass
class Traffic:
    """Calls with their prompts."""

    listed: list[Call]
    prompts: list[list[int]]
    key_tokens: int = 16

    def calls(self) -> Iterator[Call]:
        return iter(self.listed)

    def after(self, call: Call, ended_s: float) -> Call | None:
        return None

    @property
    def call_count(self) -> int:
        return len(self.listed)


def make_traffic() -> Traffic:
    rng = Random(SEED)
    shared = [rng.randrange(1 << 20) for _ in range(160)]
    traffic, at_s = Traffic([], []), 0.0
    for number in range(CALL_COUNT):
        at_s += rng.expovariate(RATE)
        own = [rng.randrange(1 << 20) for _ in range(rng.randint(64, 480))]
        is_shared = rng.random() < 0.5
        prompt = shared + own if is_shared else own
        keys = [
            index if is_shared and index < 10 else number * 1_000 + index + 100
            for index in range(len(prompt) // 16)
        ]
        traffic.listed.append(Call(CallId(number), at_s, len(prompt), rng.randint(3, 16), tuple(keys)))
        traffic.prompts.append(prompt)
    return traffic


def route_of(call: Call) -> Route:
    """Every other call is split."""
    return Route(DECODE, PREFILL) if call.id % 2 else Route(ALONE)


@dataclass(frozen=True)
class Seen:
    """One call as its client saw it, from the start of the run."""

    sent_s: float
    first_s: float
    ended_s: float


class HttpFleet:
    """The emulated engines and a client of theirs."""

    def __init__(self, client: Client, engines: Sequence[EmulatedEngine]) -> None:
        self._client = client
        self._addresses = [engine.address for engine in engines]
        self._loop = asyncio.get_running_loop()
        self._begun_s = self._loop.time()

    def _now_s(self) -> float:
        return self._loop.time() - self._begun_s

    async def call(self, call: Call, prompt: list[int]) -> Seen:
        await asyncio.sleep(call.at_s - self._now_s())
        sent_s = self._now_s()
        route, more = route_of(call), {}
        if route.prefill is not None:
            asked = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "kv_transfer_params": asked}
            async with await self._post(route.prefill, body) as response:
                answer = json.loads(await response.read_all(timeout_s=30.0))
            more = {"kv_transfer_params": answer["kv_transfer_params"]}
        body = {"model": MODEL, "prompt": prompt, "max_tokens": call.output_tokens, "stream": True, **more}
        first_s = None
        async with await self._post(route.decode, body) as response:
            assert response.status == 200
            while chunk := await response.read_chunk(idle_timeout_s=30.0):
                if first_s is None and b'"text"' in chunk:
                    first_s = self._now_s()
        assert first_s is not None
        return Seen(sent_s, first_s, self._now_s())

    async def _post(self, index: int, body: dict[str, Any]) -> Any:
        raw = json.dumps(body).encode()
        return await self._client.request(
            "POST", self._addresses[index], "/v1/completions", body=raw, head_timeout_s=30.0
        )


async def emulate(traffic: Traffic) -> list[Seen]:
    fleet = make_fleet()
    async with running(fleet, fleet.engines) as (engines, _), Client() as client:
        http = HttpFleet(client, engines)
        # The first contact of a pair, and of a client with its engines, is not what is compared.
        for number in (-2, -1):
            await http.call(Call(CallId(number), 0.0, 20, 2), list(range(20)))
        http = HttpFleet(client, engines)
        async with asyncio.timeout(40.0), asyncio.TaskGroup() as group:
            calls = zip(traffic.listed, traffic.prompts, strict=True)
            tasks = [group.create_task(http.call(call, prompt)) for call, prompt in calls]
        return [task.result() for task in tasks]


class _Selector(selectors.DefaultSelector):
    """Nobody waits for time: where no socket has anything, the time that was to be waited has passed."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0.0:
            return super().select(timeout)
        found = super().select(ON_ITS_WAY_S)
        if not found:
            self.now_s += timeout
        return found


class PatientLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while anything is done, so that how busy the machine is does not show."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


class Fixed:
    """A router that knows where each call goes."""

    name = "fixed"

    def route(self, call: Call, now_s: float) -> Route:
        return route_of(call)

    def failed(self, call: Call, route: Route, now_s: float) -> Route:
        raise AssertionError(f"call {call.id} failed")

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None: ...

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None: ...

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None: ...

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None: ...

    def released(self, now_s: float) -> Released:
        return Released()

    def next_event_s(self) -> float | None:
        return None


def simulate(traffic: Traffic) -> list[Seen]:
    fleet = make_fleet()
    settings = [replace(spec.settings(MODEL, SEED), handshake_s=0.0) for spec in fleet.engines]
    places = []
    for index, engine in enumerate(settings):
        side = Side(engine.connector, engine.layout)
        pool = Pool(
            name=PoolName(engine.name),
            model=ModelName(MODEL),
            role=engine.role,
            vendor="nvidia",
            engine=EngineKind.VLLM,
            side=side,
            speed=engine.speed,
            kv_bytes_per_token=engine.kv_bytes_per_token,
            link_bytes_per_s=engine.link_bytes_per_s,
        )
        endpoint = Endpoint(EndpointId(engine.name), pool, HostPort(f"10.0.0.{index}:80"))
        size = engine.layout.block_tokens
        places.append(
            Place(
                index, endpoint, engine.block_total * size, engine.running_max, engine.step_tokens_max, size
            )
        )
    surroundings = Surroundings(places, traffic.key_tokens, [[True] * 3] * 3)
    results = run(Scene(places, settings), Fixed(), traffic, surroundings=surroundings)
    found = []
    for each in results:
        assert each.first_s is not None
        assert each.ended_s is not None
        found.append(Seen(each.at_s, each.first_s, each.ended_s))
    return found


def measures(traffic: Traffic, seen: Sequence[Seen]) -> dict[str, float]:
    """Means over alone and split calls, and how fast they were served."""
    found = {}
    for name, rest in (("alone", 0), ("split", 1)):
        own = [(call, each) for call, each in zip(traffic.listed, seen, strict=True) if call.id % 2 == rest]
        found[f"{name} ttft"] = fmean(each.first_s - each.sent_s for _, each in own)
        found[f"{name} tpot"] = fmean(
            (each.ended_s - each.first_s) / (call.output_tokens - 1) for call, each in own
        )
    found["calls per second"] = len(seen) / (max(each.ended_s for each in seen) - seen[0].sent_s)
    return found


def test_the_simulator_and_the_emulator_behind_http_agree() -> None:
    traffic = make_traffic()
    with asyncio.Runner(loop_factory=PatientLoop) as runner:
        emulated = runner.run(emulate(traffic))
    simulated = simulate(traffic)
    expected, found = measures(traffic, emulated), measures(traffic, simulated)
    off = {name: found[name] / value - 1.0 for name, value in expected.items()}
    assert all(abs(share) <= SHARE_MAX for share in off.values()), off
