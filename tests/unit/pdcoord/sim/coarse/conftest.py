"""Small fleets, lists of calls and a router that does as it is told."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import ServedHeader
from pdcoord.sim.coarse.agenda import Agenda, Do
from pdcoord.sim.coarse.cluster import Cluster
from pdcoord.sim.coarse.scene import Scene
from pdcoord.sim.routers.base import Hold, Place, Released, Route, Shed, Surroundings
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.workload.call import Call, CallId
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

MODEL = ModelName("coarse/model")
SPEED = SpeedFigures(
    prefill_base_s=0.004,
    prefill_s_per_token=0.0001,
    step_base_s=0.01,
    step_s_per_context_token=1e-6,
    step_s_per_sequence=0.001,
)


@pytest.fixture
def engine_settings() -> Callable[..., EngineSettings]:
    """Settings of a small engine with blocks of 16 tokens; what is given replaces its figures."""

    def make(**changes: Any) -> EngineSettings:
        settings = EngineSettings(
            name="engine",
            model=MODEL,
            speed=SPEED,
            layout=KvLayout(16),
            block_total=256,
            kv_bytes_per_token=1_000,
            link_bytes_per_s=1e6,
            step_tokens_max=512,
            running_max=8,
            context_tokens_max=2_048,
        )
        return replace(settings, **changes)

    return make


@pytest.fixture
def scene_of(engine_settings: Callable[..., EngineSettings]) -> Callable[..., Scene]:
    """A scene of engines of these roles; `engine` and `scene` change the defaults."""

    def make(*roles: Role, engine: dict[str, Any] | None = None, **scene: Any) -> Scene:
        places, settings = [], []
        for index, role in enumerate(roles):
            own = engine_settings(**{"role": role, "name": f"e{index}", **(engine or {})})
            pool = Pool(
                name=PoolName(f"p{index}"),
                model=MODEL,
                role=role,
                vendor="alpha",
                engine=EngineKind.VLLM,
                side=Side(Connector.PDCOORD, own.layout),
                speed=own.speed,
                kv_bytes_per_token=own.kv_bytes_per_token,
                link_bytes_per_s=own.link_bytes_per_s,
            )
            endpoint = Endpoint(EndpointId(f"p{index}/e{index}"), pool, HostPort(f"10.0.0.{index}:8000"))
            size = own.layout.block_tokens
            place = Place(index, endpoint, own.block_total * size, own.running_max, own.step_tokens_max, size)
            places.append(place)
            settings.append(own)
        return Scene(tuple(places), tuple(settings), **scene)

    return make


@pytest.fixture
def call_of() -> Callable[..., Call]:
    """A call; without keys unless they are given."""

    def make(number: int, prompt: int, output: int, at_s: float = 0.0, **more: Any) -> Call:
        return Call(CallId(number), at_s, prompt, output, **more)

    return make


@dataclass
class Told:
    """A router that sends each call where it is told, and notes what it hears.

    Attributes:
        routes: by call id; the last one is for calls that are not listed.
        again: for calls that failed.
    """

    routes: dict[int, Route | Shed | Hold]
    again: list[Route | Shed] = field(default_factory=list)
    heard: list[tuple[Any, ...]] = field(default_factory=list)
    held: list[tuple[Call, Route | Shed]] = field(default_factory=list)
    served: dict[int, ServedHeader | None] = field(default_factory=dict)
    wakes_s: float | None = None
    name: str = "told"

    def route(self, call: Call, now_s: float) -> Route | Shed | Hold:
        self.heard.append(("route", call.id, now_s))
        return self.routes.get(call.id, self.routes[max(self.routes)])

    def began(self, call: Call, route: Route, served: ServedHeader | None, now_s: float) -> None:
        self.served[call.id] = served
        self.heard.append(("began", call.id, now_s))

    def ended(self, call: Call, route: Route, output_tokens: int, now_s: float, *, is_ok: bool) -> None:
        self.heard.append(("ended", call.id, output_tokens, is_ok))

    def failed(self, call: Call, route: Route, now_s: float) -> Route | Shed:
        self.heard.append(("failed", call.id, now_s))
        return self.again.pop(0) if self.again else Shed("nobody-left")

    def sampled(self, index: int, sample: Sample | None, now_s: float) -> None:
        self.heard.append(("sampled", index, sample, now_s))

    def cached(self, index: int, stored: Sequence[int], removed: Sequence[int], now_s: float) -> None:
        self.heard.append(("cached", index, tuple(stored), tuple(removed)))

    def released(self, now_s: float) -> Released:
        if self.wakes_s is None or now_s < self.wakes_s:
            return Released()
        held, self.held = self.held, []
        return Released(held)

    def next_event_s(self) -> float | None:
        return self.wakes_s

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        return [each for each in self.heard if each[0] in kinds]


@dataclass
class Listed:
    """A workload that is a list, with the next call of some."""

    listed: list[Call]
    following: dict[int, Call] = field(default_factory=dict)
    key_tokens: int = 16

    def calls(self) -> Iterator[Call]:
        return iter(self.listed)

    def after(self, call: Call, ended_s: float) -> Call | None:
        following = self.following.get(call.id)
        return None if following is None else replace(following, at_s=ended_s + following.at_s)

    @property
    def call_count(self) -> int:
        return len(self.listed) + len(self.following)


@pytest.fixture
def told() -> type[Told]:
    return Told


@pytest.fixture
def listed() -> type[Listed]:
    return Listed


class CheckedAgenda(Agenda):
    """Asserts every account of its cluster before the next thing happens."""

    __slots__ = ("cluster",)

    def take(self) -> tuple[Do, Any]:
        self.cluster.validate()
        return super().take()


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    """A cluster whose accounts are checked after every event."""
    monkeypatch.setattr("pdcoord.sim.coarse.cluster.Agenda", CheckedAgenda)

    def make(scene: Scene, router: Told, workload: Listed) -> Cluster:
        anywhere = [[True] * len(scene.places)] * len(scene.places)
        cluster = Cluster(scene, router, workload, Surroundings(scene.places, workload.key_tokens, anywhere))
        cluster.agenda.cluster = cluster  # type: ignore[attr-defined]
        return cluster

    return make
