"""Admission, told through the coordinator: who starts, who waits, who is refused, and when."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdcoord.core import admission
from pdcoord.core.admission import TRIAL_S
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
    SampleTaken,
)
from pdcoord.core.model import AdmissionRules, Model, Slo
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Connector, Side

M = ModelName("m")
RULES = AdmissionRules(queue_s_max=1.0, wait_s_max=30.0, low_share_min=0.0)


def pool(name: str = "p", in_flight_max: int = 1, **changes: object) -> Pool:
    """One millisecond a prompt token, so that a prompt of 1000 tokens takes a second."""
    made = Pool(
        name=PoolName(name),
        model=M,
        role=Role.BOTH,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.NONE, None),
        speed=SpeedFigures(0.0, 1e-3, 0.0),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=0.0,
        limits=PoolLimits(in_flight_max=in_flight_max),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


class Story:
    """A coordinator over one endpoint of each pool; what was said of each request, in order."""

    def __init__(self, *pools: Pool, rules: AdmissionRules = RULES, slo: Slo | None = None) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator()
        self.model = Model(M, pools or (pool(),), admission=rules, slo=slo or Slo())
        self.said: dict[str, list[str]] = {}
        self.order: list[str] = []
        self.refusals: dict[str, Refusal] = {}
        self.tell(ModelsReplaced((self.model,)))
        for each in self.model.pools:
            self.ready(each)

    def ready(self, of: Pool) -> None:
        endpoint = Endpoint(EndpointId(f"{of.name}/0"), of, HostPort(f"{of.name}:80"))
        self.tell(EndpointSeen(endpoint))
        self.tell(SampleTaken(endpoint.id, Sample(0, 0, 0.1, self.now_s)))

    def tell(self, event: object) -> list[Action]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        for action in actions:
            said = self.said.setdefault(action.id, [])
            match action:
                case Dispatch(plan):
                    said.append(f"go {plan.decode.pool.name}")
                    self.order.append(action.id)
                case Refuse(_, refusal):
                    said.append(refusal.reason)
                    self.refusals[action.id] = refusal
                case Wait():
                    said.append("wait")
        return actions

    def ask(self, name: str, tokens: int = 1_000, **changes: object) -> str:
        """The first that is said of a new request."""
        request = Request(RequestId(name), M, tokens, output_tokens_max=0)
        self.tell(RequestArrived(replace(request, **changes)))  # type: ignore[arg-type]
        return self.said[name][0]

    def begin(self, name: str) -> None:
        self.tell(ResponseBegan(RequestId(name), None))

    def end(self, name: str) -> None:
        self.tell(RequestEnded(RequestId(name), Outcome.OK))

    def pass_time(self, seconds: float) -> None:
        """Up to a moment, with every TimePassed on the way that the coordinator wants."""
        until_s = self.now_s + seconds
        for _ in range(100_000):
            next_s = self.coordinator.next_event_s()
            if next_s is None or next_s > until_s:
                self.now_s = until_s
                return
            self.now_s = max(self.now_s, next_s)
            self.tell(TimePassed())
        raise AssertionError(f"time stands still at {self.now_s} s")


def test_with_room_a_request_goes_at_once() -> None:
    story = Story()
    assert story.ask("a") == "go p"
    assert story.coordinator.admission.next_event_s() is None


def test_at_the_limit_requests_wait_and_follow_one_another() -> None:
    story = Story()
    assert [story.ask("a"), story.ask("b"), story.ask("c")] == ["go p", "wait", "wait"]
    story.pass_time(0.1)
    story.end("a")
    assert story.said == {"a": ["go p"], "b": ["wait", "go p"], "c": ["wait"]}
    story.pass_time(0.1)
    story.end("b")
    assert story.said["c"] == ["wait", "go p"]
    assert story.coordinator.admission.next_event_s() is None


def test_saturation_is_predicted_time_and_not_a_count() -> None:
    many, few = Story(pool(in_flight_max=64)), Story(pool(in_flight_max=64))
    assert {many.ask(f"r{i}", tokens=10) for i in range(60)} == {"go p"}
    assert [few.ask("a", tokens=5_000), few.ask("b", tokens=10)] == ["go p", "wait"]
    few.pass_time(3.9)
    assert few.said["b"] == ["wait"]
    few.pass_time(0.2)
    assert few.said["b"] == ["wait", "go p"], "by then less than a second of work is left"


def test_where_nobody_may_wait_the_engines_queue_and_limits_mean_saturated() -> None:
    story = Story(pool(in_flight_max=2), rules=replace(RULES, wait_s_max=0.0))
    assert [story.ask("a", tokens=9_000), story.ask("b"), story.ask("c")] == ["go p", "go p", "saturated"]


def test_higher_priority_overtakes_lower() -> None:
    story = Story()
    story.ask("a")
    for name, priority in (("low", 0), ("high", 5), ("mid", 3), ("high2", 5)):
        story.ask(name, priority=priority)
    for _ in range(4):
        story.pass_time(0.1)
        story.end(story.order[-1])
    assert story.order == ["a", "high", "high2", "mid", "low"]


def test_below_zero_a_request_is_shed_where_others_wait() -> None:
    story = Story()
    assert story.ask("first", priority=-1) == "go p"
    assert story.ask("second", priority=-1) == "shed"
    assert story.ask("third") == "wait"
    story.pass_time(0.1)
    assert story.ask("fourth", priority=-1) == "shed"
    assert story.refusals["fourth"].retry_after_s == 1


def test_a_wait_ends_when_it_has_been_too_long() -> None:
    story = Story(rules=replace(RULES, wait_s_max=5.0))
    story.ask("a")
    story.ask("b", tokens=3_000)
    story.pass_time(4.99)
    assert story.said["b"] == ["wait"]
    story.pass_time(0.02)
    assert story.said["b"] == ["wait", "waited-too-long"]
    assert story.coordinator.live_count == 1


def test_a_deadline_that_cannot_be_met_is_not_started() -> None:
    story = Story(rules=replace(RULES, deadline_excess_max=0.5))
    assert story.ask("hopeless", slo=Slo(ttft_s=0.6)) == "deadline"
    assert story.ask("just", slo=Slo(ttft_s=0.7)) == "go p"
    assert story.ask("soft") == "wait"


def test_now_and_then_one_goes_though_its_deadline_seems_lost() -> None:
    """Who is refused teaches nothing: an endpoint that was slow once would be slow for ever."""
    story = Story(rules=replace(RULES, deadline_excess_max=0.0))
    assert story.ask("a", slo=Slo(ttft_s=0.6)) == "deadline"
    story.pass_time(TRIAL_S - 0.1)
    assert story.ask("b", slo=Slo(ttft_s=0.6)) == "deadline"
    story.pass_time(0.2)
    assert story.ask("c", slo=Slo(ttft_s=0.6)) == "go p"
    story.end("c")
    assert story.ask("d", slo=Slo(ttft_s=0.6)) == "deadline"


def test_a_deadline_that_passes_while_waiting_ends_the_wait() -> None:
    story = Story(rules=replace(RULES, deadline_excess_max=0.0))
    story.ask("a")
    story.ask("b", slo=Slo(ttft_s=2.0))
    story.pass_time(1.5)
    story.end("a")
    assert story.said["b"] == ["wait", "deadline"], "half a second is left, and a second is needed"
    story.ask("c")
    story.ask("d", slo=Slo(ttft_s=2.0))
    story.pass_time(2.1)
    assert story.said["d"] == ["wait", "deadline"]


def test_the_models_own_objective_refuses_nobody_but_the_sheddable() -> None:
    story = Story(slo=Slo(ttft_s=0.1))
    assert story.ask("a", priority=-1) == "deadline"
    assert story.ask("b") == "go p"


def test_within_a_tenant_who_is_due_first_goes_first() -> None:
    story = Story()
    story.ask("a", tokens=1)
    story.ask("b")
    story.ask("c", slo=Slo(ttft_s=9.0))
    story.ask("d", slo=Slo(ttft_s=8.0))
    for _ in range(3):
        story.pass_time(0.1)
        story.end(story.order[-1])
    assert story.order == ["a", "d", "c", "b"]


def test_a_full_queue_refuses_the_newcomer_of_the_same_tenant() -> None:
    story = Story(rules=replace(RULES, requests_max=2))
    assert [story.ask(name) for name in "abcd"] == ["go p", "wait", "wait", "queue-full"]
    assert story.refusals["d"].retry_after_s == 2


def test_who_floods_a_full_queue_gives_way_to_who_does_not() -> None:
    story = Story(rules=replace(RULES, requests_max=3))
    story.ask("a")
    for name in ("f1", "f2", "f3"):
        story.ask(name, tenant="flood")
    assert story.ask("s1", tenant="small") == "wait"
    assert story.said["f3"] == ["wait", "shed"]
    assert story.ask("f4", tenant="flood") == "queue-full"
    assert story.ask("s2", tenant="small") == "queue-full", "it would have as much as the flood then"


def test_a_higher_priority_takes_the_place_of_the_last_of_the_lowest() -> None:
    story = Story(rules=replace(RULES, requests_max=2))
    story.ask("a")
    story.ask("low1")
    story.ask("low2")
    assert story.ask("high", priority=1) == "wait"
    assert (story.said["low1"], story.said["low2"]) == (["wait"], ["wait", "shed"])
    assert story.ask("low3") == "queue-full"


def test_who_would_wait_too_long_is_told_at_once_and_others_floods_do_not_count() -> None:
    story = Story(rules=replace(RULES, wait_s_max=5.0))
    story.ask("a")
    said = [story.ask(f"f{i}", tenant="flood") for i in range(10)]
    assert said == ["wait"] * 6 + ["queue-full"] * 4
    assert 5 <= (story.refusals["f9"].retry_after_s or 0) <= 60
    assert story.ask("s", tenant="small") == "wait"


def test_who_leaves_gives_the_place_up() -> None:
    story = Story(rules=replace(RULES, requests_max=1))
    assert [story.ask("a"), story.ask("b"), story.ask("c")] == ["go p", "wait", "queue-full"]
    story.end("b")
    assert story.ask("d") == "wait"
    story.pass_time(0.1)
    story.end("a")
    assert story.said["d"] == ["wait", "go p"]


def test_what_can_never_be_served_does_not_wait() -> None:
    story = Story(pool(limits=PoolLimits(in_flight_max=1, context_tokens_max=2_000)))
    story.ask("a")
    story.ask("b")
    assert story.ask("c", tokens=3_000, is_prompt_counted=True) == "context-too-long"


def test_those_who_wait_outlive_an_endpoint_and_a_policy_but_not_their_model() -> None:
    story = Story()
    story.ask("a")
    story.ask("b")
    story.tell(EndpointGone(EndpointId("p/0")))
    story.end("a")
    story.pass_time(1.0)
    assert story.said["b"] == ["wait"]
    story.tell(ModelsReplaced((story.model,)))
    story.ready(pool())
    story.pass_time(admission.RETRY_S_MIN)
    assert story.said["b"] == ["wait", "go p"]
    story.ask("c")
    story.tell(ModelsReplaced(()))
    assert story.said["c"] == ["wait", "model-unknown"]


def test_work_per_event_is_bounded_and_what_is_left_follows_at_once() -> None:
    story = Story(pool(in_flight_max=100), rules=replace(RULES, queue_s_max=0.5))
    story.ask("big", tokens=2_000)
    count = 3 * admission.TRIES_MAX
    for index in range(count):
        story.ask(f"r{index}", tokens=1)
    story.pass_time(0.1)
    story.begin("big")
    assert len(story.order) == 1 + admission.TRIES_MAX
    assert story.coordinator.admission.next_event_s() == story.now_s
    story.pass_time(0.0)
    assert len(story.order) == 1 + count


def test_after_a_try_in_vain_events_are_not_followed_by_others() -> None:
    story = Story(pool(in_flight_max=100))
    story.ask("big", tokens=9_000)
    story.ask("b")
    tried_s = story.now_s = 1.0
    for _ in range(5):
        story.tell(SampleTaken(EndpointId("p/0"), Sample(1, 0, 0.1, 1.0)))
    next_s = story.coordinator.admission.next_event_s()
    assert next_s is not None
    assert next_s == pytest.approx(tried_s + admission.RETRY_S_MIN)


def test_a_pool_for_low_priorities_takes_them_first_and_others_only_in_need() -> None:
    old, new = pool("old", 64, speed=SpeedFigures(0.0, 2e-3, 0.0), priority_max=0), pool("new", 64)
    story = Story(old, new, slo=Slo(ttft_s=3.0), rules=replace(RULES, queue_s_max=9.0))
    assert [story.ask("low1", priority=-5), story.ask("high1", priority=1)] == ["go old", "go new"]
    assert story.ask("low2") == "go new", "on the old pool it would be past the objective"
    assert story.ask("more", priority=1) == "go new"
    assert story.ask("high2", tokens=100, priority=1) == "go old", "the new pool would be past it"


def test_without_objectives_the_pool_is_preferred_while_nobody_would_wait() -> None:
    old, new = pool("old", 64, speed=SpeedFigures(0.0, 1.5e-3, 0.0), priority_max=0), pool("new", 64)
    story = Story(old, new)
    assert story.ask("a", tokens=500) == "go old"
    assert story.ask("b", tokens=500) == "go new"


arrivals = st.tuples(
    st.floats(0.0, 0.5),
    st.sampled_from([1, 100, 900, 3_000]),
    st.sampled_from(["flood", "flood", "flood", "small"]),
    st.sampled_from([0, 0, 5, -1]),
    st.sampled_from([None, None, 0.5, 4.0]),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    asked=st.lists(arrivals, min_size=1, max_size=40),
    rules=st.builds(
        AdmissionRules,
        queue_s_max=st.sampled_from([0.0, 0.3, 2.0]),
        wait_s_max=st.sampled_from([0.0, 2.0, 30.0]),
        requests_max=st.sampled_from([1, 5, 1_000]),
        low_share_min=st.sampled_from([0.0, 0.2]),
    ),
    in_flight_max=st.sampled_from([1, 3]),
)
def test_every_wait_ends_once_and_within_its_bound(
    asked: list[tuple[float, int, str, int, float | None]], rules: AdmissionRules, in_flight_max: int
) -> None:
    story = Story(pool(in_flight_max=in_flight_max), rules=rules)
    began_s: dict[str, float] = {}
    arrived_s: dict[str, float] = {}

    def settle(until_s: float) -> None:
        """Step by step; whoever was sent ends after a second."""
        while story.now_s < until_s:
            story.pass_time(min(0.25, until_s - story.now_s))
            for name in [name for name in story.order if name not in began_s]:
                assert story.now_s - arrived_s[name] <= rules.wait_s_max + 0.25 + 1e-6
                began_s[name] = story.now_s
            for name in [name for name, at_s in began_s.items() if at_s <= story.now_s - 1.0]:
                began_s[name] = float("inf")
                story.end(name)

    for index, (gap_s, tokens, tenant, priority, ttft_s) in enumerate(asked):
        settle(story.now_s + gap_s)
        arrived_s[f"r{index}"] = story.now_s
        story.ask(f"r{index}", tokens=tokens, tenant=tenant, priority=priority, slo=Slo(ttft_s=ttft_s))
    settle(story.now_s + 60.0)
    for name, said in story.said.items():
        assert len(said) == (2 if said[0] == "wait" else 1), f"{name}: {said}"
        assert said[-1] != "wait"
    assert story.coordinator.live_count == 0
    assert story.coordinator.admission.next_event_s() is None
    reasons = {refusal.reason for refusal in story.refusals.values()}
    assert reasons <= {
        RefuseReason.SATURATED,
        RefuseReason.QUEUE_FULL,
        RefuseReason.WAITED_TOO_LONG,
        RefuseReason.DEADLINE,
        RefuseReason.SHED,
    }
