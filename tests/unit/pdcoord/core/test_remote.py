"""Others' requests: counted exactly as own ones, whatever the order in which sidecars tell of them."""

from collections.abc import Iterable
from dataclasses import replace

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Dispatch,
    ModelsReplaced,
    Outcome,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    SidecarLost,
    SidecarReported,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.ledger import Load
from pdcoord.core.model import AdmissionRules, Disaggregation, Model, SplitMode
from pdcoord.core.paths import BreakerState
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.front.upstream import plan_header
from pdcoord.protocol.control import (
    ControlLegKind,
    Events,
    LegBegan,
    LegEnded,
    LoadEvent,
    OutputBegan,
    RequestBegan,
    Snapshot,
)
from pdcoord.protocol.control import (
    RequestEnded as ServingEnded,
)
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, PlannedLoad, RungKind, RungTaken, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")


def pool(role: Role) -> Pool:
    return Pool(
        name=PoolName(role),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01, step_s_per_sequence=1e-4),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


PREFILL, DECODE = pool(Role.PREFILL), pool(Role.DECODE)
MODEL = Model(
    M,
    (PREFILL, DECODE),
    admission=AdmissionRules(wait_s_max=0.0),
    disaggregation=Disaggregation(mode=SplitMode.ALWAYS),
)


def endpoint(of: Pool, index: int) -> Endpoint:
    return Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))


P0, P1, D0, D1 = (endpoint(of, index) for of in (PREFILL, DECODE) for index in (0, 1))
FLEET = (P0, P1, D0, D1)
LOAD = PlannedLoad(
    replica="b/1",
    model=M,
    prefill_us=300_000,
    prompt_tokens=4_000,
    landing_tokens=4_000,
    transfer_bytes=4_000_000,
)
SPLIT = RequestBegan(1, LOAD, P0.address)
LOCAL = RequestBegan(2, msgspec.structs.replace(LOAD, transfer_bytes=0))
SERVED = ServedHeader(mode=Mode.SPLIT, prefill=P0.address, prefill_ms=300.0, transfer_ms=20.0)


class Told:
    """A coordinator that sidecars tell of others' requests; validated after each event."""

    def __init__(self, endpoints: Iterable[Endpoint] = FLEET, replica: str = "a/1") -> None:
        self.now_s = 100.0
        self.coordinator = Coordinator(replica=replica)
        self.tell(ModelsReplaced((MODEL,)))
        for each in endpoints:
            self.see(each)

    def tell(self, event: object) -> list[object]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return list(actions)

    def see(self, each: Endpoint) -> None:
        self.tell(EndpointSeen(each))
        self.tell(SampleTaken(each.id, Sample(0, 0, 0.1, self.now_s)))

    def events(self, *events: LoadEvent, at: Endpoint = D0, epoch: str = "e") -> None:
        self.tell(SidecarReported(at.address, epoch, Events(events)))

    def snapshot(self, *requests: RequestBegan, at: Endpoint = D0, epoch: str = "e") -> None:
        self.tell(SidecarReported(at.address, epoch, Snapshot(requests)))

    def load(self, each: Endpoint) -> Load:
        return self.coordinator.ledger.load(each.id)

    def plan(self, name: str) -> Plan:
        request = Request(RequestId(name), M, prompt_tokens=4_000)
        (action,) = self.tell(RequestArrived(request))
        assert isinstance(action, Dispatch)
        return action.plan

    def counts(self) -> dict[EndpointId, tuple[int, ...]]:
        """What two coordinators of one mind agree on."""
        return {
            each.id: (
                load.request_count,
                load.decode_count,
                load.streaming_count,
                load.context_tokens,
                load.pending_tokens,
                load.prefill_us,
                load.bytes_in_flight,
                load.streaming_tokens,
            )
            for each in FLEET
            if (load := self.load(each)) is not None
        }


EMPTY = dict.fromkeys((each.id for each in FLEET), (0,) * 8)


def reported(plan: Plan, ordinal: int) -> RequestBegan:
    """What a sidecar makes of the header of a plan."""
    header = plan_header(plan)
    assert header.load is not None
    return RequestBegan(ordinal, header.load, header.prefills[0].address if header.prefills else None)


