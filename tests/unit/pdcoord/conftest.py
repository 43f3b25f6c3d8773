"""A model of two pools and plans for it, for whatever takes calls."""

from collections.abc import Callable

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import Model
from pdcoord.core.plan import Candidate, Figures, Plan, Rung, Why
from pdcoord.core.request import RequestId
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, RungKind
from transfer.verdict import Connector, Side, Verdict, VerdictKind

FIGURES = Figures(
    queue_s=0.001,
    prefill_s=0.1,
    transfer_s=0.01,
    step_s=0.008,
    stall_s=0.0,
    slo_excess=0.0,
    cost=0.5,
    uncached_tokens=1_000,
    cached_tokens=0,
    transfer_bytes=1_000_000,
)


def make_pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=ModelName("org/model"),
        role=role,
        vendor="vendor",
        engine=EngineKind.VLLM,
        side=Side(Connector.NIXL, None),
        speed=SpeedFigures(0.008, 0.0001, 0.008),
        kv_bytes_per_token=1_024,
        link_bytes_per_s=1e10,
    )


PREFILL, DECODE = make_pool("p", Role.PREFILL), make_pool("d", Role.DECODE)
MODEL = Model(name=ModelName("org/model"), pools=(PREFILL, DECODE), aliases=("alias",))


def endpoint(pool: Pool, name: str, address: str) -> Endpoint:
    return Endpoint(EndpointId(f"{pool.name}/{name}"), pool, HostPort(address))


def make_plan(
    request_id: str, *, decode: str = "10.0.0.2:8000", is_split: bool = False, attempt: int = 0
) -> Plan:
    other = endpoint(PREFILL, "p1", "10.0.0.3:8000")
    return Plan(
        request_id=RequestId(request_id),
        chosen=Candidate(
            decode=endpoint(DECODE, decode.split(":", maxsplit=1)[0], decode),
            prefill=endpoint(PREFILL, "p0", "10.0.0.1:8000") if is_split else None,
            verdict=Verdict(VerdictKind.NATIVE, "layouts are equal") if is_split else None,
            figures=FIGURES,
        ),
        why=Why.SPLIT_FASTER if is_split else Why.COLOCATED_FASTER,
        dialect=DialectName.NIXLV2,
        rungs=(Rung(RungKind.OTHER_PREFILL, other), Rung(RungKind.COLOCATED)) if is_split else (),
        attempt=attempt,
    )


@pytest.fixture
def plan() -> Callable[..., Plan]:
    return make_plan


@pytest.fixture
def model() -> Model:
    return MODEL
