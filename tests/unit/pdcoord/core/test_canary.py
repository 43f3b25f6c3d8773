"""Canaries: when a pair of pools is tried, what shuts and opens it, and that nothing passes a shut gate."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdcoord.core import canary
from pdcoord.core.canary import CanaryBegan, CanaryJudged
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Dispatch,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    SidecarReported,
    Wait,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.likeness import CanaryOutcome, Finding
from pdcoord.core.model import CanaryMode, CanaryRules, Disaggregation, Fallback, Model, SplitMode
from pdcoord.core.plan import Candidate, DropReason, Why
from pdcoord.core.request import Request, RequestId
from pdcoord.core.trials import RETRY_S_MAX, RETRY_S_MIN, CanaryOrder, PairState
from pdcoord.protocol.control import Events
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
PASSED = Finding(CanaryOutcome.PASSED)
WRONG = Finding(CanaryOutcome.TOKENS, "tokens differ", 3)
UNTOLD = Finding(CanaryOutcome.INCONCLUSIVE, "no answer")
UNPROVEN = Finding(CanaryOutcome.UNPROVEN, "nobody says that it was split")
RULES = CanaryRules(interval_s=600.0)


def pool(name: str, role: Role, vendor: str, *, block_tokens: int = 16, **more: object) -> Pool:
    made = Pool(
        PoolName(name),
        M,
        role,
        vendor,
        EngineKind.VLLM,
        Side(Connector.PDCOORD, KvLayout(block_tokens)),
        SpeedFigures(0.01, 1e-4, 0.01),
        1_000,
        1e10,
    )
    return replace(made, **more)  # type: ignore[arg-type]


FAST = pool("fast", Role.PREFILL, "nvidia")
WIDE = pool("wide", Role.DECODE, "gaudi", block_tokens=128)
LIKE = pool("like", Role.DECODE, "nvidia")
ALWAYS = Disaggregation(mode=SplitMode.ALWAYS, bandwidth_bytes_per_s_min=0.0)


def model_of(*pools: Pool, rules: CanaryRules = RULES, **more: object) -> Model:
    made = Model(M, pools or (FAST, WIDE), disaggregation=ALWAYS, canary=rules)
    return replace(made, **more)  # type: ignore[arg-type]


Judge = Callable[[CanaryOrder], Finding]


@dataclass
class Site:
    """A coordinator whose canaries are carried out here, and the processes there are.

    Attributes:
        tried: what was tried by whom, with what it came to.
        lives: how often an endpoint was another process.
    """

    model: Model = field(default_factory=model_of)
    now_s: float = 100.0
    tried: list[tuple[CanaryOrder, Finding]] = field(default_factory=list)
    lives: dict[EndpointId, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator = Coordinator(replica="a", has_canaries=True)
        self._names = itertools.count()
        self.take(ModelsReplaced((self.model,)))

    def take(self, event: object) -> list[object]:
        actions: list[object] = list(self.coordinator.handle(event, self.now_s))  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions

    def start(self, of: Pool, *names: str) -> None:
        for name in names:
            endpoint_id = EndpointId(f"{of.name}/{name}")
            life = self.lives[endpoint_id] = self.lives.get(endpoint_id, 0) + 1
            self.take(EndpointSeen(Endpoint(endpoint_id, of, HostPort(f"{of.name}-{name}-{life}:80"))))
            self.sample(endpoint_id)

    def sample(self, endpoint_id: EndpointId, waiting: int = 0) -> None:
        self.take(SampleTaken(endpoint_id, Sample(0, waiting, 0.0, self.now_s)))

    def begin(self) -> list[CanaryOrder]:
        orders = self.coordinator.canaries.due(self.now_s)
        for order in orders:
            self.take(CanaryBegan(order))
        return orders

    def judge(self, order: CanaryOrder, finding: Finding) -> None:
        self.take(CanaryJudged(order, finding))
        self.tried.append((order, finding))

    def run(self, seconds: float, judge: Judge, step_s: float = 0.25) -> None:
        """Carry out what is due, each at once."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            for order in self.begin():
                self.judge(order, judge(order))
            self.now_s += step_s

    def ask(self) -> object:
        """One request; it ends as soon as it is dispatched."""
        name = RequestId(f"r{next(self._names)}")
        (action,) = self.take(RequestArrived(Request(name, M, 4_000, output_tokens_max=8)))
        if isinstance(action, Dispatch):
            self.take(ResponseBegan(name, None))
        if isinstance(action, Dispatch | Wait):
            self.take(RequestEnded(name, Outcome.OK))
        return action

    def chosen(self) -> Candidate:
        action = self.ask()
        assert isinstance(action, Dispatch)
        return action.plan.chosen

    def state(self, prefill: Pool = FAST, decode: Pool = WIDE) -> PairState:
        (view,) = [
            view
            for view in self.coordinator.canaries.views(self.now_s)
            if (view.prefill.name, view.decode.name) == (prefill.name, decode.name)
        ]
        return view.state


