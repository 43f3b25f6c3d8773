"""The fleet: what each signal does to what is known of an endpoint."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import (
    SAMPLE_FAILURES_MAX,
    Endpoint,
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    Health,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.protocol.headers import HostPort
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M, N = ModelName("m"), ModelName("n")


def pool(name: str = "p", model: ModelName = M, role: Role = Role.BOTH) -> Pool:
    side = Side(Connector.PDCOORD, KvLayout(16))
    speed = SpeedFigures(0.01, 1e-4, 0.01)
    return Pool(PoolName(name), model, role, "v", EngineKind.VLLM, side, speed, 1, 1e9)


def endpoint(name: str = "e", of: Pool | None = None, address: str = "h:1") -> Endpoint:
    return Endpoint(EndpointId(name), of if of is not None else pool(), HostPort(address))


E = EndpointId("e")
GOOD = SampleTaken(E, Sample(3, 1, 0.25, 7.0))
BAD = SampleFailed(E, "connection refused")


def health(fleet: Fleet) -> str:
    state = fleet.get(E)
    assert state is not None
    return str(state.health)


def test_an_endpoints_life() -> None:
    fleet = Fleet()
    fleet.handle(EndpointSeen(endpoint()))
    assert health(fleet) == "unknown"
    fleet.handle(GOOD)
    assert health(fleet) == "ready"
    for _ in range(SAMPLE_FAILURES_MAX - 1):
        fleet.handle(BAD)
        assert health(fleet) == "ready"
    fleet.handle(BAD)
    assert health(fleet) == "unreachable"
    fleet.handle(GOOD)
    assert health(fleet) == "ready"
    fleet.handle(EndpointDraining(E))
    assert health(fleet) == "draining"
    for signal in (GOOD, BAD, BAD, BAD):
        fleet.handle(signal)
        assert health(fleet) == "draining"
    fleet.handle(EndpointGone(E))
    assert fleet.get(E) is None
    assert list(fleet.states()) == []


def test_a_good_sample_between_failures_starts_the_count_again() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD, BAD, GOOD, BAD):
        fleet.handle(signal)
    assert health(fleet) == "ready"


def test_one_that_never_answered_is_unreachable_at_once() -> None:
    fleet = Fleet()
    fleet.handle(EndpointSeen(endpoint()))
    fleet.handle(BAD)
    assert health(fleet) == "unreachable"


def test_what_is_unreachable_has_no_sample() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD):
        fleet.handle(signal)
    fleet.mark_unreachable(E)
    state = fleet.get(E)
    assert state is not None
    assert (state.health, state.sample) == (Health.UNREACHABLE, None)
    assert not state.is_eligible


def test_a_request_that_finds_nobody_does_not_undo_draining() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD, EndpointDraining(E)):
        fleet.handle(signal)
    fleet.mark_unreachable(E)
    assert health(fleet) == "draining"


def test_another_address_under_the_same_id_is_another_process() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD, EndpointSeen(endpoint(address="h:2"))):
        fleet.handle(signal)
    state = fleet.get(E)
    assert state is not None
    assert (state.health, state.sample, state.endpoint.address) == (Health.UNKNOWN, None, "h:2")


def test_seen_again_after_draining_it_must_answer_before_it_gets_work() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD, EndpointDraining(E), EndpointSeen(endpoint())):
        fleet.handle(signal)
    assert health(fleet) == "unknown"


def test_a_changed_pool_keeps_what_is_known_of_the_process() -> None:
    fleet = Fleet()
    changed = replace(pool(), cost_per_hour=9.0)
    for signal in (EndpointSeen(endpoint()), GOOD, EndpointSeen(endpoint(of=changed))):
        fleet.handle(signal)
    state = fleet.get(E)
    assert state is not None
    assert state.health is Health.READY
    assert state.endpoint.pool == changed
    assert [group.pool for group in fleet.groups(M)] == [changed]


def test_what_may_be_another_process_is_another_life() -> None:
    fleet, lives = Fleet(), []

    def take(*signals: EndpointSeen | EndpointGone | EndpointDraining | SampleTaken | SampleFailed) -> None:
        for signal in signals:
            fleet.handle(signal)
        fleet.validate()
        state = fleet.get(E)
        assert state is not None
        lives.append(state.life)

    seen = EndpointSeen(endpoint())
    take(seen)
    take(GOOD, BAD, GOOD, seen)
    assert lives[1] == lives[0]
    take(*[BAD] * SAMPLE_FAILURES_MAX, GOOD)
    take(EndpointDraining(E), seen)
    take(EndpointSeen(endpoint(address="h:2")))
    take(EndpointGone(E), seen)
    fleet.mark_unreachable(E)
    take(GOOD)
    assert len(set(lives[1:])) == len(lives) - 1


def test_seen_again_unchanged_nothing_changes() -> None:
    fleet = Fleet()
    for signal in (EndpointSeen(endpoint()), GOOD):
        fleet.handle(signal)
    before = fleet.get(E)
    fleet.handle(EndpointSeen(endpoint()))
    assert fleet.get(E) is before


def test_equal_pools_are_one_group_whoever_made_them() -> None:
    fleet = Fleet()
    fleet.handle(EndpointSeen(endpoint("e", pool())))
    fleet.handle(EndpointSeen(endpoint("f", pool(), "h:2")))
    fleet.handle(EndpointSeen(endpoint("g", pool("q"), "h:3")))
    assert [sorted(s.endpoint.id for s in group.states()) for group in fleet.groups(M)] == [["e", "f"], ["g"]]


def test_an_endpoint_may_move_to_another_model() -> None:
    fleet = Fleet()
    fleet.handle(EndpointSeen(endpoint()))
    fleet.handle(EndpointSeen(endpoint(of=pool(model=N))))
    assert list(fleet.of_model(M)) == []
    assert [state.endpoint.id for state in fleet.of_model(N)] == [E]


def test_ordinals_stay_small_as_endpoints_come_and_go() -> None:
    fleet = Fleet()
    for round_index in range(50):
        for slot in range(4):
            fleet.handle(
                EndpointSeen(endpoint(f"e{round_index}-{slot}", address=f"h{round_index}:{slot + 1}"))
            )
        assert {state.ordinal for state in fleet.states()} == {0, 1, 2, 3}
        for slot in range(4):
            fleet.handle(EndpointGone(EndpointId(f"e{round_index}-{slot}")))


@pytest.mark.parametrize("signal", [GOOD, BAD, EndpointGone(E), EndpointDraining(E)])
def test_signals_of_an_unknown_endpoint_change_nothing(signal: SampleTaken | SampleFailed) -> None:
    fleet = Fleet()
    fleet.handle(signal)
    fleet.mark_unreachable(E)
    fleet.validate()
    assert list(fleet.states()) == []


def test_validate_sees_a_group_that_was_tampered_with() -> None:
    fleet = Fleet()
    fleet.handle(EndpointSeen(endpoint()))
    group = fleet.groups(M)[0]
    group.by_health[Health.READY][E] = group.by_health[Health.UNKNOWN].pop(E)
    with pytest.raises(AssertionError, match="grouped as ready"):
        fleet.validate()


def test_endpoints_are_found_by_address_and_one_may_serve_several_models() -> None:
    fleet = Fleet()
    one, two = endpoint("a", pool("p", M), "x:1"), endpoint("b", pool("q", N), "x:1")
    for seen in (one, two):
        fleet.handle(EndpointSeen(seen))
    assert [state.endpoint.id for state in fleet.at(HostPort("x:1"))] == ["a", "b"]
    fleet.handle(EndpointSeen(replace(one, address=HostPort("y:1"))))
    assert [state.endpoint.id for state in fleet.at(HostPort("x:1"))] == ["b"]
    assert [state.endpoint.id for state in fleet.at(HostPort("y:1"))] == ["a"]
    fleet.handle(EndpointGone(EndpointId("b")))
    assert fleet.at(HostPort("x:1")) == []
    fleet.validate()


class FleetMachine(RuleBasedStateMachine):
    """Signals in any order; only what answered since it was last seen anew is ready."""

    ids = st.sampled_from([EndpointId(name) for name in "abcd"])
    pools = st.builds(
        pool, st.sampled_from(["p", "q"]), st.sampled_from([M, N]), st.sampled_from([Role.BOTH, Role.DECODE])
    )

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.listed: dict[EndpointId, Endpoint] = {}
        self.draining: set[EndpointId] = set()

    @rule(name=ids, of=pools, port=st.integers(1, 2))
    def see(self, name: EndpointId, of: Pool, port: int) -> None:
        self.listed[name] = endpoint(name, of, f"{name}:{port}")
        self.draining.discard(name)
        self.fleet.handle(EndpointSeen(self.listed[name]))

    @rule(name=ids)
    def go(self, name: EndpointId) -> None:
        self.listed.pop(name, None)
        self.draining.discard(name)
        self.fleet.handle(EndpointGone(name))

    @rule(name=ids)
    def drain(self, name: EndpointId) -> None:
        self.draining |= {name} & set(self.listed)
        self.fleet.handle(EndpointDraining(name))

    @rule(name=ids, running=st.integers(0, 3))
    def sample(self, name: EndpointId, running: int) -> None:
        self.fleet.handle(SampleTaken(name, Sample(running, 0, 0.0, 0.0)))
        state = self.fleet.get(name)
        assert state is None or state.is_eligible == (name not in self.draining)

    @rule(name=ids)
    def fail(self, name: EndpointId) -> None:
        self.fleet.handle(SampleFailed(name, "timeout"))

    @rule(name=ids)
    def find_nobody(self, name: EndpointId) -> None:
        self.fleet.mark_unreachable(name)
        state = self.fleet.get(name)
        assert state is None or not state.is_eligible

    @invariant()
    def it_lists_what_was_listed(self) -> None:
        self.fleet.validate()
        assert {state.endpoint.id: state.endpoint for state in self.fleet.states()} == self.listed
        assert {s.endpoint.id for s in self.fleet.states() if s.health is Health.DRAINING} == self.draining
        by_model = [s.endpoint.id for model in (M, N) for s in self.fleet.of_model(model)]
        assert sorted(by_model) == sorted(self.listed)


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=40, stateful_step_count=25)
