"""The fleet: every endpoint that can be addressed, its pool, and the last that was heard of it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

from pdcoord.core.costs import SpeedFigures
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Side

EndpointId = NewType("EndpointId", str)
PathKey = tuple[EndpointId, EndpointId]
"""Prefill endpoint, decode endpoint."""
PoolName = NewType("PoolName", str)
ModelName = NewType("ModelName", str)


class Role(StrEnum):
    """Which legs a pool takes."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class EngineKind(StrEnum):
    """The engine's wire habits."""

    VLLM = "vllm"
    SGLANG = "sglang"


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds on what one endpoint of a pool is given.

    Attributes:
        in_flight_max: requests on one endpoint at a time, both legs counted.
        context_tokens_max: prompt and output of one request together; None if the engine's own
            limit is to answer.
    """

    in_flight_max: int = 256
    context_tokens_max: int | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """Endpoints of one vendor, engine, layout and role, as a policy names them.

    Attributes:
        side: connector and layout, which decide the verdict with another pool.
        kv_bytes_per_token: bytes of KV that one prompt token adds to a transfer.
        link_bytes_per_s: what one endpoint's NIC carries.
        cost_per_hour: of one endpoint, in any one currency for the whole policy.
        priority_max: requests up to this priority come here first, others only in need; None for no
            such preference.
    """

    name: PoolName
    model: ModelName
    role: Role
    vendor: str
    engine: EngineKind
    side: Side
    speed: SpeedFigures
    kv_bytes_per_token: int
    link_bytes_per_s: float
    cost_per_hour: float = 0.0
    limits: PoolLimits = field(default_factory=PoolLimits)
    priority_max: int | None = None

    @property
    def can_prefill(self) -> bool:
        """Whether prefill legs may be sent here."""
        return self.role is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        return self.role is not Role.PREFILL

    @property
    def can_serve_alone(self) -> bool:
        """Whether a whole request can run here.

        An SGLang worker in decode mode answers 400 to a request without a bootstrap room
        (llm-d-router issue 3075), so only its `both` role serves alone.
        """
        if self.engine is EngineKind.SGLANG:
            return self.role is Role.BOTH
        return self.can_decode


class Health(StrEnum):
    """What is known of an endpoint's fitness; only ready ones get new work."""

    UNKNOWN = "unknown"
    READY = "ready"
    UNREACHABLE = "unreachable"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of an endpoint's own metrics.

    Attributes:
        running: requests in the engine's batch.
        waiting: requests queued in the engine.
        kv_usage: share of KV blocks in use, 0..1.
        kv_tokens: what the KV pool holds; 0 where the engine does not say.
        failed_pulls: pulls of KV that failed since the engine started; None where it does not count.
        arrived_pulls: pulls of KV that arrived since then; None likewise.
        pulled_tokens: prompt tokens whose KV came from elsewhere since then; None likewise.
        computed_tokens: prompt tokens that it computed itself since then; None likewise.
    """

    running: int
    waiting: int
    kv_usage: float
    at_s: float
    kv_tokens: int = 0
    failed_pulls: int | None = None
    arrived_pulls: int | None = None
    pulled_tokens: int | None = None
    computed_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One engine rank that can be addressed.

    Attributes:
        address: where requests go: the sidecar on a decode pod, the engine on a prefill pod.
        bootstrap_port: SGLang's rendezvous port, on prefill pods.
        kv_port: KV side channel of our connector, on prefill pods; None for the default.
        metrics_port: of the sidecar's metrics listener, which tells of its paths; None if nobody may ask it.
        kv_events_port: of the engine's ZMQ publisher of KV events, at the same host; None if it has none.
        kv_events_replay_port: of the socket that sends past ones again; None if it has none.
    """

    id: EndpointId
    pool: Pool
    address: HostPort
    bootstrap_port: int | None = None
    kv_port: int | None = None
    metrics_port: int | None = None
    kv_events_port: int | None = None
    kv_events_replay_port: int | None = None


@dataclass(frozen=True, slots=True)
class EndpointState:
    """An endpoint with its last signals.

    Attributes:
        ordinal: small number that is this endpoint's for its life; indexes bit masks.
        unreachable_count: failures in a row since the last good sample.
        sampled_s: when that sample was taken, kept where the sample itself is too old to go by; None if
            this process never gave one.
        life: another one where it may be another process by now; no two lives have one number.
        said_draining: it is unreachable because it said itself that it goes away, until it answers again.
    """

    endpoint: Endpoint
    ordinal: int
    health: Health = Health.UNKNOWN
    sample: Sample | None = None
    unreachable_count: int = 0
    sampled_s: float | None = None
    life: int = 0
    said_draining: bool = False

    @property
    def is_leaving(self) -> bool:
        """Discovery or the endpoint itself says that it goes away."""
        return self.said_draining or self.health is Health.DRAINING

    @property
    def is_eligible(self) -> bool:
        return self.health is Health.READY


