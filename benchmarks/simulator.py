"""Simulated requests a minute on one core: twenty places, prompts of 7,200 tokens, 6,000 of them shared."""

import argparse
import json
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role, Sample
from pdcoord.core.model import Model, Slo
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import ServedHeader
from pdcoord.sim.coarse.cluster import run
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.profiles import PROFILES
from pdcoord.sim.routers.base import Hold, Place, Released, Route, Router, Shed, Surroundings
from pdcoord.sim.routers.ours import OurRouter
from pdcoord.sim.routers.registry import RIVALS
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.workload.call import Call, CallId
from transfer.verdict import Connector, Side

TARGET_PER_MINUTE = 50_000
MODEL = ModelName("bench/llama-8b")
FLEET = (("nvidia-h100-8b", 8), ("amd-mi300x-8b", 6), ("intel-gaudi3-8b", 6))
OURS = "pdcoord"
REST = "engines, transfers, clock"
T = TypeVar("T")


@dataclass
class Bill:
    """CPU time by part."""

    parts_ns: Counter[str]

    def timed(self, part: str, do: Callable[..., T], *args: Any, **more: Any) -> T:
        begun = time.thread_time_ns()
        try:
            return do(*args, **more)
        finally:
            self.parts_ns[part] += time.thread_time_ns() - begun


@dataclass
class Traffic:
    """Questions behind one of many long prefixes."""

    bill: Bill
    call_count: int
    rate: float
    seed: int = 0
    key_tokens: int = 64
    group_count: int = 150
    shared_tokens: int = 6_000
    own_tokens: int = 1_200
    answer_tokens: int = 1_000

    def calls(self) -> Iterator[Call]:
        made = self._make()
        while (call := self.bill.timed("workload", next, made, None)) is not None:
            yield call

    def _make(self) -> Iterator[Call]:
        rng = random.Random(self.seed)
        prompt = self.shared_tokens + self.own_tokens
        shared, whole = self.shared_tokens // self.key_tokens, prompt // self.key_tokens
        at_s = 0.0
        for number in range(self.call_count):
            at_s += rng.expovariate(self.rate)
            front = range(base := rng.randrange(self.group_count) << 20, base + shared)
            rest = range(base := (number + 1) << 40, base + whole - shared)
            output = max(1, round(rng.gauss(self.answer_tokens, self.answer_tokens / 10)))
            yield Call(CallId(number), at_s, prompt, output, (*front, *rest))

    def after(self, call: Call, ended_s: float) -> Call | None:  # noqa: ARG002  # the port's
        return None


@dataclass
class Billed:
    """A router whose time is put on a bill."""

    router: Router
    bill: Bill

    @property
    def name(self) -> str:
        return self.router.name

    def route(self, call: Call, now_s: float) -> Route | Shed | Hold:
        return self.bill.timed("router: route", self.router.route, call, now_s)

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None:
        self.bill.timed("router: began, ended", self.router.began, call, route, served, now_s)

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None:
        told = self.router.ended
        self.bill.timed("router: began, ended", told, call, route, output_tokens, now_s, is_ok=is_ok)

    def failed(self, call: Call, route: Route, now_s: float) -> Route | Shed:
        return self.router.failed(call, route, now_s)

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None:
        self.bill.timed("router: samples", self.router.sampled, index, sample, now_s)

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:
        self.bill.timed("router: KV events", self.router.cached, index, stored, removed, now_s)

    def released(self, now_s: float) -> Released:
        return self.bill.timed("router: held calls", self.router.released, now_s)

    def next_event_s(self) -> float | None:
        return self.router.next_event_s()


def make_stage() -> tuple[Scene, Model]:
    places: list[Place] = []
    settings: list[EngineSettings] = []
    pools: list[Pool] = []
    for name, count in FLEET:
        profile = PROFILES[name]
        link = profile.link_gbit_per_s.value * 1e9 / 8
        pool = Pool(
            name=PoolName(name),
            model=MODEL,
            role=Role.BOTH,
            vendor=profile.vendor,
            engine=EngineKind.VLLM,
            side=Side(Connector.PDCOORD, profile.layout),
            speed=profile.speed,
            kv_bytes_per_token=profile.kv_bytes_per_token,
            link_bytes_per_s=link,
        )
        pools.append(pool)
        for number in range(count):
            endpoint = Endpoint(
                EndpointId(f"{name}/{number}"), pool, HostPort(f"10.0.{len(pools)}.{number}:8000")
            )
            engine = EngineSettings(
                name=endpoint.id,
                model=MODEL,
                speed=profile.speed,
                layout=profile.layout,
                block_total=profile.block_total,
                kv_bytes_per_token=profile.kv_bytes_per_token,
                link_bytes_per_s=link,
            )
            size = profile.layout.block_tokens
            places.append(
                Place(len(places), endpoint, engine.block_total * size, engine.running_max, 8_192, size)
            )
            settings.append(engine)
    model = Model(MODEL, tuple(pools), slo=Slo(2.0, 0.05))
    return Scene(tuple(places), tuple(settings)), model


def measure(name: str, call_count: int, rate: float) -> dict[str, Any]:
    """Run one router; CPU time is this process's, so that a busy machine does not count."""
    scene, model = make_stage()
    bill = Bill(Counter())
    traffic = Traffic(bill, call_count, rate)
    pairs = [[a.endpoint.pool is b.endpoint.pool and a is not b for b in scene.places] for a in scene.places]
    surroundings = Surroundings(scene.places, traffic.key_tokens, pairs)
    router: Router = OurRouter(model, surroundings) if name == OURS else RIVALS[name](surroundings)
    begun = time.thread_time_ns()
    results = run(scene, Billed(router, bill), traffic, surroundings=surroundings)
    whole = time.thread_time_ns() - begun
    bill.parts_ns[REST] = whole - bill.parts_ns.total()
    return {
        "router": name,
        "calls": call_count,
        "rate": rate,
        "per_minute": call_count / whole * 60e9,
        "parts_us": {part: taken / call_count / 1e3 for part, taken in bill.parts_ns.most_common()},
        "outcome": outcome(results),
    }


def outcome(results: Sequence[CallResult]) -> dict[str, float]:
    """That the run was a run: how many were answered, and how soon."""
    ttfts = sorted(each.ttft_s for each in results if each.ttft_s is not None)
    return {
        "ok_share": sum(each.fate is Fate.OK for each in results) / len(results),
        "ttft_p50_s": ttfts[len(ttfts) // 2],
        "simulated_s": max(each.ended_s or 0.0 for each in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator", description=__doc__)
    parser.add_argument("--calls", type=int, default=6_000, help="calls per run (default 6000)")
    parser.add_argument("--rate", type=float, default=30.0, help="calls per simulated second (default 30)")
    parser.add_argument("--routers", default=f"round-robin,{OURS}", help="by name, comma separated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    found = [measure(name, options.calls, options.rate) for name in options.routers.split(",")]
    for each in found:
        verdict = "meets" if each["per_minute"] >= TARGET_PER_MINUTE else "misses"
        print(
            f"{each['router']}: {each['per_minute']:,.0f} requests a minute, {verdict} {TARGET_PER_MINUTE:,}"
        )
        for part, taken_us in each["parts_us"].items():
            print(f"  {part:28s} {taken_us:8.1f} us a request")
        print("  " + ", ".join(f"{name} {value:.3f}" for name, value in each["outcome"].items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": platform.processor(), "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
