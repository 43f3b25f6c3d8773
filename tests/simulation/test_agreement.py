"""The fast engine model against the emulator's own, on the same calls: first tokens and ends agree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from statistics import fmean, quantiles

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EngineKind,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
)
from pdcoord.core.plan import Candidate, Figures, Plan, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, ServedHeader
from pdcoord.sim import messages as m
from pdcoord.sim.coarse.cluster import Cluster
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.engine import EngineModel
from pdcoord.sim.loop import VirtualLoop
from pdcoord.sim.routers.base import Place, Released, Route, Surroundings
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.study.results import Fate
from pdcoord.sim.virtual_engines import Heard, VirtualEngines
from pdcoord.sim.virtual_sidecar import Began, Ended, Reply, VirtualHandoff
from pdcoord.sim.workload.call import Call, CallId
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

SPEED = SpeedFigures(
    prefill_base_s=0.004,
    prefill_s_per_token=0.0002,
    prefill_s_per_token_squared=2e-8,
    step_base_s=0.012,
    step_s_per_context_token=4e-7,
    step_s_per_sequence=0.0001,
)
MODEL = ModelName("agreement/model")


@dataclass(frozen=True)
class Case:
    """One kind of load.

    Attributes:
        roles: of the engines; with a prefill engine every call is split.
        tail: length of a prompt behind what it shares, from and to.
        share: tolerated difference, of the mean and of both quantiles.
    """

    name: str
    call_count: int
    rate: float
    tail: tuple[int, int]
    answer: tuple[int, int]
    block_total: int
    roles: tuple[Role, ...] = (Role.BOTH,)
    group_count: int = 0
    group_tokens: int = 0
    step_tokens_max: int = 1_024
    running_max: int = 64
    block_tokens: int = 16
    key_tokens: int = 16
    link_bytes_per_s: float = 1e9
    share: float = 0.01
    makes_preemptions: bool = False


CASES = (
    Case("calm", 120, 3.0, (20, 600), (1, 120), 4_096),
    Case("overload-preempts", 150, 10.0, (100, 500), (50, 300), 520, makes_preemptions=True),
    Case("chunked-prefill", 120, 2.0, (50, 3_000), (5, 100), 4_096, step_tokens_max=512),
    Case("batch-is-full", 150, 12.0, (20, 300), (10, 80), 4_096, running_max=8),
    Case("prefixes", 200, 8.0, (10, 200), (5, 80), 2_048, group_count=8, group_tokens=960),
    Case("prefixes-evicted", 200, 6.0, (10, 200), (5, 80), 768, group_count=30, group_tokens=960),
    Case(
        "large-blocks",
        200,
        6.0,
        (10, 400),
        (5, 80),
        128,
        group_count=16,
        group_tokens=1_000,
        block_tokens=128,
        key_tokens=64,
        share=0.1,
    ),
    Case(
        "large-keys",
        200,
        6.0,
        (10, 400),
        (5, 80),
        1_024,
        group_count=16,
        group_tokens=960,
        key_tokens=64,
        share=0.1,
    ),
    Case(
        "split",
        150,
        3.0,
        (64, 900),
        (5, 120),
        2_048,
        roles=(Role.PREFILL, Role.PREFILL, Role.DECODE),
        share=0.02,
    ),
    Case(
        "split-link-bound",
        120,
        6.0,
        (200, 900),
        (5, 60),
        2_048,
        roles=(Role.PREFILL, Role.PREFILL, Role.PREFILL, Role.DECODE),
        link_bytes_per_s=2.2e8,
        share=0.02,
    ),
    Case(
        "split-with-prefixes",
        150,
        5.0,
        (10, 300),
        (5, 80),
        1_024,
        roles=(Role.PREFILL, Role.DECODE, Role.DECODE),
        group_count=12,
        group_tokens=640,
        share=0.02,
    ),
)


@dataclass
class Traffic:
    """Calls with their prompts, and where each goes."""

    key_tokens: int
    calls: list[Call]
    prompts: list[tuple[int, ...]]
    routes: list[Route]


@dataclass
class Times:
    """Of each call: its first token and its end."""

    first_s: dict[int, float] = field(default_factory=dict)
    ended_s: dict[int, float] = field(default_factory=dict)


def make_traffic(case: Case, seed: int) -> Traffic:
    rng = Random(f"{case.name}/{seed}")
    groups = [[rng.randrange(1 << 20) for _ in range(case.group_tokens)] for _ in range(case.group_count)]
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    prefills = [i for i, role in enumerate(case.roles) if role is Role.PREFILL]
    decodes = [i for i, role in enumerate(case.roles) if role is not Role.PREFILL]
    traffic = Traffic(case.key_tokens, [], [], [])
    at_s = 0.0
    for number in range(case.call_count):
        at_s += rng.expovariate(case.rate)
        prompt = list(rng.choice(groups)) if groups else []
        prompt += [rng.randrange(1 << 20) for _ in range(rng.randint(*case.tail))]
        keys: list[int] = []
        for start in range(0, len(prompt) - case.key_tokens + 1, case.key_tokens):
            block = (keys[-1] if keys else -1, tuple(prompt[start : start + case.key_tokens]))
            keys.append(known.setdefault(block, len(known)))
        call = Call(CallId(number), at_s, len(prompt), rng.randint(*case.answer), tuple(keys))
        traffic.calls.append(call)
        traffic.prompts.append(tuple(prompt))
        prefill = rng.choice(prefills) if prefills else None
        traffic.routes.append(Route(rng.choice(decodes), prefill))
    return traffic


def make_scene(case: Case) -> Scene:
    layout = KvLayout(case.block_tokens)
    places, settings = [], []
    for index, role in enumerate(case.roles):
        pool = Pool(
            name=PoolName(f"{role}-{index}"),
            model=MODEL,
            role=role,
            vendor="alpha",
            engine=EngineKind.VLLM,
            side=Side(Connector.PDCOORD, layout),
            speed=SPEED,
            kv_bytes_per_token=131_072,
            link_bytes_per_s=case.link_bytes_per_s,
            limits=PoolLimits(),
        )
        endpoint = Endpoint(EndpointId(pool.name), pool, HostPort(f"10.0.0.{index}:8000"))
        engine = EngineSettings(
            name=pool.name,
            model=MODEL,
            speed=SPEED,
            layout=layout,
            block_total=case.block_total,
            kv_bytes_per_token=pool.kv_bytes_per_token,
            link_bytes_per_s=pool.link_bytes_per_s,
            role=role,
            step_tokens_max=case.step_tokens_max,
            running_max=case.running_max,
            context_tokens_max=min(8_192, case.block_total * case.block_tokens),
        )
        settings.append(engine)
        tokens = engine.block_total * case.block_tokens
        places.append(
            Place(index, endpoint, tokens, engine.running_max, engine.step_tokens_max, case.block_tokens)
        )
    return Scene(tuple(places), tuple(settings), transfer_s_max=3_600.0, prefill_s_max=3_600.0)


class Fine:
    """The emulator's engines in virtual time, fed with the same calls."""

    def __init__(self, scene: Scene, traffic: Traffic) -> None:
        self.times = Times()
        self.loop = VirtualLoop()
        self.engines = VirtualEngines(self.loop, Random(0))
        self._scene = scene
        for place, settings in zip(scene.places, scene.settings, strict=True):
            self.engines.add(place.endpoint.address, settings)
        for call, prompt, route in zip(traffic.calls, traffic.prompts, traffic.routes, strict=True):
            self.loop.at(call.at_s, lambda c=call, p=prompt, r=route: self._begin(c, p, r))

    def _begin(self, call: Call, prompt: tuple[int, ...], route: Route) -> None:
        request = m.EngineRequest(id=f"r{call.id}", prompt=prompt, output_tokens_max=call.output_tokens)
        decode = self._scene.places[route.decode].endpoint
        if route.prefill is None:
            self.engines.submit(decode.address, request, lambda heard: self._hear(call, heard))
            return
        figures = Figures(*[0.0] * 7, call.prompt_tokens, 0)
        prefill = self._scene.places[route.prefill].endpoint
        plan = Plan(
            request_id=RequestId(request.id),
            chosen=Candidate(decode, prefill, None, figures),
            why=Why.SPLIT_FASTER,
            dialect=DialectName.NIXLV2,
            prefill_deadline_s=3_600.0,
            transfer_deadline_s=3_600.0,
        )
        VirtualHandoff(
            self.loop, self.engines, plan, request, lambda reply: self._hear_reply(call, reply)
        ).begin()

    def _hear(self, call: Call, heard: Heard) -> None:
        match heard:
            case m.TokenOut():
                self.times.first_s.setdefault(call.id, self.loop.now_s)
            case m.RequestDone():
                self.times.ended_s[call.id] = self.loop.now_s
            case _:
                raise AssertionError(f"call {call.id}: {heard}")

    def _hear_reply(self, call: Call, reply: Reply) -> None:
        match reply:
            case Began():
                self.times.first_s[call.id] = self.loop.now_s
            case Ended(_, is_whole=True):
                self.times.ended_s[call.id] = self.loop.now_s
            case _:
                raise AssertionError(f"call {call.id}: {reply}")

    def run(self) -> Times:
        self.loop.run()
        return self.times


