"""Requests whose endpoint failed and streams that broke off: who takes over, within which bounds, and what
the accounts say."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    StreamBroke,
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
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, Model, SplitMode
from pdcoord.core.observations import Observation, OutputSeen, StepsSeen
from pdcoord.core.plan import DropReason, Plan, Why
from pdcoord.core.request import Request, RequestId
from pdcoord.core.resumes import RESUMES_MAX
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M, R = ModelName("m"), RequestId("r")
RUNGS = Fallback().rungs


def pool(name: str, role: Role, **changes: Any) -> Pool:
    fast, slow = SpeedFigures(0.01, 1e-4, 0.01), SpeedFigures(0.01, 1e-3, 0.01)
    made = Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=fast if role is Role.PREFILL else slow,
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )
    return replace(made, **changes)


P, D, BOTH = pool("p", Role.PREFILL), pool("d", Role.DECODE), pool("b", Role.BOTH)
MODEL = Model(M, (P, D), admission=AdmissionRules(wait_s_max=0.0))


class Story:
    """One request after another at a coordinator that is validated after each event."""

    def __init__(self, model: Model = MODEL, **counts: int) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator()
        self.tell(ModelsReplaced((model,)))
        for of in model.pools:
            for index in range(counts.get(of.name, 2)):
                made = Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))
                self.tell(EndpointSeen(made))
                self.sample(made.id)

    def restart(self, endpoint: Endpoint) -> None:
        """As the pod of a set is: it comes back under the same name and address."""
        self.tell(EndpointDraining(endpoint.id))
        self.tell(EndpointGone(endpoint.id))
        self.tell(EndpointSeen(endpoint))
        self.sample(endpoint.id)

    def sample(self, name: str, kv_usage: float = 0.1) -> None:
        self.tell(SampleTaken(EndpointId(name), Sample(0, 0, kv_usage, self.now_s)))

    def tell(self, event: object) -> list[Action]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions

    def send(self, name: str = "r", tokens: int = 4_000, **changes: Any) -> Plan:
        request = replace(Request(RequestId(name), M, prompt_tokens=tokens), **changes)
        return self.planned(self.tell(RequestArrived(request)))

    def begin(self, name: str = "r", tokens: int = 4_000, **changes: Any) -> Plan:
        plan = self.send(name, tokens, **changes)
        self.answer(plan)
        return plan

    def failed(
        self, name: str = "r", reason: RungReason = RungReason.DECODE_ERROR, *, is_final: bool = False
    ) -> Plan | Refusal:
        (action,) = self.tell(DecodeFailed(RequestId(name), reason, is_final=is_final))
        return action.plan if isinstance(action, Dispatch) else self.refused(action)

    def answer(self, plan: Plan) -> None:
        prefill = plan.prefill.address if plan.prefill is not None else None
        self.tell(ResponseBegan(plan.request_id, ServedHeader(mode=plan.mode, prefill=prefill)))

    def broke(
        self, tokens: int, name: str = "r", reason: RungReason = RungReason.DECODE_ERROR
    ) -> Plan | Refusal:
        (action,) = self.tell(StreamBroke(RequestId(name), reason, tokens))
        return action.plan if isinstance(action, Dispatch) else self.refused(action)

    def went_on(self, tokens: int, name: str = "r", reason: RungReason = RungReason.DECODE_ERROR) -> Plan:
        found = self.broke(tokens, name, reason)
        assert isinstance(found, Plan), found
        return found

    def lost(self, tokens: int = 10, name: str = "r") -> str:
        found = self.broke(tokens, name)
        assert isinstance(found, Refusal), found
        assert found.reason is RefuseReason.STREAM_LOST
        assert self.coordinator.ledger.open_count == 0
        return found.message

    @staticmethod
    def planned(actions: list[Action]) -> Plan:
        (action,) = actions
        assert isinstance(action, Dispatch), action
        return action.plan

    @staticmethod
    def refused(action: Action) -> Refusal:
        assert isinstance(action, Refuse)
        return action.refusal


def prompt_of(plan: Plan) -> int:
    return plan.chosen.figures.cached_tokens + plan.chosen.figures.uncached_tokens


# Before the first output.


def test_a_failed_decode_is_followed_by_another_and_then_by_the_end() -> None:
    story = Story(d=4)
    tried = [story.send().decode.id]
    for attempt in (1, 2):
        found = story.failed()
        assert isinstance(found, Plan)
        assert found.attempt == attempt
        assert found.drops[DropReason.EXCLUDED] == attempt
        tried.append(found.decode.id)
    refusal = story.failed()
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.retry_after_s) == (RefuseReason.LADDER_EXHAUSTED, 1)
    assert len(set(tried)) == 3
    assert story.coordinator.live_count == story.coordinator.ledger.open_count == 0


def test_without_the_rung_no_other_decode_is_tried() -> None:
    story = Story(replace(MODEL, fallback=Fallback(rungs=(RungKind.OTHER_PREFILL,))))
    assert [rung.kind for rung in story.send().rungs] == [RungKind.OTHER_PREFILL]
    assert isinstance(story.failed(), Refusal)


def test_a_failure_that_is_final_ends_the_request_though_others_could_take_it() -> None:
    story = Story()
    plan = story.send()
    refusal = story.failed(reason=RungReason.DECODE_UNREACHABLE, is_final=True)
    assert isinstance(refusal, Refusal)
    assert refusal.reason is RefuseReason.LADDER_EXHAUSTED
    assert story.coordinator.ledger.open_count == story.coordinator.live_count == 0
    state = story.coordinator.fleet.get(plan.decode.id)
    assert state is not None
    assert state.health is Health.UNREACHABLE


def test_a_decode_endpoint_that_nobody_answers_at_gets_no_work_until_it_does() -> None:
    story = Story()
    first = story.send("a").decode
    found = story.failed("a", RungReason.DECODE_UNREACHABLE)
    assert isinstance(found, Plan)
    assert found.decode != first
    assert all(story.send(f"r{i}").decode != first for i in range(5))
    state = story.coordinator.fleet.get(first.id)
    assert state is not None
    assert state.health is Health.UNREACHABLE
    story.sample(first.id)
    assert story.send("later").decode == first


# Streams.


def test_what_is_left_of_a_stream_goes_elsewhere_with_what_it_has_as_prompt() -> None:
    story = Story()
    first = story.begin()
    plan = story.went_on(500)
    assert plan.decode.id != first.decode.id
    assert (plan.attempt, prompt_of(plan)) == (1, 4_500)
    ledger = story.coordinator.ledger
    assert ledger.load(first.decode.id).is_empty
    assert ledger.load(plan.decode.id).context_tokens == 4_500
    assert ledger.open_count == story.coordinator.live_count == 1
    story.answer(plan)
    story.tell(RequestEnded(R, Outcome.OK, 600))
    assert ledger.open_count == story.coordinator.live_count == 0


def test_tokens_are_counted_from_the_streams_beginning_however_often_it_breaks() -> None:
    story = Story(d=4)
    story.begin()
    assert prompt_of(story.went_on(100)) == 4_100
    plan = story.coordinator.bookings.live[R].plan  # the plan that is in force
    story.answer(plan)
    assert prompt_of(story.went_on(250)) == 4_250


def test_a_continuation_that_fails_is_one_more_try_and_no_more() -> None:
    story = Story(d=5)
    tried = [story.begin().decode.id, story.went_on(100).decode.id]
    for _ in range(2):
        (action,) = story.tell(DecodeFailed(R, RungReason.DECODE_UNREACHABLE))
        tried.append(story.planned([action]).decode.id)
    (action,) = story.tell(DecodeFailed(R, RungReason.DECODE_UNREACHABLE))
    refusal = story.refused(action)
    assert refusal.reason is RefuseReason.STREAM_LOST
    assert "3 continuations" in refusal.message
    assert len(set(tried)) == 4
    assert story.coordinator.ledger.open_count == 0
    state = story.coordinator.fleet.get(tried[1])
    assert state is not None
    assert state.health is Health.UNREACHABLE


def test_an_old_stream_is_not_continued() -> None:
    story = Story(replace(MODEL, fallback=Fallback(resume_age_s_max=60.0)))
    story.begin()
    story.now_s = 61.0
    assert "60 s" in story.lost()


def test_without_the_rung_none_is() -> None:
    rungs = tuple(kind for kind in RUNGS if kind is not RungKind.RESUME)
    story = Story(replace(MODEL, fallback=Fallback(rungs=rungs)))
    story.begin()
    assert story.coordinator.silence_s_max(R, 0.0) is None
    assert "no resume" in story.lost()


def test_with_nobody_else_it_is_lost_and_says_so() -> None:
    story = Story(d=1)
    story.begin()
    assert story.coordinator.silence_s_max(R, 0.0) is None, "it has to be waited for"
    assert "no-endpoints" in story.lost()


def test_where_everybody_failed_it_the_first_is_asked_again() -> None:
    """A connection that was cut is no dead process; within the policy's tries."""
    story = Story(d=2)
    plan = story.begin()
    tried = [plan.decode.id]
    for count in range(3):
        plan = story.went_on(10 * (count + 1))
        tried.append(plan.decode.id)
        story.answer(plan)
    assert tried == ["d/0", "d/1", "d/0", "d/1"]
    assert "3 continuations" in story.lost(500)


