"""When a request is held back for the pace of streams: the rule, and its way through the coordinator."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Action,
    Dispatch,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    TimePassed,
    Wait,
)
from pdcoord.core.fleet import (
    Endpoint,
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
from pdcoord.core.model import AdmissionRules, Model, Slo
from pdcoord.core.pacing import HOLD_SHARE, PACE_SHARE_MAX, is_crowded
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Connector, Side

M = ModelName("m")
SECONDS = st.floats(0.0, 10.0)


@given(SECONDS, SECONDS, SECONDS, st.integers(0, 100))
def test_a_request_is_held_back_only_where_waiting_helps(
    pace_s: float, tpot_s: float, alone_s: float, neighbour_count: int
) -> None:
    held = is_crowded(pace_s, tpot_s, alone_s=alone_s, neighbour_count=neighbour_count)
    assert not is_crowded(pace_s, None, alone_s=alone_s, neighbour_count=neighbour_count)
    assert not is_crowded(pace_s, tpot_s, alone_s=alone_s, neighbour_count=0)
    if held:
        assert pace_s > tpot_s * PACE_SHARE_MAX >= alone_s
        assert is_crowded(pace_s * 2, tpot_s, alone_s=alone_s, neighbour_count=neighbour_count)
    elif neighbour_count and alone_s <= tpot_s * PACE_SHARE_MAX:
        assert pace_s <= tpot_s * PACE_SHARE_MAX


class Story:
    """A coordinator over one endpoint whose step takes 10 ms a stream; prompts cost next to nothing."""

    def __init__(self, slo: Slo, rules: AdmissionRules | None = None, stream_s: float = 0.010) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator()
        pool = Pool(
            name=PoolName("p"),
            model=M,
            role=Role.BOTH,
            vendor="v",
            engine=EngineKind.VLLM,
            side=Side(Connector.NONE, None),
            speed=SpeedFigures(0.0, 1e-6, 0.0, step_s_per_sequence=stream_s),
            kv_bytes_per_token=1_000,
            link_bytes_per_s=0.0,
        )
        self.tell(ModelsReplaced((Model(M, (pool,), slo=slo, admission=rules or AdmissionRules()),)))
        endpoint = Endpoint(EndpointId("p/0"), pool, HostPort("p:80"))
        self.tell(EndpointSeen(endpoint))
        self.tell(SampleTaken(endpoint.id, Sample(0, 0, 0.1, 0.0)))

    def tell(self, event: object) -> list[Action]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions

    def ask(self, name: str, slo: Slo | None = None, priority: int = 0) -> Action:
        request = Request(RequestId(name), M, 100, output_tokens_max=100, slo=slo or Slo(), priority=priority)
        (action,) = self.tell(RequestArrived(request))
        if isinstance(action, Dispatch):
            self.tell(ResponseBegan(request.id, None))
        return action

    def fill(self, count: int) -> None:
        for index in range(count):
            assert isinstance(self.ask(f"s{index}"), Dispatch)

    def pass_time(self, seconds: float) -> list[Action]:
        until_s, actions = self.now_s + seconds, list[Action]()
        while (next_s := self.coordinator.next_event_s()) is not None and next_s <= until_s:
            self.now_s = max(self.now_s, next_s)
            actions += self.tell(TimePassed())
        self.now_s = until_s
        return actions


TIGHT = Slo(ttft_s=2.0, tpot_s=0.050)


def test_one_stream_too_many_waits_until_another_has_ended() -> None:
    story = Story(TIGHT)
    story.fill(4)
    assert isinstance(story.ask("late"), Wait)
    assert story.pass_time(0.5) == []
    told = story.tell(RequestEnded(RequestId("s0"), Outcome.OK))
    (action,) = told or story.pass_time(0.01)
    assert isinstance(action, Dispatch)
    assert action.id == "late"


def test_a_policys_objective_holds_back_for_no_longer_than_its_first_token_allows() -> None:
    story = Story(TIGHT)
    story.fill(4)
    assert isinstance(story.ask("late"), Wait)
    assert story.pass_time(HOLD_SHARE * 2.0 - 0.2) == []
    (action,) = story.pass_time(0.3)
    assert isinstance(action, Dispatch)


def test_an_objective_of_its_own_refuses_a_request_that_nothing_can_meet() -> None:
    story = Story(Slo(ttft_s=2.0))
    story.fill(4)
    assert isinstance(story.ask("late", Slo(tpot_s=0.050)), Wait)
    (action,) = story.pass_time(2.0)
    assert isinstance(action, Refuse)
    assert action.refusal.reason is RefuseReason.DEADLINE
    assert "50 ms a token" in action.refusal.message


@pytest.mark.parametrize(
    ("slo", "rules", "stream_s"),
    [
        (Slo(ttft_s=2.0), None, 0.010),
        (TIGHT, AdmissionRules(wait_s_max=0.0), 0.010),
        # One alone is too slow already: there is nothing to wait for.
        (TIGHT, None, 0.060),
    ],
    ids=["no objective", "waiting is off", "too slow alone"],
)
def test_who_is_not_held_back(slo: Slo, rules: AdmissionRules | None, stream_s: float) -> None:
    story = Story(slo, rules, stream_s)
    story.fill(9)


def test_the_sheddable_are_refused_where_others_would_wait() -> None:
    story = Story(TIGHT)
    story.fill(4)
    action = story.ask("low", priority=-1)
    assert isinstance(action, Refuse)
    assert action.refusal.reason is RefuseReason.SHED