def right(_order: CanaryOrder) -> Finding:
    return PASSED


def wrong(_order: CanaryOrder) -> Finding:
    return WRONG


def site(*pools: Pool, count: int = 1, rules: CanaryRules = RULES, **more: object) -> Site:
    made = Site(model_of(*pools, rules=rules, **more))
    for each in made.model.pools:
        made.start(each, *(str(index) for index in range(count)))
    return made


def test_an_unlike_pair_is_shut_until_its_first_canary_passed() -> None:
    made = site()
    action = made.ask()
    assert isinstance(action, Dispatch)
    assert (action.plan.mode, action.plan.why) == (Mode.COLOCATED, Why.NO_OPEN_PATH)
    assert action.plan.drops == {DropReason.CANARY_UNTRIED: 1}
    (order,) = made.begin()
    assert (order.prefill.id, order.decode.id, order.reference.id) == ("fast/0", "wide/0", "wide/0")
    assert order.prompt_tokens_min == 320  # two and a half of the larger blocks
    assert made.chosen().mode is Mode.COLOCATED
    made.judge(order, PASSED)
    assert made.chosen().mode is Mode.SPLIT


def test_a_pair_behind_a_foreign_sidecar_is_open_and_said_to_be_unproven() -> None:
    made = site()
    made.run(2.0, lambda _order: UNPROVEN)
    assert made.chosen().mode is Mode.SPLIT
    (view,) = made.coordinator.paths_view(made.now_s)
    assert (view.state, view.fault) == ("closed", "")
    assert view.canary is not None
    assert (view.canary.state, view.canary.finding) == (PairState.UNPROVEN, UNPROVEN)
    made.run(RULES.interval_s * 1.5, wrong)
    assert made.chosen().mode is Mode.COLOCATED
    assert made.state() is PairState.FAILED


def _begin_response(made: Site) -> None:
    """A client's answer comes with our sidecar's word of how it was served."""
    (action,) = made.take(RequestArrived(Request(RequestId("own"), M, 4_000)))
    assert isinstance(action, Dispatch)
    made.take(ResponseBegan(RequestId("own"), ServedHeader(mode=Mode.COLOCATED)))


def _report(made: Site) -> None:
    made.take(SidecarReported(HostPort("wide-0-1:80"), "epoch", Events()))


def _pass(made: Site) -> None:
    made.run(1.0, right)


@pytest.mark.parametrize("speak", [_begin_response, _report, _pass])
def test_where_a_sidecar_of_ours_has_spoken_its_silence_proves_nothing(
    speak: Callable[[Site], None],
) -> None:
    made = site()
    (before,) = made.coordinator.canaries.due(made.now_s)
    assert not before.has_sidecar
    speak(made)
    made.now_s += RULES.interval_s * 1.5
    (after,) = made.coordinator.canaries.due(made.now_s)
    assert after.has_sidecar
    made.take(EndpointGone(EndpointId("wide/0")))
    made.start(WIDE, "0")
    (again,) = made.coordinator.canaries.due(made.now_s)
    assert not again.has_sidecar, "another process"