class Fixed:
    """A router that sends each call where it was told; nothing else matters to it."""

    name = "fixed"

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes

    def route(self, call: Call, now_s: float) -> Route:
        return self._routes[call.id]

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


@dataclass
class Listed:
    """A workload that is a list."""

    listed: list[Call]
    key_tokens: int

    def calls(self) -> Iterator[Call]:
        return iter(self.listed)

    def after(self, call: Call, ended_s: float) -> Call | None:
        return None

    @property
    def call_count(self) -> int:
        return len(self.listed)


def run_coarse(scene: Scene, traffic: Traffic) -> tuple[Times, Cluster]:
    anywhere = [[True] * len(scene.places)] * len(scene.places)
    surroundings = Surroundings(scene.places, traffic.key_tokens, anywhere)
    workload = Listed(traffic.calls, traffic.key_tokens)
    cluster = Cluster(scene, Fixed(traffic.routes), workload, surroundings)
    cluster.run()
    times = Times()
    for flight in cluster.flights:
        assert flight.fate is Fate.OK, f"call {flight.call.id}: {flight.fate}"
        assert flight.first_s is not None
        assert flight.ended_s is not None
        times.first_s[flight.call.id] = flight.first_s
        times.ended_s[flight.call.id] = flight.ended_s
    return times, cluster