Life = tuple[EndpointId, int]
"""An endpoint in one of its lives."""


# A closed vocabulary of what can be heard of an endpoint.


@dataclass(frozen=True, slots=True)
class EndpointSeen:
    """Discovery lists this endpoint; a changed one replaces the old under the same id."""

    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class EndpointGone:
    """Discovery no longer lists this endpoint."""

    id: EndpointId


@dataclass(frozen=True, slots=True)
class EndpointDraining:
    """No new work; what runs there may finish."""

    id: EndpointId


@dataclass(frozen=True, slots=True)
class SampleTaken:
    """The endpoint answered with its metrics."""

    id: EndpointId
    sample: Sample


@dataclass(frozen=True, slots=True)
class SampleFailed:
    """The endpoint did not answer, or said it is not ready.

    Attributes:
        why: for metrics and the log; SAID_DRAINING where the endpoint says that it goes away.
    """

    id: EndpointId
    why: str


SAID_DRAINING = "draining"


Signal = EndpointSeen | EndpointGone | EndpointDraining | SampleTaken | SampleFailed

SAMPLE_FAILURES_MAX = 2
"""Failed samples in a row after which a ready endpoint is unreachable: one may be a lost packet."""


@dataclass(frozen=True, slots=True, eq=False)
class PoolGroup:
    """The endpoints of one pool by health, so that a decision walks over the fit ones alone."""

    pool: Pool
    by_health: dict[Health, dict[EndpointId, EndpointState]]

    def states(self) -> Iterator[EndpointState]:
        for group in self.by_health.values():
            yield from group.values()