@pytest.mark.parametrize("judged", [WRONG, UNTOLD])
def test_what_does_not_pass_opens_nothing(judged: Finding) -> None:
    made = site()
    made.run(30.0, lambda _order: judged)
    assert len(made.tried) > 1
    assert made.chosen().mode is Mode.COLOCATED


def test_a_failed_pair_says_why_and_is_tried_again_ever_less_often() -> None:
    made = site()
    began_s: list[float] = []

    def failing(_order: CanaryOrder) -> Finding:
        began_s.append(made.now_s)
        return WRONG

    made.run(2_000.0, failing)
    pauses = [after - before for before, after in itertools.pairwise(began_s)]
    assert pauses[0] == pytest.approx(RETRY_S_MIN, abs=0.5)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(RETRY_S_MAX, abs=0.5)
    (view,) = made.coordinator.paths_view(made.now_s)
    assert (view.state, view.fault) == ("open", "canary-tokens")
    assert view.canary is not None
    assert view.canary.finding == WRONG
    made.run(RETRY_S_MAX + 1.0, right)
    assert made.chosen().mode is Mode.SPLIT
    (view,) = made.coordinator.paths_view(made.now_s)
    assert (view.state, view.fault) == ("closed", "")


def test_like_pools_need_no_canary_and_carry_what_the_others_may_not() -> None:
    made = site(FAST, WIDE, LIKE)
    assert [(v.prefill.name, v.decode.name) for v in made.coordinator.canaries.views(0.0)] == [
        ("fast", "wide")
    ]
    assert made.chosen().decode.id == "like/0"
    assert {view.canary is None for view in made.coordinator.paths_view(0.0)} == {True, False}


def test_vendors_alone_make_a_pair_unlike() -> None:
    made = site(FAST, replace(LIKE, vendor="amd"))
    assert made.state(FAST, LIKE) is PairState.UNTRIED


@pytest.mark.parametrize("mode", [CanaryMode.OBSERVE, CanaryMode.OFF])
def test_only_enforced_canaries_shut_anything(mode: CanaryMode) -> None:
    made = site(rules=replace(RULES, mode=mode))
    assert made.chosen().mode is Mode.SPLIT
    made.run(10.0, wrong)
    assert bool(made.tried) == (mode is CanaryMode.OBSERVE)
    assert made.chosen().mode is Mode.SPLIT


def test_a_coordinator_that_nobody_runs_canaries_for_has_no_gates() -> None:
    coordinator = Coordinator()
    coordinator.handle(ModelsReplaced((model_of(),)), 0.0)
    assert coordinator.canaries.views(0.0) == []


def test_waiting_for_the_first_canary_is_no_outage_and_a_failed_one_is() -> None:
    strict = Fallback(colocated_share_max=0.1, window=20)
    made = site(fallback=strict)
    plans = [made.ask() for _ in range(100)]
    assert all(isinstance(action, Dispatch) and not action.plan.is_outage for action in plans)
    made.run(2.0, wrong)
    plans = [made.ask() for _ in range(100)]
    # What the operator set as the bound of an outage holds for a pair that is known to be wrong.
    assert any(isinstance(action, Refuse) for action in plans)


def test_who_can_only_be_split_waits_for_the_first_canary_in_the_line() -> None:
    engine = {"engine": EngineKind.SGLANG, "side": Side(Connector.SGLANG, KvLayout(16))}
    prefill, decode = replace(FAST, **engine), replace(LIKE, vendor="amd", **engine)  # type: ignore[arg-type]
    alone = pool("alone", Role.BOTH, "amd", **engine)
    made = Site(model_of(prefill, decode, alone))
    made.start(prefill, "0")
    made.start(decode, "0")
    name = RequestId("split only")
    (action,) = made.take(RequestArrived(Request(name, M, 4_000, output_tokens_max=8)))
    assert isinstance(action, Wait)
    assert made.begin() == []  # Nobody is there to compare with.
    made.start(alone, "0")
    made.now_s += 1.0
    (order,) = made.begin()
    assert (order.reference.id, order.decode.id, order.dialect) == ("alone/0", "like/0", "sglang")
    made.take(EndpointGone(EndpointId("alone/0")))
    actions = made.take(CanaryJudged(order, PASSED))
    assert [type(each) for each in actions] in ([], [Dispatch])