def test_who_failed_it_and_is_gone_is_not() -> None:
    story = Story(d=2)
    first = story.begin()
    story.answer(story.went_on(10))
    story.tell(EndpointGone(first.decode.id))
    assert "no-endpoints" in story.lost(500)


def test_a_model_that_is_gone_by_then_ends_it() -> None:
    story = Story()
    story.begin()
    story.tell(ModelsReplaced(()))
    assert "no longer served" in story.lost()


def test_the_streams_of_a_pod_that_died_find_place_where_no_new_request_does() -> None:
    full = replace(D, limits=PoolLimits(in_flight_max=2))
    story = Story(replace(MODEL, pools=(full,)))
    for index in range(4):
        story.begin(f"r{index}", block_keys=())
    on_first = [
        n for n, live in story.coordinator.bookings.live.items() if live.plan.decode.id == "d/0"
    ]  # who is where
    assert len(on_first) == 2
    (action,) = story.tell(RequestArrived(Request(RequestId("new"), M, prompt_tokens=10)))
    assert story.refused(action).reason is RefuseReason.SATURATED
    story.tell(EndpointDraining(EndpointId("d/0")))
    for name in on_first:
        assert story.went_on(10, name).decode.id == "d/1"
    assert story.coordinator.ledger.load(EndpointId("d/1")).decode_count == 4