def measures(traffic: Traffic, times: Times) -> dict[str, float]:
    """Mean, median and 99th percentile of the time to the first token and of the whole call."""
    found = {}
    for name, at in (("first", times.first_s), ("whole", times.ended_s)):
        took = [at[call.id] - call.at_s for call in traffic.calls]
        percentiles = quantiles(took, n=100, method="inclusive")
        found |= {f"{name} mean": fmean(took), f"{name} p50": percentiles[49], f"{name} p99": percentiles[98]}
    found["makespan"] = max(times.ended_s.values())
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_engine_models_agree(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Checking every account after every token would take a hundred times as long as the run itself.
    monkeypatch.setattr(EngineModel, "validate", lambda self: None)
    traffic, scene = make_traffic(case, seed), make_scene(case)
    fine = Fine(scene, traffic)
    expected = measures(traffic, fine.run())
    times, cluster = run_coarse(scene, traffic)
    found = measures(traffic, times)
    off = {name: found[name] / value - 1.0 for name, value in expected.items()}
    assert all(abs(share) <= case.share for share in off.values()), (off, expected)
    coarse = [host.engine for host in cluster.legs.hosts]
    if case.makes_preemptions:
        counts = [sum(model.counters.preemptions for model in fine.engines.models())]
        counts.append(sum(engine.preemption_count for engine in coarse))
        assert all(count > 10 for count in counts), counts
    steps = [sum(model.counters.steps for model in fine.engines.models())]
    steps.append(sum(engine.step_count for engine in coarse))
    assert all(abs(a / b - 1.0) < case.share for a, b in pairwise(steps)), steps
