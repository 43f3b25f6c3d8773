"""Small fleets as routers see them, and calls to send there."""

from collections.abc import Callable, Sequence

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role, Sample
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.routers.base import Place, Route, Surroundings
from pdcoord.sim.routers.rival import Rival
from pdcoord.sim.routers.rotation import Rotation
from pdcoord.sim.workload.call import Call, CallId
from transfer.verdict import Connector, Side

KEY_TOKENS = 64

MakeSurroundings = Callable[..., Surroundings]
MakeCall = Callable[..., Call]


def pool_of(role: Role, vendor: str, engine: EngineKind, speed: float) -> Pool:
    """A prefill takes 10 ms and 1 ms a token, a step 10 ms, 1 µs a token of context and 1 ms a sequence."""
    return Pool(
        name=PoolName(f"{vendor}-{role}"),
        model=ModelName("m"),
        role=role,
        vendor=vendor,
        engine=engine,
        side=Side(Connector.PDCOORD, None),
        speed=SpeedFigures(
            prefill_base_s=0.010 / speed,
            prefill_s_per_token=0.001 / speed,
            step_base_s=0.010 / speed,
            step_s_per_context_token=1e-6 / speed,
            step_s_per_sequence=0.001 / speed,
        ),
        kv_bytes_per_token=131_072,
        link_bytes_per_s=12.5e9,
    )


@pytest.fixture
def surroundings_of() -> MakeSurroundings:
    """Of roles: a place each; pairs of one vendor may hand over, and others if `is_open`."""

    def make(
        roles: Sequence[Role],
        *,
        vendors: Sequence[str] | None = None,
        speeds: Sequence[float] | None = None,
        engine: EngineKind = EngineKind.VLLM,
        kv_tokens: int = 64_000,
        block_tokens: int = 16,
        key_tokens: int = KEY_TOKENS,
        is_open: bool = False,
        seed: int = 0,
    ) -> Surroundings:
        vendors = vendors or ["a"] * len(roles)
        speeds = speeds or [1.0] * len(roles)
        places = [
            Place(
                index=index,
                endpoint=Endpoint(
                    EndpointId(f"e{index}"),
                    pool_of(role, vendors[index], engine, speeds[index]),
                    HostPort(f"10.0.0.1:{8000 + index}"),
                ),
                kv_tokens=kv_tokens,
                running_max=256,
                step_tokens_max=8_192,
                block_tokens=block_tokens,
            )
            for index, role in enumerate(roles)
        ]
        may = [[is_open or one == other for other in vendors] for one in vendors]
        return Surroundings(places, key_tokens, may, seed)

    return make


@pytest.fixture
def call_of() -> MakeCall:
    """Of whole blocks and some tokens behind them; calls of one `prefix` begin alike."""
    made = 0

    def make(
        block_count: int = 4, *, prefix: int = 0, fresh: int = 0, tail_tokens: int = 0, priority: int = 0
    ) -> Call:
        """`fresh` of the blocks are this call's own."""
        nonlocal made
        made += 1
        shared = [prefix * 100_000 + at for at in range(block_count - fresh)]
        own = [10_000_000_000 + made * 100_000 + at for at in range(fresh)]
        return Call(
            id=CallId(made),
            at_s=0.0,
            prompt_tokens=block_count * KEY_TOKENS + tail_tokens,
            output_tokens=100,
            keys=(*shared, *own),
            priority=priority,
        )

    return make


@pytest.fixture
def sample_of() -> Callable[..., Sample]:
    def make(waiting: int = 0, kv_usage: float = 0.0, running: int = 0, at_s: float = 0.0) -> Sample:
        return Sample(running=running, waiting=waiting, kv_usage=kv_usage, at_s=at_s)

    return make


@pytest.fixture
def send_to() -> Callable[..., None]:
    """Sends a call to chosen places alone, by taking the others out of rotation for that moment."""

    def send(router: Rival, call: Call, places: Sequence[int], *, is_open: bool = False) -> None:
        before = list(router.samples)
        for place in router.places:
            if place.index not in places:
                # Not `sampled(None)`: a place that goes is forgotten.
                router._is_live[place.index] = False
        router._rotation = Rotation.of(router.surroundings, router._is_live)
        route = router.route(call, 0.0)
        assert isinstance(route, Route)
        if not is_open:
            router.ended(call, route, 0, 0.0, is_ok=False)
        for place in router.places:
            router._is_live[place.index] = True
        router._rotation = Rotation.of(router.surroundings, router._is_live)
        router.samples = before

    return send