# Endpoints that come back.


def test_decode_endpoints_that_are_restarted_in_turn_lose_no_stream() -> None:
    """However often: a drain is no failure, and what comes back has failed nothing."""
    story = Story(d=2)
    plan = story.begin()
    for count in range(1, RESUMES_MAX + 1):
        left = plan.decode
        story.tell(EndpointDraining(left.id))
        plan = story.went_on(10 * count)
        assert plan.decode.id != left.id
        story.answer(plan)
        story.restart(left)
    story.tell(EndpointDraining(plan.decode.id))
    assert f"{RESUMES_MAX} times" in story.lost(500)


def test_a_drain_that_is_called_off_leaves_the_endpoint_fit() -> None:
    story = Story(d=2)
    first = story.begin()
    story.tell(EndpointDraining(first.decode.id))
    second = story.went_on(10)
    story.answer(second)
    story.tell(EndpointSeen(first.decode))
    story.sample(first.decode.id)
    assert story.went_on(20).decode.id == first.decode.id


def test_drains_leave_the_tries_of_failures_to_them() -> None:
    story = Story(replace(MODEL, fallback=Fallback(resume_tries_max=1)), d=4)
    for count in range(2):
        plan = story.went_on(10 * count) if count else story.begin()
        if count:
            story.answer(plan)
        story.tell(EndpointDraining(plan.decode.id))
    story.answer(story.went_on(20))
    story.answer(story.went_on(30))
    assert "1 continuations" in story.lost(40)