def test_a_pair_that_nobody_can_judge_is_not_shut() -> None:
    engine = {"engine": EngineKind.SGLANG, "side": Side(Connector.SGLANG, KvLayout(16))}
    prefill, decode = replace(FAST, **engine), replace(LIKE, vendor="amd", **engine)  # type: ignore[arg-type]
    made = site(prefill, decode)
    assert made.state(FAST, LIKE) is PairState.UNJUDGED
    assert made.begin() == []
    assert made.chosen().mode is Mode.SPLIT


def test_all_endpoints_are_tried_in_turn_and_again_after_the_interval() -> None:
    made = site(count=5)
    made.run(20.0, right)
    tried = [{end.id for end in (order.prefill, order.decode)} for order, _ in made.tried]
    assert len(set().union(*tried)) == 10
    count = len(made.tried)
    assert count == 5  # each new pair of endpoints tells of both
    made.run(400.0, right)
    assert len(made.tried) == count
    made.run(600.0, right)
    assert count + 5 <= len(made.tried) <= count + 10


def test_replicas_repeat_at_different_times() -> None:
    phases = set()
    for replica in ("a", "b", "c"):
        made = Coordinator(replica=replica, has_canaries=True).canaries
        phases.add(made.phase(0))
    assert len(phases) == 3
    assert all(0.75 <= phase <= 1.25 for phase in phases)


def test_one_broken_host_is_shut_alone_and_opens_when_it_is_mended() -> None:
    made = site(count=4)
    made.run(20.0, right)
    bad = "fast/2"
    made.run(2_000.0, lambda order: WRONG if order.prefill.id == bad else PASSED)
    assert made.state() is PairState.PASSED
    shut = {view.prefill.id for view in made.coordinator.paths_view(made.now_s) if view.fault}
    assert shut == {bad}
    assert {made.chosen().prefill.id for _ in range(20)} == {"fast/0", "fast/1", "fast/3"}  # type: ignore[union-attr]
    made.run(600.0, right)
    assert not any(view.fault for view in made.coordinator.paths_view(made.now_s))


def test_a_broken_decode_host_takes_nothing_from_that_pool_and_serves_alone() -> None:
    made = site(count=3)
    made.run(20.0, right)
    made.run(2_000.0, lambda order: WRONG if order.decode.id == "wide/1" else PASSED)
    chosen = [made.chosen() for _ in range(20)]
    assert not any(each.decode.id == "wide/1" and each.prefill is not None for each in chosen)
    (view,) = made.coordinator.canaries.views(made.now_s)
    assert view.suspects == 1


def test_a_pair_that_goes_bad_as_a_whole_is_shut_after_three_in_a_row() -> None:
    made = site(count=4)
    made.run(20.0, right)
    count = len(made.tried)
    made.run(2_000.0, wrong)
    assert made.state() is PairState.FAILED
    assert [finding for _, finding in made.tried[count : count + 3]] == [WRONG] * 3
    assert made.chosen().mode is Mode.COLOCATED


def test_processes_that_all_went_away_take_their_proof_with_them() -> None:
    made = site(count=2)
    made.run(20.0, right)
    made.start(FAST, "0")  # another process at another address
    assert made.chosen().mode is Mode.SPLIT
    made.start(FAST, "1")
    assert made.state() is PairState.UNTRIED
    assert made.chosen().mode is Mode.COLOCATED
    made.run(2.0, right)
    assert made.chosen().mode is Mode.SPLIT


def test_a_new_endpoint_of_an_open_pair_is_tried_at_once() -> None:
    made = site(count=2)
    made.run(20.0, right)
    made.start(WIDE, "new")
    (order,) = made.begin()
    assert order.decode.id == "wide/new"


