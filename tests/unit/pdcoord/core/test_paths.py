"""The breaker and the probes of a path, as transcripts, and the verdicts of pools."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core import paths
from pdcoord.core.costs import PathFigures, SpeedFigures
from pdcoord.core.fleet import EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.paths import FAILURES_MAX, OPEN_S_MAX, OPEN_S_MIN, BreakerState, PathTable
from pdcoord.core.probes import STALE_INTERVALS, Probe, ProbeState
from pdcoord.core.request import RequestId
from pdcoord.protocol.errors import RungReason
from transfer.layout import KvDtype, KvLayout
from transfer.verdict import Connector, Side, VerdictKind

P, D = EndpointId("p"), EndpointId("d")
INTERVAL_S = 30.0
STALE_S = STALE_INTERVALS * INTERVAL_S
SEEDED = PathFigures(0.002, 1e10)
TIMEOUT, REFUSED = RungReason.TRANSFER_TIMEOUT, RungReason.PREFILL_UNREACHABLE
COUNTED = {
    RungReason.PREFILL_UNREACHABLE: FAILURES_MAX,
    RungReason.PREFILL_TIMEOUT: 1,
    RungReason.PREFILL_ERROR: 1,
    RungReason.PREFILL_NO_TICKET: 1,
    RungReason.TRANSFER_FAILED: 1,
    RungReason.TRANSFER_TIMEOUT: 1,
}


class Path:
    """One path of a table, spoken to in short."""

    def __init__(self) -> None:
        self.table = PathTable()
        self._names = itertools.count()

    def fail(self, reason: RungReason, now_s: float, request: str | None = None) -> None:
        name = RequestId(request if request is not None else f"request {next(self._names)}")
        self.table.fail((P, D), reason, name, now_s)

    def state(self, now_s: float) -> str:
        return str(self.table.state(P, D, now_s))

    def lets_pass(self, now_s: float) -> bool:
        return self.table.lets_pass(P, D, now_s)

    def begin(self, request: str) -> None:
        self.table.begin(P, D, RequestId(request))

    def trip(self, now_s: float) -> None:
        self.fail(REFUSED, now_s)

    def probed(self, at_s: float, failure: str = "", *, is_slow: bool = False, **more: object) -> None:
        probe = Probe(at_s, INTERVAL_S, failure, **more)  # type: ignore[arg-type]
        self.table.note_probe((P, D), probe, is_slow=is_slow, now_s=at_s)
        self.table.validate({P, D}, ())


def test_a_path_opens_after_failures_in_a_row_and_closes_after_a_good_probe() -> None:
    path = Path()
    for count in range(FAILURES_MAX - 1):
        path.fail(TIMEOUT, float(count))
        assert path.state(float(count)) == "closed"
        assert path.lets_pass(float(count))
    path.fail(TIMEOUT, 10.0)
    assert path.state(10.0) == "open"
    assert not path.lets_pass(10.0)

    assert path.state(10.0 + OPEN_S_MIN) == "half-open"
    assert path.lets_pass(10.0 + OPEN_S_MIN)
    path.begin("probe")
    assert path.state(11.5) == "half-open"
    assert not path.lets_pass(11.5)

    path.table.succeed(P, D)
    assert path.state(11.5) == "closed"
    assert path.lets_pass(11.5)
    assert path.table.breaker_count == 0


def test_a_success_between_failures_starts_the_count_again() -> None:
    path = Path()
    for _ in range(5):
        path.fail(TIMEOUT, 0.0)
        path.fail(TIMEOUT, 0.0)
        path.table.succeed(P, D)
    assert path.state(0.0) == "closed"


def test_each_failed_probe_doubles_the_wait_up_to_a_bound() -> None:
    path = Path()
    path.trip(0.0)
    now_s, waits = 0.0, []
    for probe in range(9):
        wait_s = next(s / 2 for s in range(1, 1_000) if path.lets_pass(now_s + s / 2))
        waits.append(wait_s)
        now_s += wait_s
        path.begin(f"probe {probe}")
        path.fail(TIMEOUT, now_s, f"probe {probe}")
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, OPEN_S_MAX, OPEN_S_MAX, OPEN_S_MAX]


def test_a_burst_sent_before_the_path_opened_counts_as_one_failure() -> None:
    path = Path()
    for _ in range(100):
        path.fail(TIMEOUT, 5.0)
    assert path.state(5.0 + OPEN_S_MIN) == "half-open"


def test_only_the_probe_itself_makes_room_for_the_next() -> None:
    path = Path()
    path.trip(0.0)
    path.begin("probe")
    path.table.abandon(P, D, RequestId("an older request"))
    path.fail(RungReason.PREFILL_OVERLOADED, 2.0, "another older request")
    path.fail(TIMEOUT, 2.0, "one more")
    assert not path.lets_pass(2.0)
    path.table.abandon(P, D, RequestId("probe"))
    assert path.lets_pass(2.0)


def test_an_overloaded_probe_tells_nothing_and_the_next_may_go() -> None:
    path = Path()
    path.trip(0.0)
    path.begin("probe")
    path.fail(RungReason.PREFILL_OVERLOADED, 2.0, "probe")
    assert path.state(2.0) == "half-open"
    assert path.lets_pass(2.0)


@pytest.mark.parametrize("reason", list(RungReason))
def test_what_counts_against_a_path(reason: RungReason) -> None:
    path = Path()
    weight = COUNTED.get(reason, 0)
    failures_needed = -(-FAILURES_MAX // weight) if weight else None
    for count in range(1, 10):
        path.fail(reason, 0.0)
        assert (path.state(0.0) == "open") == (failures_needed is not None and count >= failures_needed)
    assert (path.table.breaker_count == 1) == (weight > 0)


def test_paths_are_apart() -> None:
    table = PathTable()
    table.fail((P, D), REFUSED, RequestId("r"), 0.0)
    assert table.lets_pass(D, P, 0.0)
    assert table.lets_pass(P, EndpointId("d2"), 0.0)
    assert P in table.troubled
    assert D in table.troubled
    assert EndpointId("d2") not in table.troubled


def test_an_endpoint_that_is_gone_takes_its_paths_along() -> None:
    table = PathTable()
    others = [EndpointId(f"d{i}") for i in range(3)]
    for other in others:
        table.fail((P, other), REFUSED, RequestId("r"), 0.0)
        table.fail((EndpointId("q"), other), TIMEOUT, RequestId("r"), 0.0)
    table.forget(P)
    assert table.breaker_count == 3
    assert all(other not in table.troubled for other in others)
    table.validate({EndpointId("q"), *others}, ())


# Probes.


def test_a_failed_probe_shuts_the_path_until_a_good_one() -> None:
    path = Path()
    path.probed(0.0)
    assert (path.state(0.0), P in path.table.troubled) == ("closed", False)
    path.probed(1.0, "unreachable")
    assert (path.state(60.0), path.lets_pass(60.0)) == ("open", False)
    assert path.table.fault(P, D, 60.0) == "unreachable"
    assert P in path.table.troubled
    assert D in path.table.troubled
    path.probed(61.0)
    assert (path.state(61.0), path.lets_pass(61.0), path.table.fault(P, D, 61.0)) == ("closed", True, "")
    assert P not in path.table.troubled


def test_a_probe_that_finds_the_layouts_impossible_shuts_the_path() -> None:
    path = Path()
    path.probed(0.0, verdict="impossible")
    assert not path.lets_pass(0.0)
    assert path.table.fault(P, D, 0.0) == "impossible"


def test_a_probe_says_nothing_any_more_once_it_is_old() -> None:
    path = Path()
    path.probed(0.0, "unreachable")
    assert not path.lets_pass(STALE_S - 0.1)
    assert path.lets_pass(STALE_S)
    assert path.table.probe(P, D) is not None
    assert path.table.probe_states(STALE_S) == {ProbeState.STALE: 1}
    path.table.note_probe((P, EndpointId("e")), Probe(STALE_S, INTERVAL_S), is_slow=False, now_s=STALE_S)
    assert path.table.probe(P, D) is None
    assert P not in path.table.troubled


@pytest.mark.parametrize("failure", ["overloaded", "staging-full", "staging-timeout", "cancelled", "closed"])
def test_overload_shuts_no_path_and_opens_none(failure: str) -> None:
    path = Path()
    path.probed(0.0, failure)
    assert path.lets_pass(0.0)
    path.probed(1.0, "unreachable")
    path.probed(2.0, failure)
    assert not path.lets_pass(2.0)


def test_an_older_probe_does_not_replace_a_newer_one() -> None:
    path = Path()
    path.probed(5.0, "unreachable")
    path.table.note_probe((P, D), Probe(4.0, INTERVAL_S), is_slow=False, now_s=6.0)
    assert not path.lets_pass(6.0)


def test_a_good_probe_lets_one_request_try_a_tripped_path_and_no_more() -> None:
    path = Path()
    path.trip(0.0)
    path.probed(0.2)
    assert path.state(0.2) == "half-open"
    path.begin("tries")
    assert not path.lets_pass(0.3)
    path.fail(TIMEOUT, 0.4, "tries")
    assert path.state(0.4) == "open"
    assert path.state(0.4 + 2 * OPEN_S_MIN) == "half-open", "the wait was doubled, not begun anew"


def test_a_failed_probe_does_not_make_a_tripped_path_be_tried_sooner() -> None:
    path = Path()
    path.trip(0.0)
    probe = Probe(0.1, 0.2, "unreachable")
    path.table.note_probe((P, D), probe, is_slow=False, now_s=0.1)
    assert not probe.is_fresh(0.8)
    assert path.state(0.8) == "open"


def test_a_good_probe_from_before_the_failure_says_nothing_of_it() -> None:
    path = Path()
    path.trip(5.0)
    path.table.note_probe((P, D), Probe(4.9, INTERVAL_S), is_slow=False, now_s=5.1)
    assert path.state(5.1) == "open"


def test_figures_are_no_better_than_measured_lately() -> None:
    path = Path()
    assert path.table.figures(P, D, SEEDED, 0.0) == SEEDED
    path.probed(0.0, latency_s=0.5, bandwidth_bytes_per_s=1e9, is_slow=True)
    assert path.table.figures(P, D, SEEDED, 0.0) == PathFigures(0.5, 1e9)
    assert path.table.figures(D, P, SEEDED, 0.0) == SEEDED
    assert path.table.figures(P, D, SEEDED, STALE_S) == SEEDED
    assert D in path.table.troubled
    path.probed(1.0, latency_s=0.0, bandwidth_bytes_per_s=1e12)
    assert path.table.figures(P, D, SEEDED, 1.0) == SEEDED
    assert D not in path.table.troubled


def test_what_the_probes_say_is_counted() -> None:
    path = Path()
    table = path.table
    for decode, failure, is_slow in (("a", "", False), ("b", "", True), ("c", "peer-lost", False)):
        probe = Probe(0.0, INTERVAL_S, failure)
        table.note_probe((P, EndpointId(decode)), probe, is_slow=is_slow, now_s=0.0)
    assert table.probe_states(1.0) == {ProbeState.GOOD: 1, ProbeState.SLOW: 1, ProbeState.SHUT: 1}


def test_no_more_probes_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PROBES_MAX", 2)
    table = PathTable()
    for index in range(4):
        path = (P, EndpointId(f"d{index}"))
        table.note_probe(path, Probe(0.0, INTERVAL_S, "unreachable"), is_slow=False, now_s=0.0)
    assert table.probe_count == 2
    table.note_probe((P, EndpointId("d1")), Probe(1.0, INTERVAL_S), is_slow=False, now_s=1.0)
    assert table.lets_pass(P, EndpointId("d1"), 1.0)


def test_an_endpoint_that_is_gone_takes_its_probes_along() -> None:
    table = PathTable()
    table.note_probe((P, D), Probe(0.0, INTERVAL_S, "unreachable"), is_slow=True, now_s=0.0)
    table.forget(P)
    assert table.probe_count == 0
    assert D not in table.troubled
    table.validate({D}, ())


class PathMachine(RuleBasedStateMachine):
    """Anything may be heard of any path at any time."""

    endpoints = st.sampled_from([EndpointId(name) for name in "abc"])
    requests = st.sampled_from([RequestId(f"r{i}") for i in range(4)])

    def __init__(self) -> None:
        super().__init__()
        self.table = PathTable()
        self.now_s = 0.0

    @rule(one=endpoints, two=endpoints, request=requests)
    def begin(self, one: EndpointId, two: EndpointId, request: RequestId) -> None:
        if self.table.lets_pass(one, two, self.now_s):
            self.table.begin(one, two, request)

    @rule(one=endpoints, two=endpoints, request=requests, reason=st.sampled_from(RungReason))
    def fail(self, one: EndpointId, two: EndpointId, request: RequestId, reason: RungReason) -> None:
        if one != two:
            self.table.fail((one, two), reason, request, self.now_s)

    @rule(one=endpoints, two=endpoints)
    def succeed(self, one: EndpointId, two: EndpointId) -> None:
        self.table.succeed(one, two)
        is_shut = bool(self.table.fault(one, two, self.now_s))
        assert self.table.lets_pass(one, two, self.now_s) is not is_shut

    @rule(
        one=endpoints,
        two=endpoints,
        failure=st.sampled_from(["", "unreachable", "overloaded", "wrong-digest"]),
        age_s=st.floats(0.0, 30.0),
        interval_s=st.floats(1.0, 60.0),
        is_slow=st.booleans(),
    )
    def probe(
        self, one: EndpointId, two: EndpointId, failure: str, age_s: float, interval_s: float, is_slow: bool
    ) -> None:
        if one != two:
            probe = Probe(self.now_s - age_s, interval_s, failure)
            self.table.note_probe((one, two), probe, is_slow=is_slow, now_s=self.now_s)

    @rule(one=endpoints, two=endpoints, request=requests)
    def abandon(self, one: EndpointId, two: EndpointId, request: RequestId) -> None:
        self.table.abandon(one, two, request)

    @rule(one=endpoints)
    def forget(self, one: EndpointId) -> None:
        self.table.forget(one)
        assert one not in self.table.troubled

    @rule(seconds=st.floats(0.0, 90.0))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def states_and_accounts_agree(self) -> None:
        names = [EndpointId(name) for name in "abc"]
        self.table.validate(names, [RequestId(f"r{i}") for i in range(4)])
        assert self.table.breaker_count <= 6
        assert self.table.probe_count <= 6
        for pair in itertools.permutations(names, 2):
            state, lets_pass = self.table.state(*pair, self.now_s), self.table.lets_pass(*pair, self.now_s)
            assert lets_pass or state is not BreakerState.CLOSED
            assert not lets_pass or state is not BreakerState.OPEN
            if not lets_pass:
                assert all(name in self.table.troubled for name in pair)


TestPathMachine = PathMachine.TestCase
TestPathMachine.settings = settings(max_examples=40, stateful_step_count=25)


def pool(engine: EngineKind, layout: KvLayout | None, connector: Connector = Connector.PDCOORD) -> Pool:
    speed = SpeedFigures(0.01, 1e-4, 0.01)
    side = Side(connector, layout)
    return Pool(PoolName("p"), ModelName("m"), Role.BOTH, "v", engine, side, speed, 1, 1e9)


def test_a_verdict_is_that_of_the_layouts() -> None:
    table = PathTable()
    plain, converted = KvLayout(16), KvLayout(16, dtype=KvDtype.FLOAT16)
    vllm = EngineKind.VLLM
    assert table.verdict(pool(vllm, plain), pool(vllm, plain)).kind is VerdictKind.NATIVE
    assert table.verdict(pool(vllm, plain), pool(vllm, converted)).kind is VerdictKind.CONVERT
    assert table.verdict(pool(vllm, plain), pool(vllm, None)).kind is VerdictKind.IMPOSSIBLE


def test_engines_of_unlike_dialects_cannot_hand_over_whatever_their_layouts() -> None:
    found = PathTable().verdict(pool(EngineKind.VLLM, KvLayout(16)), pool(EngineKind.SGLANG, KvLayout(16)))
    assert not found.is_possible
    assert "vllm" in found.reason
    assert "sglang" in found.reason


def test_verdicts_are_of_the_layout_not_of_the_pools_name() -> None:
    table = PathTable()
    one = pool(EngineKind.VLLM, KvLayout(16), Connector.NIXL)
    assert table.verdict(one, one).is_possible
    table.forget_verdicts()
    assert table.verdict(one, one).is_possible
    assert not table.verdict(one, replace(one, side=Side(Connector.NIXL, KvLayout(32)))).is_possible