def test_an_endpoint_that_says_it_drains_gets_nothing_more_and_has_failed_nothing() -> None:
    story = Story(d=2)
    first = story.begin()
    story.answer(story.went_on(10))
    (action,) = story.tell(RequestArrived(Request(RequestId("new"), M, prompt_tokens=10)))
    drained = story.planned([action]).decode
    (action,) = story.tell(DecodeFailed(RequestId("new"), RungReason.DECODE_DRAINING))
    assert story.planned([action]).decode.id != drained.id
    state = story.coordinator.fleet.get(drained.id)
    assert state is not None
    assert (state.health, state.is_leaving) == (Health.UNREACHABLE, True)
    assert not story.coordinator.bookings.live[RequestId("new")].failed_decodes  # what it is barred from
    story.sample(drained.id)
    state = story.coordinator.fleet.get(drained.id)
    assert state is not None
    assert (state.health, state.is_leaving) == (Health.READY, False)
    assert first.decode.id in {"d/0", "d/1"}


def test_an_endpoint_that_failed_a_stream_is_another_once_it_was_away() -> None:
    story = Story(d=2)
    first = story.begin()
    second = story.went_on(10)
    story.answer(second)
    story.sample(first.decode.id)
    assert story.coordinator.silence_s_max(R, 0.0) is None, "it is the process that failed"
    for _ in range(2):
        story.tell(SampleFailed(first.decode.id, "refused"))
    story.sample(first.decode.id)
    assert story.coordinator.silence_s_max(R, 0.0) is not None
    assert story.went_on(20).decode.id == first.decode.id


def test_an_endpoint_that_failed_a_stream_is_another_at_another_address() -> None:
    story = Story(d=2)
    first = story.begin()
    story.answer(story.went_on(10))
    story.tell(EndpointSeen(replace(first.decode, address=HostPort("d-new:80"))))
    story.sample(first.decode.id)
    assert story.went_on(20).decode.address == "d-new:80"


def test_an_endpoint_that_failed_a_stream_does_not_get_it_again_while_there_is_another() -> None:
    story = Story(d=3)
    plans = [story.begin()]
    for tokens in (10, 20):
        plans.append(story.went_on(tokens))
        story.answer(plans[-1])
    assert len({plan.decode.id for plan in plans}) == 3


# The budget.


def local(**changes: Any) -> Model:
    """A fleet on which a continuation is computed where it goes on, since nobody prefills for it."""
    return replace(MODEL, **changes)


def test_a_continuation_computed_where_it_decodes_counts_as_a_fallback() -> None:
    story = Story(local(fallback=Fallback(window=4)))
    story.begin()
    for index in range(2):
        story.tell(EndpointDraining(EndpointId(f"p/{index}")))
    assert story.went_on(10).mode is Mode.COLOCATED
    assert story.coordinator.budgets[M]._recent[-1]  # what was noted last


def test_streams_that_break_at_one_moment_do_not_all_have_leave() -> None:
    rules = Fallback(window=4, colocated_share_max=0.5)
    story = Story(local(fallback=rules), d=3)
    names = [f"r{index}" for index in range(8)]
    for name in names:
        story.begin(name)
    for index in range(2):
        story.tell(EndpointDraining(EndpointId(f"p/{index}")))
    found = [story.broke(10, name) for name in names]
    served = [each for each in found if isinstance(each, Plan)]
    assert 0 < len(served) < len(names)
    assert all(each.reason is RefuseReason.STREAM_LOST for each in found if isinstance(each, Refusal))
    assert story.coordinator.budgets[M].refused_count == len(names) - len(served)