def test_what_answers_again_at_an_address_may_be_another_engine() -> None:
    made = site()
    made.run(2.0, right)
    decode = EndpointId("wide/0")
    for _ in range(2):
        made.take(SampleFailed(decode, "unreachable"))
    made.sample(decode)
    assert made.state() is PairState.UNTRIED


def test_a_new_layout_of_a_pool_is_another_pair_and_new_prices_are_not() -> None:
    made = site()
    made.run(2.0, right)
    dear = replace(WIDE, cost_per_hour=9.0)
    made.take(ModelsReplaced((model_of(FAST, dear),)))
    assert made.state() is PairState.PASSED
    made.take(ModelsReplaced((model_of(FAST, pool("wide", Role.DECODE, "gaudi", block_tokens=64)),)))
    assert made.state() is PairState.UNTRIED
    made.take(ModelsReplaced((model_of(FAST, LIKE),)))
    assert made.coordinator.canaries.views(0.0) == []


def test_the_result_of_a_process_that_is_gone_counts_for_nothing() -> None:
    made = site()
    (order,) = made.begin()
    made.start(WIDE, "0")
    made.judge(order, PASSED)
    assert made.state() is PairState.UNTRIED


def test_busy_endpoints_are_left_alone_but_for_the_first_canary() -> None:
    busy = replace(WIDE, limits=PoolLimits(in_flight_max=4))
    made = site(FAST, busy)
    made.sample(EndpointId("wide/0"), waiting=9)
    made.run(2.0, right)
    assert made.state() is PairState.PASSED
    count = len(made.tried)
    made.now_s += 10_000.0
    made.sample(EndpointId("wide/0"), waiting=1)
    made.run(5.0, right)
    assert len(made.tried) == count
    made.sample(EndpointId("wide/0"))
    made.run(10.0, right)
    assert len(made.tried) == count + 1


def test_an_order_that_nobody_ends_is_given_up() -> None:
    made = site()
    (lost,) = made.begin()
    assert made.begin() == []
    made.now_s += 2.0 * RULES.timeout_s + canary.LOST_S
    made.run(5.0, right)
    assert made.state() is PairState.PASSED
    made.judge(lost, WRONG)
    assert made.state() is PairState.PASSED


def test_no_more_than_a_few_run_at_a_time_and_repeats_are_spaced() -> None:
    prefills = [pool(f"fast{index}", Role.PREFILL, "nvidia") for index in range(6)]
    made = site(*prefills, WIDE, count=6)
    running = made.begin()
    assert len(running) == canary.CONCURRENT_MAX
    ends = [end.id for order in running for end in (order.prefill, order.decode)]
    assert len(set(ends)) == len(ends)
    for order in running:
        made.judge(order, PASSED)
    made.run(60.0, right)
    made.now_s += 10_000.0
    count, began_s = len(made.tried), made.now_s
    made.run(20.0, right)
    assert 0 < len(made.tried) - count <= (made.now_s - began_s) / canary.REPEAT_S + 1


@dataclass(frozen=True)
class _World:
    """What is really broken."""

    pair: bool
    hosts: frozenset[EndpointId]

    def finding(self, order: CanaryOrder) -> Finding:
        is_wrong = self.pair or {order.prefill.id, order.decode.id} & self.hosts
        return WRONG if is_wrong else PASSED


_HOSTS = [EndpointId(f"{name}/{index}") for name in ("fast", "wide") for index in range(3)]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.floats(0.1, 700.0)),
        st.tuples(st.just("begin"), st.just(0)),
        st.tuples(st.sampled_from(["judge", "untold"]), st.integers(0, 3)),
        st.tuples(st.sampled_from(["start", "stop", "fail", "break", "mend"]), st.sampled_from(_HOSTS)),
        st.tuples(st.sampled_from(["break pair", "mend pair", "ask", "reload"]), st.just(0)),
    ),
    max_size=60,
)


