"""The coordinator: a request's life as transcripts, and any interleaving of events by a state machine."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdcoord.core.alternatives import moved
from pdcoord.core.blocks import block_keys
from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import PathFigures, SpeedFigures
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    DecodeMoved,
    Dispatch,
    HedgeAsked,
    HedgeOver,
    ModelsReplaced,
    Outcome,
    PathProbed,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    StreamBroke,
    TimePassed,
    Wait,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Health,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleFailed,
    SampleTaken,
)
from pdcoord.core.hedging import id_of
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, LegOrder, Model, Slo, SplitMode
from pdcoord.core.paths import BreakerState
from pdcoord.core.plan import DropReason, Plan, Why
from pdcoord.core.probes import Probe
from pdcoord.core.request import Request, RequestId
from pdcoord.core.resumes import RESUMES_MAX
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import DialectName, Mode, RungKind, RungTaken, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side, verdict

M, N = ModelName("m"), ModelName("n")
FAST = SpeedFigures(0.01, 1e-4, 0.01, step_s_per_sequence=1e-4)
SLOW = SpeedFigures(0.01, 1e-3, 0.01, step_s_per_sequence=1e-4)


def pool(name: str, role: Role, side: Side | None = None, **changes: object) -> Pool:
    made = Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=side if side is not None else Side(Connector.PDCOORD, KvLayout(16)),
        speed=FAST if role is Role.PREFILL else SLOW,
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )
    return replace(made, **changes)


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)
# Nobody waits in these stories: who does, and for how long, is told in test_admission.py.
MODEL = Model(M, (P, D), aliases=("alias",), admission=AdmissionRules(wait_s_max=0.0))
KEYS = block_keys(b"a prompt " * 2_000, model="m", cache_salt="", block_bytes=256)


def endpoint(of: Pool, index: int, port: int = 80) -> Endpoint:
    return Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:{port}"))


class Story:
    """A coordinator told one thing after another; validated after each."""

    def __init__(self, model: Model = MODEL, prefills: int = 2, decodes: int = 2) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator()
        self.tell(ModelsReplaced((model,)))
        for of, count in ((P, prefills), (D, decodes)):
            for index in range(count):
                self.ready(endpoint(of, index))

    def tell(self, event: object) -> list[Dispatch | Refuse]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions

    def ready(self, seen: Endpoint, kv_usage: float = 0.1) -> None:
        self.tell(EndpointSeen(seen))
        self.tell(SampleTaken(seen.id, Sample(0, 0, kv_usage, self.now_s)))

    def ask(self, name: str = "r", tokens: int = 4_000, **changes: object) -> Plan | Refusal:
        request = replace(Request(RequestId(name), M, prompt_tokens=tokens, block_keys=KEYS), **changes)
        return self.only(self.tell(RequestArrived(request)), name)

    def plan(self, name: str = "r", tokens: int = 4_000, **changes: object) -> Plan:
        found = self.ask(name, tokens, **changes)
        assert isinstance(found, Plan), found
        return found

    def refusal(self, name: str = "r", tokens: int = 4_000, **changes: object) -> RefuseReason:
        found = self.ask(name, tokens, **changes)
        assert isinstance(found, Refusal), found
        return found.reason

    def fail(
        self,
        name: str = "r",
        reason: RungReason = RungReason.DECODE_ERROR,
        served: ServedHeader | None = None,
    ) -> Plan | Refusal:
        return self.only(self.tell(DecodeFailed(RequestId(name), reason, served)), name)

    def probed(self, prefill: str, decode: str, **more: object) -> None:
        probe = Probe(self.now_s, 30.0, **more)  # type: ignore[arg-type]
        assert self.tell(PathProbed(HostPort(prefill), EndpointId(decode), probe)) == []

    def begin(self, name: str = "r", served: ServedHeader | None = None) -> None:
        assert self.tell(ResponseBegan(RequestId(name), served)) == []

    def end(self, name: str = "r") -> None:
        assert self.tell(RequestEnded(RequestId(name), Outcome.OK)) == []

    @staticmethod
    def only(actions: list[Dispatch | Refuse], name: str) -> Plan | Refusal:
        (action,) = actions
        if isinstance(action, Dispatch):
            assert action.plan.request_id == name
            return action.plan
        assert action.id == name
        return action.refusal


def split_by(address: str, *rungs: RungTaken) -> ServedHeader:
    return ServedHeader(mode=Mode.SPLIT, prefill=HostPort(address), rungs=rungs)


def colocated(*rungs: RungTaken) -> ServedHeader:
    return ServedHeader(mode=Mode.COLOCATED, rungs=rungs)


def gave_up(
    address: str, reason: RungReason = RungReason.PREFILL_TIMEOUT, then: RungKind = RungKind.COLOCATED
) -> RungTaken:
    return RungTaken(rung=then, reason=reason, target=HostPort(address))


def test_a_request_that_was_moved_is_accounted_for_where_it_went() -> None:
    story = Story()
    plan = story.plan()
    ledger = story.coordinator.ledger
    other = HostPort("d-1:80" if plan.decode.address == "d-0:80" else "d-0:80")
    for nowhere in (HostPort("elsewhere:80"), plan.decode.address):
        assert story.tell(DecodeMoved(RequestId("r"), nowhere)) == []
        assert ledger.load(plan.decode.id).decode_count == 1
    assert story.tell(DecodeMoved(RequestId("r"), other)) == []
    assert ledger.load(plan.decode.id).is_empty
    assert ledger.load(EndpointId(f"d/{other[2]}")).decode_count == 1
    story.begin()
    story.end()
    assert ledger.open_count == story.coordinator.live_count == 0


def test_a_request_that_was_moved_onto_its_own_prefill_is_colocated_there() -> None:
    both = pool("b", Role.BOTH)
    always = Disaggregation(mode=SplitMode.ALWAYS)
    story = Story(replace(MODEL, pools=(both,), disaggregation=always), prefills=0, decodes=0)
    for index in range(2):
        story.ready(endpoint(both, index))
    plan = story.plan()
    assert plan.prefill is not None
    assert plan.chosen.figures.transfer_bytes > 0
    assert story.tell(DecodeMoved(RequestId("r"), plan.prefill.address)) == []
    ledger = story.coordinator.ledger
    load = ledger.load(plan.prefill.id)
    assert (load.request_count, load.decode_count, load.bytes_in_flight) == (1, 1, 0)
    assert ledger.load(plan.decode.id).is_empty
    story.begin(served=split_by(plan.prefill.address))
    story.end()
    assert ledger.open_count == story.coordinator.live_count == story.coordinator.paths.breaker_count == 0


def test_only_allowed_endpoints_are_planned_with_and_without_any_it_is_refused() -> None:
    story = Story()
    plan = story.plan(allowed=frozenset({"d-1:80", "p-0:80"}))
    assert plan.endpoint_ids() == {"d/1", "p/0"}
    assert story.refusal("s", allowed=frozenset({"elsewhere"})) is RefuseReason.NO_ENDPOINTS


def test_a_split_request_from_arrival_to_end() -> None:
    story = Story()
    plan = story.plan()
    assert (plan.mode, plan.why, plan.dialect) == (Mode.SPLIT, Why.SPLIT_FASTER, DialectName.NIXLV2)
    assert plan.prefill is not None
    assert [rung.kind for rung in plan.rungs] == [RungKind.OTHER_PREFILL, RungKind.COLOCATED]
    ledger = story.coordinator.ledger
    assert ledger.open_count == story.coordinator.live_count == 1
    assert ledger.load(plan.prefill.id).bytes_in_flight == 4_000_000
    story.begin(served=split_by(plan.prefill.address))
    assert ledger.load(plan.prefill.id).is_empty
    assert ledger.load(plan.decode.id).streaming_count == 1
    story.end()
    assert ledger.open_count == story.coordinator.live_count == 0


def test_a_shared_prefix_goes_where_it_is_cached() -> None:
    story = Story()
    first = story.plan("a")
    story.begin("a", split_by(first.prefill.address if first.prefill else ""))
    story.end("a")
    second = story.plan("b")
    assert second.decode == first.decode
    assert second.chosen.figures.cached_tokens > 0
    other_tenant = block_keys(b"a prompt " * 2_000, model="m", cache_salt="x", block_bytes=256)
    assert story.plan("c", block_keys=other_tenant).chosen.figures.cached_tokens == 0


def test_an_unknown_model_is_refused_and_leaves_nothing() -> None:
    story = Story()
    assert story.refusal(model=N) is RefuseReason.MODEL_UNKNOWN
    assert story.coordinator.live_count == 0


def test_an_empty_fleet_says_so_and_when_to_come_back() -> None:
    found = Story(prefills=0, decodes=0).ask()
    assert isinstance(found, Refusal)
    assert (found.reason, found.retry_after_s) == (RefuseReason.NO_ENDPOINTS, 1)


def test_a_full_fleet_is_saturated_where_nobody_may_wait() -> None:
    story = Story(prefills=0, decodes=0)
    story.ready(endpoint(pool("d", Role.DECODE, limits=PoolLimits(in_flight_max=1)), 0))
    story.plan("a")
    assert story.refusal("b") is RefuseReason.SATURATED
    story.end("a")
    story.plan("c")


@pytest.mark.parametrize("health", ["ready", "draining", "full"])
def test_a_prompt_past_every_context_is_the_clients_fault_whatever_the_fleets_state(health: str) -> None:
    small = pool("d", Role.DECODE, limits=PoolLimits(in_flight_max=1, context_tokens_max=1_000))
    story = Story(Model(M, (small,)), prefills=0, decodes=0)
    story.ready(endpoint(small, 0))
    if health == "draining":
        story.tell(EndpointDraining(EndpointId("d/0")))
    elif health == "full":
        story.plan("a", tokens=10)
    found = story.ask("b", is_prompt_counted=True)
    assert isinstance(found, Refusal)
    assert (found.reason, found.retry_after_s) == (RefuseReason.CONTEXT_TOO_LONG, None)


def test_a_prompt_that_only_an_absent_pool_could_take_may_be_tried_again() -> None:
    small = pool("d", Role.DECODE, limits=PoolLimits(context_tokens_max=1_000))
    story = Story(Model(M, (small, pool("big", Role.DECODE))), prefills=0, decodes=0)
    story.ready(endpoint(small, 0))
    assert story.refusal(is_prompt_counted=True) is RefuseReason.NO_ENDPOINTS


def test_what_a_sidecar_gave_up_opens_the_path_and_a_probe_closes_it() -> None:
    story = Story(prefills=1, decodes=1)
    for index in range(3):
        plan = story.plan(f"r{index}")
        assert plan.prefill is not None
        story.begin(f"r{index}", colocated(gave_up(plan.prefill.address)))
        story.end(f"r{index}")
        story.coordinator.prefixes.forget(1)
    plan = story.plan("outage")
    assert (plan.mode, plan.why, plan.is_outage) == (Mode.COLOCATED, Why.NO_OPEN_PATH, True)
    story.end("outage")
    story.coordinator.prefixes.forget(1)

    story.now_s = 1.0
    probe = story.plan("probe")
    assert probe.mode is Mode.SPLIT
    # While the probe is under way nobody else takes the path.
    assert story.plan("beside", block_keys=()).mode is Mode.COLOCATED
    assert probe.prefill is not None
    story.begin("probe", split_by(probe.prefill.address))
    assert story.coordinator.paths.breaker_count == 0
    assert story.plan("after", block_keys=()).mode is Mode.SPLIT


@pytest.mark.parametrize("how", ["end", "fail", "begin"])
def test_a_probe_that_tells_nothing_lets_the_next_one_go(how: str) -> None:
    story = Story(prefills=1, decodes=1)
    story.coordinator.paths.fail(
        (EndpointId("p/0"), EndpointId("d/0")), RungReason.PREFILL_UNREACHABLE, RequestId("x"), 0.0
    )
    story.now_s = 2.0
    assert story.plan("probe", block_keys=()).mode is Mode.SPLIT
    if how == "end":
        story.end("probe")
    elif how == "fail":
        story.fail("probe")
    else:
        story.begin("probe")
    assert story.plan("next", block_keys=()).mode is Mode.SPLIT


@pytest.mark.parametrize("gone", ["prefill", "decode"])
def test_late_news_of_an_endpoint_that_is_gone_leaves_no_trace(gone: str) -> None:
    story = Story()
    plan = story.plan()
    assert plan.prefill is not None
    story.tell(EndpointGone(plan.prefill.id if gone == "prefill" else plan.decode.id))
    story.begin(served=colocated(gave_up(plan.prefill.address, RungReason.PREFILL_UNREACHABLE)))
    assert story.coordinator.paths.breaker_count == 0
    story.end()
    known = {state.endpoint.id for state in story.coordinator.fleet.states()}
    assert set(dict(story.coordinator.ledger.loads())) <= known


def test_an_account_of_an_endpoint_that_left_ends_with_its_last_request() -> None:
    story = Story()
    plan = story.plan()
    story.tell(EndpointGone(plan.decode.id))
    assert plan.decode.id in dict(story.coordinator.ledger.loads())
    story.fail()
    assert plan.decode.id not in dict(story.coordinator.ledger.loads())


def test_another_process_under_the_same_name_is_not_blamed_for_the_old_one() -> None:
    story = Story(prefills=1, decodes=1)
    plan = story.plan()
    assert plan.prefill is not None
    story.ready(endpoint(P, 0, port=81))
    story.begin(served=colocated(gave_up(plan.prefill.address, RungReason.PREFILL_UNREACHABLE)))
    story.end()
    assert story.coordinator.paths.breaker_count == 0
    state = story.coordinator.fleet.get(plan.prefill.id)
    assert state is not None
    assert state.ordinal not in story.coordinator.prefixes.approximate.match(KEYS)


def test_another_process_under_the_same_name_is_not_praised_for_the_old_one() -> None:
    story = Story(prefills=1, decodes=1)
    plan = story.plan()
    assert plan.prefill is not None
    story.ready(endpoint(P, 0, port=81))
    path = (plan.prefill.id, plan.decode.id)
    story.coordinator.paths.fail(path, RungReason.PREFILL_UNREACHABLE, RequestId("x"), 0.0)
    story.begin(served=split_by(plan.prefill.address))
    assert story.coordinator.paths.state(*path, 0.0) is BreakerState.OPEN


def test_a_removed_model_is_refused_and_its_live_requests_end_well() -> None:
    story = Story()
    story.plan("a")
    story.plan("b")
    story.tell(ModelsReplaced(()))
    assert story.refusal("c") is RefuseReason.MODEL_UNKNOWN
    story.begin("a")
    story.end("a")
    found = story.fail("b")
    assert isinstance(found, Refusal)
    assert story.coordinator.live_count == 0


def test_a_name_that_another_model_has_by_now_takes_no_live_request_there() -> None:
    story = Story()
    story.plan("a")
    story.plan("b")
    story.begin("b")
    pools = tuple(pool(f"{each.name}n", each.role, each.side, model=N, speed=SLOW) for each in (P, D))
    story.tell(ModelsReplaced((Model(N, pools, adapters=(M,), disaggregation=MODEL.disaggregation),)))
    for each in pools:
        story.ready(endpoint(each, 0))
    assert story.coordinator.model(M) is story.coordinator.model(N)
    assert isinstance(story.fail("a"), Refusal)
    (refused,) = story.tell(StreamBroke(RequestId("b"), RungReason.DECODE_ERROR, 3))
    assert isinstance(refused, Refuse)
    assert refused.refusal.reason is RefuseReason.STREAM_LOST


def outage(share_max: float, window: int = 40, rungs: tuple[RungKind, ...] = Fallback().rungs) -> Story:
    """A story in which every prefill pod has just gone."""
    fallback = Fallback(colocated_share_max=share_max, window=window, rungs=rungs)
    story = Story(replace(MODEL, fallback=fallback))
    for index in range(2):
        story.tell(EndpointGone(EndpointId(f"p/{index}")))
    return story


def served_in(story: Story, count: int) -> int:
    served = 0
    for index in range(count):
        found = story.ask(f"r{index}", block_keys=())
        if isinstance(found, Plan):
            served += 1
            assert found.is_outage
            story.begin(f"r{index}")
            story.end(f"r{index}")
        else:
            assert found.reason is RefuseReason.SATURATED
    return served


@pytest.mark.parametrize("share_max", [0.25, 0.5, 0.9])
def test_a_prefill_outage_is_served_up_to_the_budget_for_as_long_as_it_lasts(share_max: float) -> None:
    story = outage(share_max)
    served_in(story, 100)
    assert served_in(story, 400) == pytest.approx(400 * share_max, abs=20)
    assert story.coordinator.fallback_share("m") == pytest.approx(share_max, abs=0.1)


def test_a_budget_of_one_refuses_nobody() -> None:
    assert served_in(outage(1.0), 100) == 100


def test_a_full_kv_pool_takes_no_prefill_that_others_were_to_do() -> None:
    story = outage(1.0)
    for index in range(2):
        story.tell(SampleTaken(EndpointId(f"d/{index}"), Sample(0, 0, 0.99, 0.0)))
    assert story.refusal(block_keys=()) is RefuseReason.SATURATED
    assert isinstance(story.ask("short", tokens=10), Plan)


def test_a_ladder_without_local_prefill_refuses_in_an_outage() -> None:
    story = outage(1.0, rungs=(RungKind.OTHER_PREFILL, RungKind.OTHER_DECODE))
    assert story.refusal(block_keys=()) is RefuseReason.NO_ENDPOINTS
    assert isinstance(story.ask("short", tokens=10), Plan)


def test_a_fleet_that_cannot_split_by_design_is_not_held_to_the_budget() -> None:
    alone = pool("d", Role.DECODE, Side(Connector.NONE, None))
    model = Model(M, (alone,), fallback=Fallback(colocated_share_max=0.0))
    story = Story(model, prefills=0, decodes=0)
    story.ready(endpoint(alone, 0))
    for index in range(50):
        plan = story.plan(f"r{index}", block_keys=())
        assert not plan.is_outage
        story.begin(f"r{index}")
        story.end(f"r{index}")


def test_sglang_pairs_speak_their_dialect_and_never_fall_back_to_a_worker_that_cannot() -> None:
    pools = tuple(replace(of, engine=EngineKind.SGLANG) for of in (P, D))
    story = Story(Model(M, pools), prefills=0, decodes=0)
    for of in pools:
        for index in range(2):
            story.ready(endpoint(of, index))
    plan = story.plan(tokens=5)
    assert (plan.mode, plan.dialect, plan.why) == (Mode.SPLIT, DialectName.SGLANG, Why.SPLIT_ONLY_WAY)
    assert [rung.kind for rung in plan.rungs] == [RungKind.OTHER_PREFILL]
    assert story.refusal("many", choice_count=2) is RefuseReason.NOT_SERVED
    assert story.refusal("one engine", is_splittable=False) is RefuseReason.NOT_SERVED


def test_paths_are_shown_with_verdict_breaker_and_bandwidth() -> None:
    story = Story(prefills=1, decodes=2)
    story.coordinator.paths.fail(
        (EndpointId("p/0"), EndpointId("d/0")), RungReason.PREFILL_UNREACHABLE, RequestId("x"), 0.0
    )
    views = {(v.prefill.id, v.decode.id): v for v in story.coordinator.paths_view(0.5)}
    assert {pair: str(view.state) for pair, view in views.items()} == {
        ("p/0", "d/0"): "open",
        ("p/0", "d/1"): "closed",
    }
    assert all(view.verdict.is_possible and view.bandwidth_bytes_per_s == 1e10 for view in views.values())


# Both legs at once.


@pytest.mark.parametrize(
    ("connector", "order", "dialect"),
    [
        (Connector.PDCOORD, LegOrder.CONCURRENT, DialectName.PDCOORD),
        (Connector.PDCOORD, LegOrder.SEQUENTIAL, DialectName.NIXLV2),
        (Connector.NIXL, LegOrder.CONCURRENT, DialectName.NIXLV2),
    ],
)
def test_both_legs_go_at_once_where_the_policy_and_both_connectors_allow_it(
    connector: Connector, order: LegOrder, dialect: DialectName
) -> None:
    side = Side(connector, KvLayout(16))
    pools = pool("p", Role.PREFILL, side), pool("d", Role.DECODE, side)
    story = Story(Model(M, pools, disaggregation=Disaggregation(order=order)), prefills=0, decodes=0)
    for of in pools:
        story.ready(endpoint(of, 0))
    plan = story.plan()
    assert (plan.mode, plan.dialect) == (Mode.SPLIT, dialect)


# Probes.


def test_a_path_whose_probe_failed_is_not_used_until_a_good_one() -> None:
    story = Story(prefills=1, decodes=1)
    story.probed("p-0:80", "d/0", failure="unreachable")
    plan = story.plan("one")
    assert (plan.mode, plan.why, plan.is_outage) == (Mode.COLOCATED, Why.NO_OPEN_PATH, True)
    assert plan.drops[DropReason.PROBE_FAILED] == 1
    story.now_s += 1.0
    story.probed("p-0:80", "d/0")
    assert story.plan("two", block_keys=()).mode is Mode.SPLIT


def test_another_path_is_taken_where_one_probe_failed() -> None:
    story = Story(prefills=2, decodes=2)
    for decode in ("d/0", "d/1"):
        story.probed("p-0:80", decode, verdict="impossible")
    plan = story.plan()
    assert plan.prefill is not None
    assert plan.prefill.id == "p/1"
    assert [rung.kind for rung in plan.rungs] == [RungKind.COLOCATED], "no rung is a path that is shut"


def test_a_path_that_fell_back_to_tcp_is_not_used_in_silence() -> None:
    rules = Disaggregation(bandwidth_bytes_per_s_min=1e9)
    story = Story(replace(MODEL, disaggregation=rules), prefills=1, decodes=1)
    story.probed("p-0:80", "d/0", transport="tcp", is_degraded=True, bandwidth_bytes_per_s=6e8)
    plan = story.plan()
    assert (plan.mode, plan.drops[DropReason.BANDWIDTH_TOO_LOW]) == (Mode.COLOCATED, 1)


def test_a_transfer_takes_as_long_as_its_path_was_measured_to_take() -> None:
    story = Story(prefills=1, decodes=1)
    fast = story.plan("fast").chosen.figures.transfer_s
    story.end("fast")
    story.probed("p-0:80", "d/0", bandwidth_bytes_per_s=2e9, latency_s=0.05)
    slow = story.plan("slow", block_keys=()).chosen.figures
    assert slow.transfer_s == pytest.approx(0.05 + slow.transfer_bytes / 2e9)
    assert slow.transfer_s > fast


def test_the_faster_of_two_paths_is_taken_though_the_slow_one_is_idle_longest() -> None:
    story = Story(prefills=2, decodes=1)
    story.probed("p-0:80", "d/0", bandwidth_bytes_per_s=1.1e9)
    plan = story.plan()
    assert plan.prefill is not None
    assert plan.prefill.id == "p/1"


def test_a_probe_of_nobody_is_no_news() -> None:
    story = Story(prefills=1, decodes=1)
    for prefill, decode in (("gone:80", "d/0"), ("p-0:80", "d/9"), ("d-0:80", "d/0"), ("p-0:81", "d/0")):
        story.probed(prefill, decode, failure="unreachable")
    assert story.coordinator.paths.probe_count == 0


def test_a_probe_is_of_the_decode_endpoints_own_model() -> None:
    story = Story(prefills=1, decodes=1)
    of_n = pool("p-n", Role.PREFILL, model=N)
    story.ready(replace(endpoint(of_n, 0), address=HostPort("p-0:80")))
    story.probed("p-0:80", "d/0", failure="unreachable")
    assert story.coordinator.paths.probe_count == 1
    assert story.coordinator.paths.fault(EndpointId("p/0"), EndpointId("d/0"), 0.0) == "unreachable"


def test_an_endpoint_that_moves_takes_its_probes_along() -> None:
    story = Story(prefills=1, decodes=1)
    story.probed("p-0:80", "d/0", failure="unreachable")
    story.ready(endpoint(P, 0, port=81))
    assert story.plan().mode is Mode.SPLIT


def test_the_last_probe_is_shown() -> None:
    story = Story(prefills=1, decodes=1)
    (view,) = story.coordinator.paths_view(0.0)
    assert (view.probe, view.fault) == (None, "")
    story.probed("p-0:80", "d/0", bandwidth_bytes_per_s=2e9, transport="rc_mlx5")
    (view,) = story.coordinator.paths_view(0.0)
    assert view.probe is not None
    assert (view.probe.transport, view.bandwidth_bytes_per_s, view.fault) == ("rc_mlx5", 2e9, "")
    story.now_s = 1.0
    story.probed("p-0:80", "d/0", failure="peer-lost")
    (view,) = story.coordinator.paths_view(1.0)
    assert (str(view.state), view.fault, view.bandwidth_bytes_per_s) == ("open", "peer-lost", 1e10)


@pytest.mark.parametrize("event", ["plan", "begin", "fail"])
def test_what_is_not_legal_is_our_own_bug(event: str) -> None:
    story = Story()
    story.plan()
    story.begin()
    with pytest.raises(AssertionError):
        getattr(story, event)()


# The whole, in any order.

EQUAL, OTHER = Side(Connector.PDCOORD, KvLayout(16)), Side(Connector.PDCOORD, KvLayout(64, tiling="private"))
POOLS = (
    P,
    pool("p-nixl", Role.PREFILL, Side(Connector.NIXL, KvLayout(16))),
    pool("p-slow-link", Role.PREFILL, link_bytes_per_s=1e6),
    D,
    pool("d-private", Role.DECODE, OTHER),
    pool("d-small", Role.DECODE, limits=PoolLimits(in_flight_max=2, context_tokens_max=4_000)),
    pool("both", Role.BOTH, speed=SpeedFigures(0.01, 3e-4, 0.012)),
    pool("alone", Role.BOTH, Side(Connector.NONE, None)),
    pool("p-sglang", Role.PREFILL, Side(Connector.SGLANG, KvLayout(1)), engine=EngineKind.SGLANG),
    pool("d-sglang", Role.DECODE, Side(Connector.SGLANG, KvLayout(1)), engine=EngineKind.SGLANG),
    pool("p-n", Role.PREFILL, model=N),
    pool("d-n", Role.DECODE, model=N),
)
ENDPOINTS = tuple(endpoint(of, index) for of in POOLS for index in range(2))
fallbacks = st.builds(
    Fallback,
    rungs=st.permutations([kind for kind in RungKind if kind is not RungKind.REFUSE]).flatmap(
        lambda kinds: st.integers(0, 4).map(lambda count: tuple(kinds[:count]))
    ),
    resume_tries_max=st.integers(1, 3),
    resume_age_s_max=st.sampled_from([0.5, 600.0]),
    other_prefill_max=st.integers(0, 3),
    other_decode_max=st.integers(0, 3),
    colocated_share_max=st.sampled_from([0.0, 0.5, 1.0]),
    window=st.sampled_from([2, 200]),
)
models = st.builds(
    lambda name, **rest: Model(name, POOLS, **rest),
    st.sampled_from([M, N]),
    disaggregation=st.builds(
        Disaggregation,
        mode=st.sampled_from([SplitMode.AUTO, SplitMode.ALWAYS, SplitMode.AUTO, SplitMode.NEVER]),
        uncached_tokens_min=st.sampled_from([0, 256]),
    ),
    fallback=fallbacks,
    slo=st.builds(Slo, st.sampled_from([None, 0.5]), st.sampled_from([None, 0.02])),
    admission=st.builds(
        AdmissionRules,
        queue_s_max=st.sampled_from([0.0, 0.1, 2.0]),
        wait_s_max=st.sampled_from([0.0, 0.5, 30.0]),
        requests_max=st.sampled_from([1, 3, 1_000]),
        low_share_min=st.sampled_from([0.0, 0.5]),
    ),
    prefix_blocks_per_endpoint_max=st.sampled_from([8, 1_000]),
)
# By index: to print a strategy that holds them all takes longer than the test.
indexes = st.integers(0, len(ENDPOINTS) - 1)
endpoints = indexes.map(ENDPOINTS.__getitem__)
addresses = st.sampled_from([e.address for e in ENDPOINTS] + [HostPort("nobody:1"), HostPort("p-0:81")])
rungs_taken = st.builds(
    RungTaken,
    rung=st.sampled_from(RungKind),
    reason=st.sampled_from([*RungReason, *[RungReason.PREFILL_UNREACHABLE] * 8]),
    target=addresses,
)
# By name, too. Of "long" and "other" nothing is shared, of "short" and "long" the first blocks are.
PROMPTS = {"empty": b"", "short": b"x" * 5_000, "long": b"x" * 20_000, "other": b"y" * 20_000}
KEYS_OF = {
    name: block_keys(prompt, model="m", cache_salt="", block_bytes=256) for name, prompt in PROMPTS.items()
}
asks = st.builds(
    lambda prompt, **rest: Request(
        RequestId(""), prompt_tokens=len(PROMPTS[prompt]) // 4, block_keys=KEYS_OF[prompt], **rest
    ),
    st.sampled_from(["empty", "short", "long", "long", "other", "other"]),
    model=st.sampled_from([M, M, M, M, N]),
    choice_count=st.sampled_from([1, 1, 1, 1, 1, 2]),
    is_splittable=st.sampled_from([True, True, True, True, True, False]),
    is_generative=st.sampled_from([True, True, True, True, True, False]),
    is_prompt_counted=st.booleans(),
    tenant=st.sampled_from(["", "a", "b"]),
    priority=st.sampled_from([0, 0, 0, 5, -1]),
    slo=st.builds(Slo, st.sampled_from([None, None, 0.5])),
)


class CoordinatorMachine(RuleBasedStateMachine):
    """Signals, policies and requests interleaved at will, with an own account of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.coordinator = Coordinator()
        self.now_s = 0.0
        self.count = 0
        self.addresses: dict[EndpointId, HostPort] = {}
        self.unfit: set[EndpointId] = set()
        self.plans: dict[RequestId, Plan] = {}
        self.requests: dict[RequestId, Request] = {}
        self.failed: dict[RequestId, set[EndpointId]] = {}
        self.last_broken: dict[RequestId, EndpointId] = {}
        self.attempts: Counter[RequestId] = Counter()
        self.begun: set[RequestId] = set()
        self.first_byte_s: dict[RequestId, float] = {}
        self.resumes: Counter[RequestId] = Counter()
        self.moves: Counter[RequestId] = Counter()
        self.is_given_back = False
        self.waiting: set[RequestId] = set()
        self.hedges: dict[RequestId, Plan] = {}

    @initialize(model=models, listed=st.sets(indexes, min_size=3) | st.just({0, 1, 2, 6, 7, 8}))
    def start(self, model: Model, listed: set[int]) -> None:
        self.tell(ModelsReplaced((replace(model, name=M),)))
        for found in (ENDPOINTS[index] for index in sorted(listed)):
            self.tell(EndpointSeen(found))
            self.tell(SampleTaken(found.id, Sample(0, 0, 0.0, 0.0)))
            self.addresses[found.id] = found.address

    def tell(self, event: object, own: RequestId | None = None) -> list[Action]:
        """What is said of the event's own request; of others there is only news for those who wait."""
        before = {name: self.states_of(name) for name in self.paths_in_trouble()}
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        for action in actions:
            if isinstance(action, Dispatch):
                # Those who waited may go over a path that this event has closed.
                self.check_plan(action.plan, before if action.id == own else {})
            if action.id != own:
                self.waiting.remove(action.id)
                self.keep(action.id, [action])
        return [action for action in actions if action.id == own]

    def paths_in_trouble(self) -> Iterable[tuple[EndpointId, EndpointId]]:
        names = [found.id for found in ENDPOINTS if found.id in self.coordinator.paths.troubled]  # type: ignore[operator]
        return [(one, two) for one in names for two in names]

    def states_of(self, path: tuple[EndpointId, EndpointId]) -> tuple[BreakerState, bool]:
        paths = self.coordinator.paths
        return paths.state(*path, self.now_s), paths.lets_pass(*path, self.now_s)

    def left_out(self, name: RequestId) -> set[EndpointId]:
        """Who failed a request; of a stream that broke, who was last, since it may go back to the others."""
        last = self.last_broken.get(name)
        return {last} if last is not None else self.failed.get(name, set())

    def check_plan(
        self, plan: Plan, before: dict[tuple[EndpointId, EndpointId], tuple[BreakerState, bool]]
    ) -> None:
        model = self.coordinator.model(M if plan.decode.pool.model == M else N)
        request = self.requests[plan.request_id]
        assert model is not None
        for name in plan.endpoint_ids():
            assert name in self.addresses, "an endpoint that is gone"
            assert name not in self.unfit, "an endpoint that is draining, unreachable or unknown"
            assert name not in self.left_out(plan.request_id), "an endpoint that failed it before"
        sent_to = [
            plan.decode,
            *(e for e in (plan.prefill, *(r.prefill for r in plan.rungs)) if e is not None),
        ]
        assert all(e.address == self.addresses[e.id] and e.pool.model == model.name for e in sent_to)
        assert plan.decode.pool.can_decode
        assert len(plan.endpoint_ids()) == len(sent_to), "the same endpoint twice"
        for prefill in sent_to[1:]:
            assert prefill.pool.can_prefill
            assert verdict(prefill.pool.side, plan.decode.pool.side).is_possible
            assert prefill.pool.engine is plan.decode.pool.engine
            bandwidth = min(prefill.pool.link_bytes_per_s, plan.decode.pool.link_bytes_per_s)
            assert bandwidth >= model.disaggregation.bandwidth_bytes_per_s_min
            path, seeded = (prefill.id, plan.decode.id), PathFigures(0.0, bandwidth)
            assert self.coordinator.paths.fault(*path, self.now_s) == ""
            figures = self.coordinator.paths.figures(*path, seeded, self.now_s)
            assert figures.bandwidth_bytes_per_s >= model.disaggregation.bandwidth_bytes_per_s_min
            state, lets_pass = before.get((prefill.id, plan.decode.id), (BreakerState.CLOSED, True))
            assert lets_pass
            assert state is BreakerState.CLOSED or prefill is plan.prefill
        assert (plan.mode is Mode.SPLIT) == plan.why.startswith("split-")
        if plan.mode is Mode.SPLIT:
            assert request.choice_count == 1
            assert request.is_generative
            assert request.is_splittable
            assert model.disaggregation.mode is not SplitMode.NEVER
        else:
            assert plan.rungs == ()
            assert plan.decode.pool.can_serve_alone
        others = [rung for rung in plan.rungs if rung.kind is RungKind.OTHER_PREFILL]
        assert len(others) <= model.fallback.other_prefill_max
        assert {rung.kind for rung in plan.rungs} <= set(model.fallback.rungs)
        assert plan.attempt == self.attempts[plan.request_id]
        if plan.request_id in self.first_byte_s:
            assert RungKind.RESUME in model.fallback.rungs
            if self.is_given_back:
                self.moves[plan.request_id] += 1
            else:
                self.resumes[plan.request_id] += 1
                assert self.resumes[plan.request_id] <= model.fallback.resume_tries_max
                age_s = self.now_s - self.first_byte_s[plan.request_id]
                assert age_s <= model.fallback.resume_age_s_max
            assert self.resumes[plan.request_id] + self.moves[plan.request_id] <= RESUMES_MAX
        else:
            assert plan.attempt <= model.fallback.other_decode_max

    # Signals.

    @rule(
        kind=st.sampled_from(["see", "sample", "sample", "go", "drain", "lose", "sample"]),
        found=endpoints,
        port=st.sampled_from([80, 80, 81]),
        running=st.integers(0, 3),
        kv_usage=st.sampled_from([0.1, 0.99]),
    )
    def signal(self, kind: str, found: Endpoint, port: int, running: int, kv_usage: float) -> None:
        # One rule for all, so that most of a run is requests.
        known = self.coordinator.fleet.get(found.id)
        match kind:
            case "see":
                seen = replace(found, address=HostPort(f"{found.address.split(':')[0]}:{port}"))
                is_old = known is not None and known.endpoint.address == seen.address
                if not is_old or (known is not None and known.health is Health.DRAINING):
                    self.unfit.add(found.id)
                self.addresses[found.id] = seen.address
                self.tell(EndpointSeen(seen))
            case "go":
                self.addresses.pop(found.id, None)
                self.tell(EndpointGone(found.id))
            case "drain":
                self.unfit |= {found.id} & set(self.addresses)
                self.tell(EndpointDraining(found.id))
            case "sample":
                if known is None or known.health is not Health.DRAINING:
                    self.unfit.discard(found.id)
                self.tell(SampleTaken(found.id, Sample(running, 0, kv_usage, self.now_s)))
            case _:
                for _ in range(2):
                    self.tell(SampleFailed(found.id, "timeout"))
                self.unfit |= {found.id} & set(self.addresses)

    @rule(
        prefill=addresses,
        decode=endpoints,
        failure=st.sampled_from(["", "", "unreachable", "overloaded"]),
        bandwidth=st.sampled_from([None, 0.0, 1e8, 4e9, 1e12]),
    )
    def probe(self, prefill: HostPort, decode: Endpoint, failure: str, bandwidth: float | None) -> None:
        probe = Probe(self.now_s, 10.0, failure, bandwidth_bytes_per_s=bandwidth)
        assert self.tell(PathProbed(prefill, decode.id, probe)) == []

    @rule(
        new=st.none() | models,
        seconds=st.sampled_from([0.1, 1.0, 30.0]),
        is_gone=st.sampled_from([False] * 7 + [True]),
    )
    def pass_time(self, new: Model | None, seconds: float, *, is_gone: bool) -> None:
        self.now_s += seconds
        next_s = self.coordinator.next_event_s()
        assert (self.coordinator.admission.next_event_s() is not None) == bool(self.waiting)
        if next_s is not None and next_s <= self.now_s:
            self.tell(TimePassed())
        if new is not None:
            self.tell(ModelsReplaced(() if is_gone else (new, replace(new, name=N if new.name == M else M))))

    # Requests.

    @rule(asked=st.lists(asks, min_size=1, max_size=4))
    def arrive(self, asked: list[Request]) -> None:
        for one in asked:
            self.count += 1
            request = replace(one, id=RequestId(f"r{self.count}"))
            self.requests[request.id] = request
            self.keep(request.id, self.tell(RequestArrived(request), request.id))

    def keep(self, name: RequestId, actions: list[Action]) -> None:
        (action,) = actions
        if isinstance(action, Dispatch):
            self.plans[name] = action.plan
        elif isinstance(action, Wait):
            self.waiting.add(name)
        else:
            assert action.id == name
            self.plans.pop(name, None)

    @precondition(lambda self: len(self.plans) > len(self.begun))
    @rule(
        data=st.data(),
        rungs=st.lists(rungs_taken, max_size=3),
        mode=st.sampled_from(Mode),
        is_plain=st.booleans(),
    )
    def begin_response(
        self, data: st.DataObject, *, rungs: list[RungTaken], mode: Mode, is_plain: bool
    ) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.plans) - self.begun)))
        self.leave_hedge(name)
        self.begun.add(name)
        self.first_byte_s.setdefault(name, self.now_s)
        served = None if is_plain else self.served(data, name, rungs, mode)
        assert self.tell(ResponseBegan(name, served)) == []

    def served(
        self, data: st.DataObject, name: RequestId, rungs: list[RungTaken], mode: Mode
    ) -> ServedHeader:
        """What a sidecar might say, from the plan's own targets or from nowhere."""
        plan = self.plans[name]
        own = [e.address for e in (plan.prefill, *(rung.prefill for rung in plan.rungs)) if e is not None]
        mine = st.sampled_from(own) if own else addresses
        taken = [replace_target(rung, data.draw(mine | addresses)) for rung in rungs]
        return ServedHeader(mode=mode, prefill=data.draw(st.none() | mine | addresses), rungs=tuple(taken))

    def note_drain(self, failed: EndpointId, reason: RungReason) -> None:
        """Whether the next plan is of a stream that was given back, which no bound of the policy holds up."""
        state = self.coordinator.fleet.get(failed)
        is_leaving = state is not None and state.is_leaving
        self.is_given_back = is_leaving or reason is RungReason.DECODE_DRAINING

    @precondition(lambda self: len(self.plans) > len(self.begun))
    @rule(
        data=st.data(),
        reason=st.sampled_from(RungReason),
        rungs=st.lists(rungs_taken, max_size=2),
        is_plain=st.booleans(),
    )
    def fail_decode(
        self, data: st.DataObject, *, reason: RungReason, rungs: list[RungTaken], is_plain: bool
    ) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.plans) - self.begun)))
        self.leave_hedge(name)
        failed = self.plans[name].decode.id
        self.failed.setdefault(name, set()).add(failed)
        if name in self.last_broken:
            self.last_broken[name] = failed
        self.attempts[name] += 1
        served = None if is_plain else self.served(data, name, rungs, Mode.COLOCATED)
        self.note_drain(failed, reason)
        if reason is RungReason.DECODE_UNREACHABLE:
            self.unfit |= {failed} & set(self.addresses)
        self.keep(name, self.tell(DecodeFailed(name, reason, served), name))

    @precondition(lambda self: self.begun)
    @rule(data=st.data(), reason=st.sampled_from(RungReason), tokens=st.integers(0, 9_000))
    def break_stream(self, data: st.DataObject, *, reason: RungReason, tokens: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.begun)))
        failed = self.last_broken[name] = self.plans[name].decode.id
        self.failed.setdefault(name, set()).add(failed)
        self.attempts[name] += 1
        self.begun.discard(name)
        self.note_drain(failed, reason)
        if reason is RungReason.DECODE_UNREACHABLE:
            self.unfit |= {failed} & set(self.addresses)
        self.coordinator.silence_s_max(name, self.now_s)
        actions = self.tell(StreamBroke(name, reason, tokens), name)
        self.keep(name, actions)
        for action in actions:
            if isinstance(action, Refuse):
                assert action.refusal.reason is RefuseReason.STREAM_LOST

    @precondition(lambda self: len(self.plans) > len(self.begun))
    @rule(data=st.data(), anywhere=addresses, is_onto_prefill=st.booleans())
    def move(self, data: st.DataObject, anywhere: HostPort, *, is_onto_prefill: bool) -> None:
        """A proxy took another endpoint, whichever it found."""
        name = data.draw(st.sampled_from(sorted(set(self.plans) - self.begun)))
        self.leave_hedge(name)
        plan = self.plans[name]
        onto = plan.prefill.address if is_onto_prefill and plan.prefill is not None else anywhere
        model = self.requests[name].model
        served = [each.endpoint for each in self.coordinator.fleet.at(onto)]
        found = next((each for each in served if each.pool.model == model), None)
        if found is not None and found.id != plan.decode.id and self.coordinator.model(model) is not None:
            self.plans[name] = moved(plan, found)
            self.attempts[name] += 1
        assert self.tell(DecodeMoved(name, onto)) == []

    @precondition(lambda self: len(self.plans) > len(self.begun) + len(self.hedges))
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 3.0]))
    def hedge(self, data: st.DataObject, *, seconds: float) -> None:
        """A second attempt beside one without output, which may be late by then."""
        self.now_s += seconds
        name = data.draw(st.sampled_from(sorted(set(self.plans) - self.begun - set(self.hedges))))
        second = id_of(name)
        self.requests[second] = replace(self.requests[name], id=second)
        self.failed[second] = self.failed.get(name, set()) | {self.plans[name].decode.id}
        self.attempts[second] = self.attempts[name] + 1
        for action in self.tell(HedgeAsked(name), second):
            assert isinstance(action, Dispatch)
            self.hedges[name] = action.plan

    @precondition(lambda self: self.hedges)
    @rule(data=st.data(), is_won=st.booleans(), reason=st.sampled_from([None, None, RungReason.DECODE_ERROR]))
    def end_hedge(self, data: st.DataObject, *, is_won: bool, reason: RungReason | None) -> None:
        name = data.draw(st.sampled_from(sorted(self.hedges)))
        second = self.hedges.pop(name)
        slower = self.plans[name] if is_won else second
        if is_won:
            self.plans[name] = replace(second, request_id=name)
            self.attempts[name] += 1
        if is_won or reason is not None:
            self.failed.setdefault(name, set()).add(slower.decode.id)
        assert self.tell(HedgeOver(name, is_won, reason)) == []

    def leave_hedge(self, name: RequestId) -> None:
        """What a gateway tells before anything else of its call."""
        if self.hedges.pop(name, None) is not None:
            assert self.tell(HedgeOver(name, is_won=False)) == []

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_the_queue(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.waiting))))

    def leave(self, name: RequestId) -> None:
        self.waiting.remove(name)
        assert self.tell(RequestEnded(name, Outcome.CLIENT_GONE)) == []

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        name = data.draw(st.sampled_from(sorted(self.plans)))
        self.forget(name)
        assert self.tell(RequestEnded(name, outcome)) == []

    def forget(self, name: RequestId) -> None:
        del self.plans[name]
        self.hedges.pop(name, None)
        self.begun.discard(name)

    @invariant()
    def accounts_agree(self) -> None:
        self.coordinator.validate()
        assert self.coordinator.live_count == len(self.plans) + len(self.hedges) + len(self.waiting)
        assert self.coordinator.admission.count == len(self.waiting)
        assert self.coordinator.paths.breaker_count <= len(self.addresses) ** 2

    def teardown(self) -> None:
        while self.waiting:
            self.leave(min(self.waiting))
        for name in sorted(self.plans):
            self.forget(name)
            self.tell(RequestEnded(name, Outcome.OK))
            self.coordinator.validate()
        ledger = self.coordinator.ledger
        assert ledger.open_count == self.coordinator.live_count == 0
        assert all(
            load == replace(load, prefill_us=0, bytes_in_flight=0, context_tokens=0)
            for _, load in ledger.loads()
        )
        assert all(load.request_count == load.streaming_count == 0 for _, load in ledger.loads())
        for name in list(self.addresses):
            self.tell(EndpointGone(name))
        self.coordinator.validate()
        assert self.coordinator.paths.breaker_count == self.coordinator.paths.probe_count == 0
        assert self.coordinator.prefixes.approximate.block_count == 0
        assert list(ledger.loads()) == []


def replace_target(rung: RungTaken, target: HostPort) -> RungTaken:
    return RungTaken(rung=rung.rung, reason=rung.reason, target=target)


TestCoordinatorMachine = CoordinatorMachine.TestCase
TestCoordinatorMachine.settings = settings(
    max_examples=40, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
