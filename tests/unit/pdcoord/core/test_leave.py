"""Prefill endpoints that serve badly, once nobody else prefills and the budget gives no leave."""

from dataclasses import replace

import pytest

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Action,
    Dispatch,
    ModelsReplaced,
    Refuse,
    RequestArrived,
    ResponseBegan,
    StreamBroke,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointDraining,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, Model, SplitMode
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.core.trouble import FAILURES_MAX, Phase
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
NO_LOCAL = (RungKind.OTHER_PREFILL, RungKind.OTHER_DECODE, RungKind.RESUME)


def pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)


def model(rules: Fallback, prefill: Pool = P, decode: Pool = D) -> Model:
    always = Disaggregation(mode=SplitMode.ALWAYS, bandwidth_bytes_per_s_min=0.0)
    admission = AdmissionRules(wait_s_max=0.0)
    return Model(M, (prefill, decode), disaggregation=always, fallback=rules, admission=admission)


class Story:
    """A coordinator with two prefill and two decode endpoints, that may all be put out; all are ready."""

    def __init__(self, of: Model) -> None:
        self.now_s = 0.0
        self.count = 0
        self.coordinator = Coordinator()
        self.tell(ModelsReplaced((of,)))
        for each in of.pools:
            for index in range(2):
                name = EndpointId(f"{each.name}/{index}")
                self.tell(EndpointSeen(Endpoint(name, each, HostPort(f"{each.name}-{index}:80"))))
                self.tell(SampleTaken(name, Sample(0, 0, 0.1, self.now_s)))

    def tell(self, event: object) -> list[Action]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions

    def ask(self) -> Plan | RefuseReason:
        self.count += 1
        (action,) = self.tell(RequestArrived(Request(RequestId(f"r{self.count}"), M, prompt_tokens=4_000)))
        if isinstance(action, Dispatch):
            return action.plan
        assert isinstance(action, Refuse)
        return action.refusal.reason

    def plan(self) -> Plan:
        found = self.ask()
        assert isinstance(found, Plan), found
        return found

    def put_out(self, name: str) -> None:
        """As others say of it that fail there; its paths are not tripped by that."""
        progress, fleet = self.coordinator.progress, self.coordinator.fleet
        (prefill, *decodes) = (fleet.get(EndpointId(each)) for each in (name, "d/0", "d/1"))
        assert prefill is not None
        for count in range(2 * FAILURES_MAX):
            decode = decodes[count % 2]
            assert decode is not None
            request = RequestId(f"other {count}")
            reason = RungReason.PREFILL_TIMEOUT
            progress.prefill_failed(prefill.endpoint, decode.endpoint, reason, request, self.now_s)
        trouble = progress.quarantine.trouble(prefill.endpoint.id)
        assert trouble is not None
        assert trouble.phase is Phase.OUT

    def drain(self, *names: str) -> None:
        for name in names:
            self.tell(EndpointDraining(EndpointId(name)))


@pytest.mark.parametrize(
    "rules",
    [
        Fallback(rungs=NO_LOCAL, quarantine_share_max=0.5),
        Fallback(colocated_share_max=0.0, quarantine_share_max=0.5),
    ],
    ids=["no-rung", "no-share"],
)
def test_a_prefill_endpoint_that_is_out_serves_before_anybody_is_refused(rules: Fallback) -> None:
    story = Story(model(rules))
    story.put_out("p/0")
    assert {story.plan().prefill.id for _ in range(8)} == {"p/1"}  # type: ignore[union-attr]
    story.drain("p/1")
    plan = story.plan()
    assert plan.prefill is not None
    assert (plan.mode, plan.prefill.id, plan.is_outage) == (Mode.SPLIT, "p/0", False)
    assert story.coordinator.budgets[M].refused_count == 0


def test_with_leave_it_is_computed_where_it_decodes() -> None:
    story = Story(model(Fallback(quarantine_share_max=0.5)))
    story.put_out("p/0")
    story.drain("p/1")
    plan = story.plan()
    assert (plan.mode, plan.is_outage) == (Mode.COLOCATED, True)


def test_with_nobody_that_prefills_it_is_refused_as_before() -> None:
    story = Story(model(Fallback(colocated_share_max=0.0, quarantine_share_max=0.5)))
    story.drain("p/0", "p/1")
    assert story.ask() is RefuseReason.SATURATED
    assert story.coordinator.budgets[M].refused_count == 1


def test_who_is_out_does_not_take_what_the_others_are_too_full_for() -> None:
    rules = Fallback(colocated_share_max=0.0, quarantine_share_max=0.5)
    story = Story(model(rules, replace(P, limits=PoolLimits(in_flight_max=3))))
    story.put_out("p/0")
    assert {story.plan().prefill.id for _ in range(3)} == {"p/1"}  # type: ignore[union-attr]
    assert story.ask() is RefuseReason.SATURATED


def test_it_serves_where_decode_endpoints_cannot_serve_alone_and_one_is_full() -> None:
    rules = Fallback(quarantine_share_max=0.5)
    decode = replace(D, engine=EngineKind.SGLANG, limits=PoolLimits(in_flight_max=3))
    story = Story(model(rules, replace(P, engine=EngineKind.SGLANG), decode))
    story.put_out("p/0")
    while story.coordinator.ledger.load(EndpointId("d/0")).request_count < 3:
        story.plan()
    story.drain("p/1")
    plan = story.plan()
    assert plan.prefill is not None
    assert (plan.prefill.id, plan.decode.id) == ("p/0", "d/1")


def test_a_continuation_gets_it_too() -> None:
    story = Story(model(Fallback(rungs=NO_LOCAL, quarantine_share_max=0.5)))
    story.put_out("p/0")
    plan = story.plan()
    assert plan.prefill is not None
    story.tell(ResponseBegan(plan.request_id, ServedHeader(mode=Mode.SPLIT, prefill=plan.prefill.address)))
    story.drain("p/1")
    (action,) = story.tell(StreamBroke(plan.request_id, RungReason.DECODE_ERROR, 10))
    assert isinstance(action, Dispatch), action
    assert action.plan.prefill is not None
    assert action.plan.prefill.id == "p/0"