class _Random:
    """A site under random events, and what may be believed of it."""

    def __init__(self) -> None:
        self.site = Site()
        self.world = _World(pair=False, hosts=frozenset())
        self.running: list[CanaryOrder] = []
        self.proofs: dict[EndpointId, HostPort] = {}

    def step(self, what: str, value: object) -> None:
        made = self.site
        match what:
            case "wait":
                made.now_s += float(value)  # type: ignore[arg-type]
            case "begin":
                self.running += made.begin()
            case "judge" | "untold" if self.running:
                order = self.running.pop(int(value) % len(self.running))  # type: ignore[call-overload]
                made.judge(order, UNTOLD if what == "untold" else self.world.finding(order))
            case "start":
                name, _, index = str(value).partition("/")
                made.start(FAST if name == "fast" else WIDE, index)
            case "stop":
                made.take(EndpointGone(EndpointId(str(value))))
            case "fail":
                made.take(SampleFailed(EndpointId(str(value)), "timeout"))
            case "break" | "mend":
                host = frozenset({EndpointId(str(value))})
                hosts = self.world.hosts | host if what == "break" else self.world.hosts - host
                self.world = replace(self.world, hosts=hosts)
            case "break pair" | "mend pair":
                self.world = replace(self.world, pair=what == "break pair")
            case "reload":
                made.take(ModelsReplaced((made.model,)))
            case "ask":
                self.ask()

    def ask(self) -> None:
        """Nothing goes over the pair unless processes that are there now passed, and not all failed since."""
        action = self.site.ask()
        if isinstance(action, Refuse):
            assert action.refusal.reason in {RefuseReason.NO_ENDPOINTS, RefuseReason.SATURATED}
        if not isinstance(action, Dispatch) or action.plan.prefill is None:
            return
        passes = [order for order, finding in self.site.tried if finding is PASSED]
        fleet = self.site.coordinator.fleet
        for side in ("prefill", "decode"):
            ends: Iterable[Endpoint] = (getattr(order, side) for order in passes)
            states = ((end, fleet.get(end.id)) for end in ends)
            is_there = [s is not None and s.endpoint.address == end.address for end, s in states]
            assert any(is_there), f"split, and no {side} that passed is there"
        told = [finding for _, finding in self.site.tried if finding is not UNTOLD]
        assert told[-3:] != [WRONG] * 3, "split after three failures in a row"
        chosen = {action.plan.prefill.id, action.plan.decode.id}
        view = self.site.coordinator.canaries.view(action.plan.prefill, action.plan.decode, self.site.now_s)
        assert view is not None
        assert not view.fault, f"{chosen}: split over a path that its canary shuts"


@settings(max_examples=120, deadline=None)
@given(_STEPS)
def test_no_request_passes_a_gate_and_every_pair_opens_in_the_end(steps: list[tuple[str, object]]) -> None:
    made = _Random()
    for what, value in steps:
        made.step(what, value)
    for order in made.running:
        made.site.judge(order, made.world.finding(order))
    for host in _HOSTS:
        made.step("start", host)
    made.site.run(700.0, right, step_s=1.0)
    assert made.site.state() is PairState.PASSED
    lasting = [view.fault for view in made.site.coordinator.paths_view(made.site.now_s)]
    assert lasting == [""] * 9
    late = [order for order, _ in made.site.tried]
    assert {end.id for order in late for end in (order.prefill, order.decode)} >= set(_HOSTS)
    made.ask()


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(_HOSTS), max_size=2), st.booleans())
def test_what_is_wrong_is_shut_in_the_end(hosts: set[EndpointId], is_pair: bool) -> None:
    made = site(count=3)
    made.run(20.0, right)
    world = _World(is_pair, frozenset(hosts))
    made.run(3_000.0, world.finding, step_s=1.0)
    for view in made.coordinator.paths_view(made.now_s):
        is_wrong = is_pair or {view.prefill.id, view.decode.id} & hosts
        assert bool(view.fault) or not is_wrong, f"{view.prefill.id} {view.decode.id}"