def test_a_request_of_another_coordinator_counts_as_its_own_does_there() -> None:
    own, other = Told(replica="a/1"), Told(replica="b/1")
    plan = own.plan("r")
    assert plan.replica == "a/1"
    at = plan.decode
    other.events(reported(plan, 1), at=at)
    assert other.counts() == own.counts() != EMPTY
    assert other.coordinator.ledger.open_count == 0
    assert other.coordinator.remote.count == 1
    assert plan.prefill is not None
    served = ServedHeader(mode=Mode.SPLIT, prefill=plan.prefill.address)
    own.tell(ResponseBegan(RequestId("r"), served))
    other.events(OutputBegan(1, served), at=at)
    assert other.counts() == own.counts() != EMPTY
    own.tell(RequestEnded(RequestId("r"), Outcome.OK))
    other.events(ServingEnded(1, "served"), at=at)
    assert other.counts() == own.counts() == EMPTY


def test_a_coordinator_without_a_control_stream_says_nothing_of_its_load() -> None:
    assert plan_header(Told(replica="").plan("r")).load is None


def test_a_snapshot_replaces_what_was_told_at_once() -> None:
    told = Told()
    told.events(SPLIT, LOCAL)
    told.snapshot(replace(LOCAL, age_s=1.0), RequestBegan(7, LOAD, P1.address, has_output=True, age_s=3.0))
    assert told.coordinator.remote.count == 2
    assert told.load(P0).is_empty
    assert told.load(P1).is_empty  # Its prefill is done.
    assert (told.load(D0).request_count, told.load(D0).streaming_count) == (2, 1)
    told.snapshot()
    assert told.counts() == EMPTY


def test_another_epoch_or_a_lost_sidecar_voids_what_was_told() -> None:
    told = Told()
    told.events(SPLIT, at=D0)
    told.events(SPLIT, at=D1)
    told.events(LOCAL, epoch="later")
    assert told.coordinator.remote.count == 2
    assert told.load(P0).request_count == 1
    told.tell(SidecarLost(D1.address))
    told.tell(SidecarLost(D1.address))
    told.tell(SidecarLost(D0.address))
    assert told.counts() == EMPTY


def test_what_is_told_before_its_endpoints_are_known_counts_when_they_are() -> None:
    told = Told(endpoints=())
    told.events(SPLIT)
    assert told.coordinator.remote.count == 1
    assert told.coordinator.ledger.remote_count == 0
    told.see(D0)
    assert told.load(D0).request_count == 1
    assert told.load(D0).prefill_us == 0  # It is not known whose work it is.
    told.see(P0)
    assert (told.load(P0).prefill_us, told.load(P0).request_count) == (300_000, 1)
    told.tell(EndpointGone(D0.id))
    told.events(ServingEnded(1, "served"))
    assert list(told.coordinator.ledger.accounts) == [P0.id]
    assert told.load(P0).is_empty


def test_a_foreign_request_counts_without_figures() -> None:
    told = Told()
    told.events(RequestBegan(1, PlannedLoad()))
    assert (told.load(D0).request_count, told.load(D0).context_tokens) == (1, 0)
    assert told.coordinator.ledger.typical_prefill_s == 0.0


def test_others_requests_are_not_counted_twice_where_samples_count_them_too() -> None:
    told = Told()
    told.events(SPLIT, LOCAL)
    sample = Sample(running=2, waiting=0, kv_usage=0.1, at_s=told.now_s)
    told.tell(SampleTaken(D0.id, sample))
    assert told.load(D0).others(sample) == 0


def test_what_others_legs_met_opens_and_closes_paths() -> None:
    told = Told()
    paths = told.coordinator.paths
    failed = LegEnded(1, 1, ControlLegKind.PREFILL, P0.address, RungReason.PREFILL_UNREACHABLE, 0.1)
    told.events(SPLIT, LegBegan(1, 1, ControlLegKind.PREFILL, P0.address), failed)
    assert paths.state(P0.id, D0.id, told.now_s) is BreakerState.OPEN
    rung = RungTaken(rung=RungKind.COLOCATED, reason=RungReason.PREFILL_UNREACHABLE, target=P0.address)
    told.events(OutputBegan(1, ServedHeader(mode=Mode.COLOCATED, rungs=(rung,))))
    told.now_s += 1.5
    assert paths.state(P0.id, D0.id, told.now_s) is BreakerState.HALF_OPEN
    told.events(replace(SPLIT, ordinal=5))
    assert not paths.lets_pass(P0.id, D0.id, told.now_s)  # It is being tried.
    told.events(OutputBegan(5, SERVED))
    assert paths.state(P0.id, D0.id, told.now_s) is BreakerState.CLOSED


