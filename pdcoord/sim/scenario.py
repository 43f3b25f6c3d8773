"""What a simulation runs, drawn from one seed: a fleet, its traffic, and what goes wrong."""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from random import Random

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
)
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.protocol.headers import HostPort
from pdcoord.sim.settings import EngineSettings, LoadFailurePolicy
from transfer.layout import KvDtype, KvLayout, Order
from transfer.verdict import Connector, Side

MODEL = ModelName("sim/model")
MODEL_SEED = 11


class FaultKind(StrEnum):
    """What goes wrong, or is done on purpose.

    stall halts an engine's steps, slow makes them ten times as long, shut-down has it refuse what comes until
    it starts anew. sidecar kills a decode pod's sidecar, replica the gateway with all that it knows.
    """

    KILL = "kill"
    CUT = "cut"
    CUT_KV = "cut-kv"
    SLOW_LINK = "slow-link"
    DRAIN = "drain"
    POLICY = "policy"
    STALL = "stall"
    SLOW = "slow"
    SHUT_DOWN = "shut-down"
    SIDECAR = "sidecar"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens to the fleet.

    Attributes:
        ends_after_s: when it is made good; None for never.
    """

    at_s: float
    kind: FaultKind
    endpoint: EndpointId
    other: EndpointId | None = None
    ends_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One client.

    Attributes:
        leaves_after_s: when the client loses patience; None for never.
    """

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    choice_count: int
    leaves_after_s: float | None
    tenant: str = ""
    priority: int = 0
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that one seed stands for.

    Attributes:
        is_resumed_by_sidecar: sidecars go on with streams that their engines lost, as behind Envoy; else the
            gateway does.
    """

    seed: int
    model: Model
    endpoints: tuple[Endpoint, ...]
    settings: dict[EndpointId, EngineSettings]
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...]
    is_resumed_by_sidecar: bool = False


def draw(seed: int, *, request_count: int = 60, output_tokens_max: int = 23) -> Scenario:
    """A small fleet under trouble. Kinds of trouble are drawn too, so that runs differ in kind.

    Args:
        output_tokens_max: of one answer; of long ones more are struck in their middle.
    """
    rng = Random(seed)  # noqa: S311 - a scenario is to be drawn again from its seed
    engine = rng.choice([EngineKind.VLLM, EngineKind.VLLM, EngineKind.SGLANG])
    pools = _pools(rng, engine)
    model = Model(
        name=MODEL,
        pools=pools,
        disaggregation=Disaggregation(
            mode=rng.choice([SplitMode.AUTO, SplitMode.AUTO, SplitMode.ALWAYS]),
            uncached_tokens_min=rng.choice([0, 64, 256]),
            prefill_deadline_s=rng.choice([2.0, 10.0]),
            transfer_deadline_s=rng.choice([1.0, 5.0]),
        ),
        fallback=Fallback(
            other_prefill_max=rng.randrange(3),
            other_decode_max=rng.randrange(3),
            colocated_share_max=rng.choice([0.3, 1.0]),
        ),
        slo=Slo(ttft_s=rng.choice([None, 0.5]), tpot_s=rng.choice([None, 0.05])),
        prefix_block_tokens=32,
        prefix_blocks_per_endpoint_max=rng.choice([16, 4096]),
    )
    endpoints = tuple(
        Endpoint(
            EndpointId(f"{pool.name}/{index}"),
            pool,
            HostPort(f"10.0.{number}.{index}:8000"),
            8998 if engine is EngineKind.SGLANG and pool.role is Role.PREFILL else None,
        )
        for number, pool in enumerate(pools)
        for index in range(rng.randrange(1, 4))
    )
    settings = {endpoint.id: _settings(rng, endpoint) for endpoint in endpoints}
    arrivals = _arrivals(rng, request_count, output_tokens_max)
    faults = _faults(rng, endpoints, arrivals[-1].at_s, _FIRST)
    # Drawn last and apart, so that a seed stands for the same fleet, traffic and trouble as without.
    model, arrivals = _with_admission(Random(seed + 2), model, arrivals)  # noqa: S311 - as above
    more = _faults(Random(seed + 3), endpoints, arrivals[-1].at_s, _LATER)  # noqa: S311 - as above
    faults = tuple(sorted((*faults, *more), key=lambda fault: fault.at_s))
    is_resumed_by_sidecar = Random(seed + 4).random() < 0.3  # noqa: S311 - as above
    return Scenario(seed, model, endpoints, settings, arrivals, faults, is_resumed_by_sidecar)


def _with_admission(
    rng: Random, model: Model, arrivals: tuple[Arrival, ...]
) -> tuple[Model, tuple[Arrival, ...]]:
    """Rules of admission, and tenants, classes and objectives to try them; in half of all runs neither."""
    if rng.random() < 0.5:
        return model, arrivals
    rules = AdmissionRules(
        queue_s_max=rng.choice([0.0, 0.05, 0.5]),
        wait_s_max=rng.choice([0.0, 0.3, 5.0]),
        requests_max=rng.choice([2, 10, 1_000]),
        deadline_excess_max=rng.choice([0.0, 0.5]),
        low_share_min=rng.choice([0.0, 0.2]),
    )
    asked = tuple(
        replace(
            arrival,
            tenant=rng.choice(["", "flood", "flood", "flood", "small"]),
            priority=rng.choice([0, 0, 0, 10, -1]),
            slo=Slo(ttft_s=rng.choice([None, None, 0.1, 1.0])),
        )
        for arrival in arrivals
    )
    return replace(model, admission=rules), asked


def _pools(rng: Random, engine: EngineKind) -> tuple[Pool, ...]:
    """One or two prefill pools, one or two decode pools, some of layouts that do not fit."""
    pools = []
    roles = [Role.PREFILL, Role.DECODE, rng.choice([Role.PREFILL, Role.DECODE, Role.BOTH])]
    is_sglang = engine is EngineKind.SGLANG
    for number, role in enumerate(roles):
        connector = Connector.SGLANG if is_sglang else rng.choice([Connector.PDCOORD, Connector.NIXL])
        layout = KvLayout(
            rng.choice([16, 32]), rng.choice(list(Order)), rng.choice([KvDtype.BFLOAT16, KvDtype.FLOAT16])
        )
        if is_sglang or rng.random() < 0.6:
            connector, layout = (Connector.SGLANG if is_sglang else Connector.PDCOORD), KvLayout(16)
        pools.append(
            Pool(
                name=PoolName(f"{role}-{number}"),
                model=MODEL,
                role=role,
                vendor=rng.choice(["alpha", "beta", "gamma"]),
                engine=engine,
                side=Side(connector, layout),
                speed=SpeedFigures(
                    prefill_base_s=rng.uniform(0.002, 0.01),
                    prefill_s_per_token=rng.uniform(0.00005, 0.0005),
                    step_base_s=rng.uniform(0.005, 0.02),
                    step_s_per_sequence=rng.uniform(0.0, 0.0005),
                ),
                kv_bytes_per_token=131_072,
                link_bytes_per_s=rng.choice([1.25e9, 12.5e9]),
                cost_per_hour=rng.uniform(0.5, 4.0),
                limits=PoolLimits(in_flight_max=rng.choice([4, 64])),
            )
        )
    return tuple(pools)


def _settings(rng: Random, endpoint: Endpoint) -> EngineSettings:
    pool = endpoint.pool
    layout = pool.side.layout
    assert layout is not None, "every drawn pool has a layout"
    return EngineSettings(
        name=endpoint.id,
        model=pool.model,
        speed=pool.speed,
        layout=layout,
        block_total=4_096 // layout.block_tokens,
        kv_bytes_per_token=pool.kv_bytes_per_token,
        link_bytes_per_s=int(pool.link_bytes_per_s),
        engine=pool.engine,
        role=pool.role,
        connector=pool.side.connector,
        model_seed=MODEL_SEED,
        step_tokens_max=512,
        running_max=rng.choice([4, 64]),
        queued_max=rng.choice([2, 64]),
        context_tokens_max=2_048,
        lease_s=rng.choice([2.0, 10.0]),
        handshake_s=rng.choice([0.01, 0.5]),
        pull_s_max=5.0,
        load_failure_policy=rng.choice(list(LoadFailurePolicy)),
    )


def _arrivals(rng: Random, request_count: int, output_tokens_max: int) -> tuple[Arrival, ...]:
    shared = [tuple(rng.randrange(256) for _ in range(400)) for _ in range(3)]
    arrivals = []
    at_s = 0.5
    for _ in range(request_count):
        at_s += rng.expovariate(20.0)
        own = tuple(rng.randrange(256) for _ in range(rng.choice([3, 40, 300, 900])))
        prompt = rng.choice(shared) + own if rng.random() < 0.5 else own
        arrivals.append(
            Arrival(
                at_s=at_s,
                prompt=prompt,
                output_tokens=rng.randrange(1, output_tokens_max + 1),
                choice_count=2 if rng.random() < 0.05 else 1,
                leaves_after_s=rng.uniform(0.0, 1.0) if rng.random() < 0.15 else None,
            )
        )
    return tuple(arrivals)


_LATER = (FaultKind.STALL, FaultKind.SLOW, FaultKind.SHUT_DOWN, FaultKind.SIDECAR, FaultKind.REPLICA)
_FIRST = tuple(kind for kind in FaultKind if kind not in _LATER)


def _faults(
    rng: Random, endpoints: tuple[Endpoint, ...], end_s: float, choice: tuple[FaultKind, ...]
) -> tuple[Fault, ...]:
    kinds = rng.sample(choice, rng.randrange(len(choice) + 1))
    struck = [kind for kind in kinds for _ in range(rng.randrange(1, 4))]
    faults = [
        Fault(
            at_s=rng.uniform(0.3, end_s + 1.0),
            kind=kind,
            endpoint=rng.choice(endpoints).id,
            other=rng.choice(endpoints).id,
            ends_after_s=rng.choice([None, rng.uniform(0.1, 3.0)])
            if kind in _FIRST
            else rng.uniform(0.1, 15.0),
        )
        for kind in struck
    ]
    return tuple(sorted(faults, key=lambda fault: fault.at_s))