def test_without_leave_it_is_split_where_it_can_be() -> None:
    """Though computing it on the spot would be faster."""
    quick = replace(D, speed=SpeedFigures(0.001, 1e-5, 0.01))
    rules = Fallback(rungs=(RungKind.RESUME,))
    story = Story(replace(MODEL, pools=(P, quick), fallback=rules))
    assert story.begin().why is Why.COLOCATED_FASTER
    plan = story.went_on(10)
    assert (plan.mode, plan.why, plan.is_outage) == (Mode.SPLIT, Why.SPLIT_ONLY_WAY, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"pools": (BOTH,)},
        {"disaggregation": Disaggregation(mode=SplitMode.NEVER)},
    ],
)
def test_where_nobody_prefills_for_others_no_leave_is_needed(changes: dict[str, Any]) -> None:
    rules = Fallback(rungs=(RungKind.RESUME,), colocated_share_max=0.0)
    story = Story(replace(MODEL, fallback=rules, **changes))
    story.begin()
    assert story.went_on(10).mode is Mode.COLOCATED


# What is learned.


class Notes:
    """Keeps what would be learned."""

    def __init__(self, story: Story) -> None:
        self.seen: list[Observation] = []
        story.coordinator._speed.learn = self.seen.append  # type: ignore[assignment,method-assign]  # a spy

    def of(self, kind: type) -> list[Observation]:
        return [each for each in self.seen if isinstance(each, kind)]


def test_an_answers_length_is_all_of_it_and_its_steps_those_of_the_last_endpoint() -> None:
    story = Story()
    notes = Notes(story)
    story.begin()
    story.now_s = 5.0
    plan = story.went_on(500)
    story.now_s = 6.0
    story.answer(plan)
    story.now_s = 7.0
    story.tell(RequestEnded(R, Outcome.OK, 600))
    assert notes.of(OutputSeen) == [OutputSeen(M, "", 600)]
    (steps,) = notes.of(StepsSeen)
    assert isinstance(steps, StepsSeen)
    assert (steps.endpoint.id, steps.step_count) == (plan.decode.id, 99)


def test_a_stream_beside_a_long_prompt_is_waited_for_longer() -> None:
    story = Story(replace(MODEL, pools=(D,)), d=2)
    story.begin()
    usual_s = story.coordinator.silence_s_max(R, 0.0)
    assert usual_s is not None
    for index in range(4):
        story.tell(RequestArrived(Request(RequestId(f"long{index}"), M, prompt_tokens=50_000)))
    later_s = story.coordinator.silence_s_max(R, 0.0)
    assert later_s is not None
    assert later_s > usual_s + 50.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500)), max_size=30))
def test_whatever_breaks_every_account_is_closed(steps: list[tuple[int, int]]) -> None:
    story = Story(d=3)
    live: dict[str, Plan] = {}
    tokens: Counter[str] = Counter()
    for index, (kind, more) in enumerate(steps):
        name = next(iter(live), "")
        if kind == 0 or not name:
            live[f"r{index}"] = story.begin(f"r{index}", tokens=1_000)
        elif kind == 1:
            story.tell(RequestEnded(RequestId(name), Outcome.CLIENT_GONE, tokens[name]))
            del live[name]
        else:
            tokens[name] += more
            found = story.broke(tokens[name], name)
            del live[name]
            if isinstance(found, Plan):
                live[name] = found
                story.answer(found)
    for name in live:
        story.tell(RequestEnded(RequestId(name), Outcome.OK, tokens[name]))
    assert story.coordinator.ledger.open_count == story.coordinator.live_count == 0
    assert all(load.is_empty for _, load in story.coordinator.ledger.loads())