def failed_over(plan: Plan, reason: RungReason) -> ServedHeader:
    """The prefill of a plan failed, and the decode endpoint served alone."""
    assert plan.prefill is not None
    rung = RungTaken(rung=RungKind.COLOCATED, reason=reason, target=plan.prefill.address)
    return ServedHeader(mode=Mode.COLOCATED, rungs=(rung,))


def opened_by(reason: RungReason, *, is_own: bool) -> list[BreakerState]:
    """The states of a path after each of three requests that failed over it."""
    told, states = Told((P0, D0)), []
    for index in range(3):
        plan = Told((P0, D0)).plan("elsewhere") if not is_own else told.plan(f"r{index}")
        served = failed_over(plan, reason)
        if is_own:
            told.tell(ResponseBegan(RequestId(f"r{index}"), served))
            told.tell(RequestEnded(RequestId(f"r{index}"), Outcome.OK))
        else:
            leg = LegEnded(index, 2, ControlLegKind.DECODE, P0.address, reason, 0.1)
            told.events(replace(SPLIT, ordinal=index), leg, OutputBegan(index, served))
        states.append(told.coordinator.paths.state(P0.id, D0.id, told.now_s))
    return states


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("reason", [RungReason.TRANSFER_FAILED, RungReason.TRANSFER_TIMEOUT])
def test_a_transfer_that_failed_speaks_of_its_path_once_whoever_planned_it(
    reason: RungReason, *, is_own: bool
) -> None:
    closed, open_ = BreakerState.CLOSED, BreakerState.OPEN
    assert opened_by(reason, is_own=is_own) == [closed, closed, open_]


@pytest.mark.parametrize("is_own", [True, False])
def test_a_target_that_a_sidecar_does_not_know_yet_is_no_failure_of_its_path(*, is_own: bool) -> None:
    states = opened_by(RungReason.TARGET_NOT_ALLOWED, is_own=is_own)
    assert states == [BreakerState.CLOSED] * 3


def test_a_request_that_ends_without_a_word_leaves_its_path_to_be_tried() -> None:
    told = Told()
    failed = LegEnded(1, 1, ControlLegKind.PREFILL, P0.address, RungReason.PREFILL_UNREACHABLE, 0.1)
    told.events(SPLIT, failed)
    told.now_s += 1.5
    told.events(replace(SPLIT, ordinal=2))
    told.events(ServingEnded(2, "client-left", ServedHeader(mode=Mode.SPLIT, prefill=None)))
    assert told.coordinator.paths.lets_pass(P0.id, D0.id, told.now_s)


def test_others_split_legs_are_held_against_the_engines_counters() -> None:
    told = Told()

    def sample(failed: int) -> None:
        counted = Sample(0, 0, 0.1, told.now_s, failed_pulls=failed, arrived_pulls=0)
        told.tell(SampleTaken(D0.id, counted))

    sample(0)
    for ordinal in range(1, 5):
        told.events(
            replace(SPLIT, ordinal=ordinal), OutputBegan(ordinal, SERVED), ServingEnded(ordinal, "served")
        )
    sample(4)
    assert told.coordinator.paths.state(P0.id, D0.id, told.now_s) is BreakerState.OPEN


def test_others_transfers_tell_how_fast_a_path_is() -> None:
    told = Told()
    slow = replace_transfer(SERVED, 4_000.0)
    for ordinal in range(1, 6):
        told.events(replace(SPLIT, ordinal=ordinal))
        told.now_s += 4.5
        told.tell(SampleTaken(D0.id, Sample(1, 0, 0.1, told.now_s)))
        told.events(OutputBegan(ordinal, slow), ServingEnded(ordinal, "served"))
    view = next(v for v in told.coordinator.paths_view(told.now_s) if (v.prefill, v.decode) == (P0, D0))
    assert view.bandwidth_bytes_per_s < PREFILL.link_bytes_per_s / 2.0