class Fleet:
    """All endpoints with their last signals; `handle` is the only way to change it."""

    def __init__(self) -> None:
        self._states: dict[EndpointId, EndpointState] = {}
        self._groups: dict[ModelName, list[PoolGroup]] = {}
        self._free_ordinals: list[int] = []
        self._ids: dict[HostPort, dict[EndpointId, None]] = {}
        self._life_count = 0

    def get(self, endpoint_id: EndpointId) -> EndpointState | None:
        return self._states.get(endpoint_id)

    def states(self) -> Iterator[EndpointState]:
        return iter(self._states.values())

    def at(self, address: HostPort) -> Sequence[EndpointState]:
        """The endpoints with this address: one of each model that is served there."""
        return [self._states[endpoint_id] for endpoint_id in self._ids.get(address, ())]

    def of_model(self, model: ModelName) -> Iterable[EndpointState]:
        for group in self.groups(model):
            yield from group.states()

    def groups(self, model: ModelName) -> Sequence[PoolGroup]:
        """The model's endpoints by pool; equal pools are one."""
        return self._groups.get(model, ())

    def handle(self, signal: Signal) -> None:
        match signal:
            case EndpointSeen(endpoint):
                self._see(endpoint)
            case EndpointGone(endpoint_id):
                self._drop(endpoint_id)
            case EndpointDraining(endpoint_id):
                self._change(endpoint_id, health=Health.DRAINING)
            case SampleTaken(endpoint_id, sample):
                state = self._states.get(endpoint_id)
                if state is not None:
                    health = Health.DRAINING if state.health is Health.DRAINING else Health.READY
                    if state.health is Health.UNREACHABLE:
                        state = replace(state, life=self._next_life())
                    sampled_s = sample.at_s
                    self._put(
                        replace(
                            state,
                            health=health,
                            sample=sample,
                            unreachable_count=0,
                            sampled_s=sampled_s,
                            said_draining=False,
                        )
                    )
            case SampleFailed(endpoint_id, why):
                self._count_failure(endpoint_id, said_draining=why == SAID_DRAINING)

    def mark_unreachable(self, endpoint_id: EndpointId, *, said_draining: bool = False) -> None:
        """A request found nobody there, or who goes away: no new work until a sample succeeds."""
        state = self._states.get(endpoint_id)
        if state is not None and state.health is not Health.DRAINING:
            said_draining = said_draining or state.said_draining
            self._put(replace(state, health=Health.UNREACHABLE, sample=None, said_draining=said_draining))

    def validate(self) -> None:
        """Assert that ordinals are unique and the grouping by model is complete."""
        ordinals = [state.ordinal for state in self._states.values()]
        assert len(set(ordinals)) == len(ordinals), "two endpoints share an ordinal"
        assert not set(ordinals) & set(self._free_ordinals), "an ordinal is both used and free"
        lives = {state.life for state in self._states.values()}
        assert len(lives) == len(self._states), "two endpoints share a life"
        groups = [group for groups in self._groups.values() for group in groups]
        assert all(any(group.states()) for group in groups), "a group without an endpoint"
        assert len({group.pool for group in groups}) == len(groups), "two groups of one pool"
        grouped: dict[EndpointId, EndpointState] = {}
        for group in groups:
            for health, states in group.by_health.items():
                for state in states.values():
                    assert state.health is health, f"{state.endpoint.id}: grouped as {health}"
                    assert state.endpoint.pool is group.pool, f"{state.endpoint.id}: grouped in another pool"
                grouped |= states
        assert grouped == self._states, "the grouping by pool disagrees with the fleet"
        listed = [(address, id_) for address, ids in self._ids.items() for id_ in ids]
        assert sorted(listed) == sorted((s.endpoint.address, id_) for id_, s in self._states.items())

    def _see(self, endpoint: Endpoint) -> None:
        known = self._states.get(endpoint.id)
        group = self._group(endpoint.pool)
        if group.pool is not endpoint.pool:
            endpoint = replace(endpoint, pool=group.pool)
        if known is None:
            ordinal = self._free_ordinals.pop() if self._free_ordinals else len(self._states)
            self._put(EndpointState(endpoint, ordinal, life=self._next_life()))
        elif known.endpoint.address != endpoint.address or known.health is Health.DRAINING:
            # Another process under the old name, or one that came back: nothing is known of it yet.
            self._put(EndpointState(endpoint, known.ordinal, life=self._next_life()))
        elif known.endpoint != endpoint:
            self._put(replace(known, endpoint=endpoint))

    def _next_life(self) -> int:
        self._life_count += 1
        return self._life_count

    def _drop(self, endpoint_id: EndpointId) -> None:
        state = self._states.get(endpoint_id)
        if state is not None:
            self._ungroup(state)
            self._unlist(state)
            del self._states[endpoint_id]
            self._free_ordinals.append(state.ordinal)

    def _count_failure(self, endpoint_id: EndpointId, *, said_draining: bool) -> None:
        state = self._states.get(endpoint_id)
        if state is None:
            return
        count = state.unreachable_count + 1
        is_down = said_draining or count >= SAMPLE_FAILURES_MAX or state.health is Health.UNKNOWN
        if said_draining:
            state = replace(state, said_draining=True)
        if state.health is Health.DRAINING or not is_down:
            self._put(replace(state, unreachable_count=count))
        else:
            self._put(replace(state, health=Health.UNREACHABLE, sample=None, unreachable_count=count))

    def _change(self, endpoint_id: EndpointId, *, health: Health) -> None:
        state = self._states.get(endpoint_id)
        if state is not None:
            self._put(replace(state, health=health))

    def _put(self, state: EndpointState) -> None:
        endpoint = state.endpoint
        before = self._states.get(endpoint.id)
        self._states[endpoint.id] = state
        group = self._group(endpoint.pool)
        group.by_health[state.health][endpoint.id] = state
        if before is not None and (
            before.health is not state.health or before.endpoint.pool is not endpoint.pool
        ):
            self._ungroup(before)
        if before is None or before.endpoint.address != endpoint.address:
            if before is not None:
                self._unlist(before)
            self._ids.setdefault(endpoint.address, {})[endpoint.id] = None

    def _unlist(self, state: EndpointState) -> None:
        ids = self._ids[state.endpoint.address]
        del ids[state.endpoint.id]
        if not ids:
            del self._ids[state.endpoint.address]

    def _group(self, pool: Pool) -> PoolGroup:
        groups = self._groups.setdefault(pool.model, [])
        for group in groups:
            if group.pool is pool:
                return group
        for group in groups:
            if group.pool == pool:
                return group
        group = PoolGroup(pool, {health: {} for health in Health})
        groups.append(group)
        return group

    def _ungroup(self, state: EndpointState) -> None:
        pool = state.endpoint.pool
        group = self._group(pool)
        del group.by_health[state.health][state.endpoint.id]
        if not any(group.by_health.values()):
            groups = self._groups[pool.model]
            groups.remove(group)
            if not groups:
                del self._groups[pool.model]