def replace_transfer(served: ServedHeader, transfer_ms: float) -> ServedHeader:
    return ServedHeader(
        mode=served.mode, prefill=served.prefill, prefill_ms=served.prefill_ms, transfer_ms=transfer_ms
    )


class Replicas(RuleBasedStateMachine):
    """Two coordinators and two sidecars: whatever happens, once all is told both count the same."""

    def __init__(self) -> None:
        super().__init__()
        self.replicas = [Told(replica="a/1"), Told(replica="b/1")]
        self.ordinal = 0
        self.live: dict[int, tuple[int, str, Plan, bool]] = {}
        self.unheard: list[list[tuple[HostPort, LoadEvent]]] = [[], []]

    def _note(self, at: HostPort, event: LoadEvent, planner: int) -> None:
        self.unheard[1 - planner].append((at, event))

    @rule(planner=st.integers(0, 1))
    def ask(self, planner: int) -> None:
        self.ordinal += 1
        plan = self.replicas[planner].plan(f"r{self.ordinal}")
        self.live[self.ordinal] = planner, f"r{self.ordinal}", plan, False
        self._note(plan.decode.address, reported(plan, self.ordinal), planner)

    @rule(data=st.data())
    def begin_output(self, data: st.DataObject) -> None:
        silent = [ordinal for ordinal, each in self.live.items() if not each[3]]
        if silent:
            ordinal = data.draw(st.sampled_from(silent))
            planner, name, plan, _ = self.live[ordinal]
            served = ServedHeader(mode=plan.mode, prefill=plan.prefill and plan.prefill.address)
            self.live[ordinal] = planner, name, plan, True
            self.replicas[planner].tell(ResponseBegan(RequestId(name), served))
            self._note(plan.decode.address, OutputBegan(ordinal, served), planner)

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.live:
            ordinal = data.draw(st.sampled_from(list(self.live)))
            planner, name, plan, _ = self.live.pop(ordinal)
            self.replicas[planner].tell(RequestEnded(RequestId(name), Outcome.OK))
            self._note(plan.decode.address, ServingEnded(ordinal, "served"), planner)

    @rule(hearer=st.integers(0, 1), count=st.integers(1, 4))
    def hear(self, hearer: int, count: int) -> None:
        heard, self.unheard[hearer] = self.unheard[hearer][:count], self.unheard[hearer][count:]
        for at, event in heard:
            self.replicas[hearer].tell(SidecarReported(at, "e", Events((event,))))

    @rule(hearer=st.integers(0, 1), at=st.sampled_from([D0, D1]))
    def overflow(self, hearer: int, at: Endpoint) -> None:
        """Events are dropped, and a snapshot comes in their place."""
        self.unheard[hearer] = [each for each in self.unheard[hearer] if each[0] != at.address]
        requests = tuple(
            replace(reported(plan, ordinal), has_output=has_output)
            for ordinal, (planner, _, plan, has_output) in sorted(self.live.items())
            if plan.decode.address == at.address and planner != hearer
        )
        self.replicas[hearer].tell(SidecarReported(at.address, "e", Snapshot(requests)))

    @rule(seconds=st.floats(0.0, 2.0))
    def tick(self, seconds: float) -> None:
        for each in self.replicas:
            each.now_s += seconds

    @rule(hearer=st.integers(0, 1), at=st.sampled_from(FLEET))
    def sample(self, hearer: int, at: Endpoint) -> None:
        told = self.replicas[hearer]
        told.tell(SampleTaken(at.id, Sample(0, 0, 0.1, told.now_s)))

    @invariant()
    def they_agree_once_all_is_heard(self) -> None:
        if not any(self.unheard):
            assert self.replicas[0].counts() == self.replicas[1].counts()
            if not self.live:
                assert self.replicas[0].counts() == EMPTY

    def teardown(self) -> None:
        for hearer in (0, 1):
            self.hear(hearer, len(self.unheard[hearer]) or 1)
        self.they_agree_once_all_is_heard()
        for each in self.replicas:
            for at in (D0, D1):
                each.tell(SidecarLost(at.address))
            assert each.coordinator.remote.count == each.coordinator.ledger.remote_count == 0


TestReplicas = Replicas.TestCase
TestReplicas.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
