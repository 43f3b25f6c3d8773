"""What requests show of endpoints, told to a coordinator: who is put out, who is spared, who serves."""

from dataclasses import replace

import pytest

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    DecodeFailed,
    Dispatch,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    SidecarReported,
    StreamBroke,
    StreamStalled,
    TimePassed,
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
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.core.plan import DropReason, Figures, Plan
from pdcoord.core.progress import LATE_S_MIN, SLOW_FACTOR, expected_s, late_after_s
from pdcoord.core.request import Request, RequestId
from pdcoord.core.trouble import FAILURES_MAX, Phase, Symptom
from pdcoord.protocol.control import ControlLegKind, Events, LegEnded, OutputBegan, RequestBegan
from pdcoord.protocol.control import RequestEnded as RemoteEnded
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, PlannedLoad, RungKind, RungTaken, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
SPEED = SpeedFigures(0.01, 1e-4, 0.01, step_s_per_sequence=1e-4)
ALONE = ServedHeader(mode=Mode.COLOCATED)


def pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SPEED,
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)
NO_WAIT = AdmissionRules(wait_s_max=0.0)
MODEL = Model(M, (P, D), admission=NO_WAIT)
SPLIT = replace(MODEL, disaggregation=Disaggregation(mode=SplitMode.ALWAYS))


class Story:
    """A coordinator with so many decode and prefill endpoints; validated after each event."""

    def __init__(self, decodes: int = 2, prefills: int = 0, model: Model = MODEL) -> None:
        self.now_s = 0.0
        self.count = 0
        self.coordinator = Coordinator()
        self.tell(ModelsReplaced((model,)))
        for of, count in ((P, prefills), (D, decodes)):
            for index in range(count):
                address = HostPort(f"{of.name}-{index}:80")
                self.tell(EndpointSeen(Endpoint(EndpointId(f"{of.name}/{index}"), of, address)))
        self.sample()

    def tell(self, event: object) -> list[Dispatch | Refuse]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions  # type: ignore[return-value]

    def sample(self) -> None:
        for state in list(self.coordinator.fleet.states()):
            self.tell(SampleTaken(state.endpoint.id, Sample(0, 0, 0.1, self.now_s)))

    def wait(self, seconds: float) -> None:
        """Let time pass as the process's alarm would."""
        until_s = self.now_s + seconds
        while (due_s := self.coordinator.next_event_s()) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.tell(TimePassed())
        self.now_s = until_s

    def send(self, tokens: int = 400, **changes: object) -> Plan:
        self.count += 1
        request = Request(RequestId(f"r{self.count}"), M, prompt_tokens=tokens)
        (action,) = self.tell(RequestArrived(replace(request, **changes)))  # type: ignore[arg-type]
        assert isinstance(action, Dispatch), action
        return action.plan

    def send_to(self, decode: str, prefill: str | None = None, **changes: object) -> Plan:
        """A request that may go nowhere else."""
        names = [decode, *([prefill] if prefill else [])]
        plan = self.send(allowed=frozenset(f"{name.replace('/', '-')}:80" for name in names), **changes)
        assert plan.decode.id == decode
        assert prefill is None or (plan.prefill is not None and plan.prefill.id == prefill)
        return plan

    def begin(self, plan: Plan, served: ServedHeader | None = ALONE) -> None:
        self.tell(ResponseBegan(plan.request_id, served))

    def end(self, plan: Plan, outcome: Outcome = Outcome.OK, tokens: int | None = None) -> None:
        self.tell(RequestEnded(plan.request_id, outcome, tokens))

    def serve(self, plan: Plan) -> None:
        self.wait(0.05)
        self.begin(plan)
        self.wait(0.2)
        self.end(plan)

    def hang(self, decode: str, count: int = FAILURES_MAX) -> None:
        """So many requests that get no output there, and whose clients leave."""
        plans = [self.send_to(decode) for _ in range(count)]
        self.wait(LATE_S_MIN + 0.5)
        for plan in plans:
            self.end(plan, Outcome.CLIENT_GONE)

    def phase(self, name: str) -> Phase | None:
        trouble = self.coordinator.progress.quarantine.trouble(EndpointId(name))
        return trouble.phase if trouble is not None else None

    def symptom(self, name: str) -> Symptom | None:
        trouble = self.coordinator.progress.quarantine.trouble(EndpointId(name))
        return trouble.symptom if trouble is not None and trouble.phase is not Phase.SUSPECTED else None

    def outs(self) -> dict[tuple[str, str], int]:
        return {(str(name), str(why)): n for (name, why), n in self.coordinator.progress.outs.items()}


def figures(ttft_s: float, step_s: float = 0.01, spread_s: float = 0.0) -> Figures:
    return Figures(0.0, ttft_s - step_s, 0.0, step_s, 0.0, 0.0, 0.0, 100, 0, pace_s=step_s, spread_s=spread_s)


def test_late_is_far_beyond_what_was_predicted_and_never_at_once() -> None:
    streamed = Request(RequestId("r"), M, prompt_tokens=10)
    assert late_after_s(streamed, figures(0.1)) == LATE_S_MIN
    assert late_after_s(streamed, figures(2.0)) == 8.0
    assert late_after_s(streamed, figures(2.0, spread_s=1.0)) == 12.0
    whole = replace(streamed, is_streamed=False, output_tokens_max=500)
    assert expected_s(whole, figures(1.0)) == pytest.approx(6.0)
    assert late_after_s(whole, figures(1.0)) == pytest.approx(24.0)
    assert late_after_s(replace(streamed, is_generative=False), figures(1.0)) is None


def test_one_that_accepts_and_never_answers_is_out_before_any_timeout() -> None:
    story = Story()
    plans = [story.send_to("d/0") for _ in range(FAILURES_MAX)]
    story.wait(LATE_S_MIN + 0.5)
    assert (story.phase("d/0"), story.symptom("d/0")) == (Phase.OUT, Symptom.LATE)
    assert story.outs() == {("d", "late"): 1}
    for plan in plans:
        story.end(plan, Outcome.CLIENT_GONE)
    others = [story.send() for _ in range(10)]
    assert {plan.decode.id for plan in others} == {"d/1"}
    assert all(plan.drops[DropReason.QUARANTINED] == 1 for plan in others)


def queueing(story: Story, name: str, kv_usage: float) -> None:
    """An engine's word that requests wait there."""
    story.tell(SampleTaken(EndpointId(name), Sample(3, 2, kv_usage, story.now_s)))


@pytest.mark.parametrize("sign", ["output", "end", "kv"])
def test_a_queue_longer_than_predicted_is_no_fault_of_who_works_on_it(sign: str) -> None:
    story = Story()
    other, *late = [story.send_to("d/0") for _ in range(FAILURES_MAX + 1)]
    if sign == "end":
        story.begin(other)
    story.wait(1.0)
    if sign == "output":
        story.begin(other)
    elif sign == "end":
        story.end(other)
    queueing(story, "d/0", 0.2 if sign == "kv" else 0.1)
    story.wait(LATE_S_MIN)
    assert story.phase("d/0") is None
    story.wait(LATE_S_MIN)
    assert story.phase("d/0") is None
    # Looked at again after as long again: the same reason for ever is none.
    for plan in late:
        story.begin(plan)
    assert story.phase("d/0") is None


def test_who_has_a_queue_and_stands_still_is_out() -> None:
    story = Story()
    story.serve(story.send_to("d/0"))
    for _ in range(FAILURES_MAX):
        story.send_to("d/0")
    for _ in range(3):
        story.wait(0.5)
        queueing(story, "d/0", 0.1)
    story.wait(LATE_S_MIN)
    assert story.symptom("d/0") is Symptom.LATE


def test_who_works_and_says_that_nobody_waits_is_out() -> None:
    story = Story()
    other, *_ = [story.send_to("d/0") for _ in range(FAILURES_MAX + 1)]
    story.wait(1.0)
    story.begin(other)
    story.sample()
    story.wait(LATE_S_MIN)
    assert story.symptom("d/0") is Symptom.LATE


def test_one_that_is_in_time_is_not_suspected_however_many_there_are() -> None:
    story = Story()
    for _ in range(30):
        story.serve(story.send())
    assert story.phase("d/0") is story.phase("d/1") is None
    assert story.coordinator.next_event_s() is None


def test_it_is_let_back_in_when_it_serves_again() -> None:
    story = Story()
    story.hang("d/0")
    story.wait(1.0)
    taken = []
    for _ in range(8):
        plans = [story.send() for _ in range(24)]
        taken.append(sum(plan.decode.id == "d/0" for plan in plans))
        story.wait(0.1)
        for plan in plans:
            story.begin(plan)
        for plan in plans:
            story.end(plan)
        if story.phase("d/0") is not Phase.READMITTING:
            break
    assert taken[:3] == [1, 2, 4]
    assert story.phase("d/0") in {Phase.SUSPECTED, None}


def test_failures_before_any_output_count_and_overload_does_not() -> None:
    story = Story(model=replace(MODEL, fallback=Fallback(other_decode_max=0)))
    for reason in (
        RungReason.DECODE_OVERLOADED,
        RungReason.DECODE_DRAINING,
        RungReason.TARGET_NOT_ALLOWED,
        RungReason.PLAN_REFUSED,
    ):
        for _ in range(FAILURES_MAX):
            story.tell(DecodeFailed(story.send_to("d/0").request_id, reason))
            story.sample()  # Of who said that it drains nothing is asked before it answers again.
    assert story.phase("d/0") is None
    for _ in range(FAILURES_MAX):
        story.tell(DecodeFailed(story.send_to("d/0").request_id, RungReason.DECODE_ERROR))
    assert story.symptom("d/0") is Symptom.ERROR


def test_a_request_that_fails_everywhere_is_no_endpoints_fault() -> None:
    story = Story(decodes=3)
    for _ in range(2):
        plan = story.send()
        for _ in range(3):
            story.tell(DecodeFailed(plan.request_id, RungReason.DECODE_ERROR))
        for name in ("d/0", "d/1", "d/2"):
            story.serve(story.send_to(name))
    assert not story.outs()


@pytest.mark.parametrize(
    ("reason", "symptom"),
    [(RungReason.DECODE_STALLED, Symptom.STALLED), (RungReason.DECODE_ERROR, Symptom.BROKEN_OFF)],
)
def test_streams_that_break_off_or_stand_still(reason: RungReason, symptom: Symptom) -> None:
    story = Story()
    broken = 0
    while broken < FAILURES_MAX:
        plan = story.send()
        story.begin(plan)
        if plan.decode.id != "d/0":
            story.end(plan)
            continue
        broken += 1
        (action,) = story.tell(StreamBroke(plan.request_id, reason, 1))
        assert isinstance(action, Dispatch)
        story.begin(action.plan)
        story.end(action.plan)
    assert story.symptom("d/0") is symptom
    assert story.phase("d/1") is None


def test_a_stream_that_stands_still_and_cannot_go_on_counts_once() -> None:
    story = Story()
    plans = [story.send_to("d/0") for _ in range(FAILURES_MAX)]
    for plan in plans:
        story.begin(plan)
    for _ in range(5):
        story.tell(StreamStalled(plans[0].request_id))
    assert story.phase("d/0") is Phase.SUSPECTED
    for plan in plans[1:]:
        story.tell(StreamStalled(plan.request_id))
    assert story.symptom("d/0") is Symptom.STALLED
    for plan in plans:
        story.end(plan, Outcome.UPSTREAM_ERROR)


def served(plan: Plan, *rungs: RungTaken) -> ServedHeader:
    assert plan.prefill is not None
    return ServedHeader(
        mode=Mode.SPLIT, prefill=plan.prefill.address, rungs=rungs, prefill_ms=20.0, transfer_ms=5.0
    )


def test_a_prefill_endpoint_that_hangs_for_several_is_at_fault_and_they_are_not() -> None:
    story = Story(decodes=2, prefills=2, model=SPLIT)
    for decode in ("d/0", "d/1", "d/0", "d/1"):
        plan = story.send_to(decode, "p/0")
        story.wait(LATE_S_MIN + 0.5)
        story.end(plan, Outcome.CLIENT_GONE)
        good = story.send_to(decode, "p/1")
        story.wait(0.05)
        story.begin(good, served(good))
        story.end(good)
        if story.symptom("p/0"):
            break
    assert story.symptom("p/0") is Symptom.PREFILL
    assert story.symptom("d/0") is story.symptom("d/1") is None
    plans = [story.send() for _ in range(6)]
    assert {plan.prefill.id for plan in plans if plan.prefill} == {"p/1"}


def test_decode_endpoints_are_not_put_out_for_the_one_prefill_endpoint_that_hangs() -> None:
    story = Story(decodes=2, prefills=1, model=SPLIT)
    for _ in range(2 * FAILURES_MAX):
        for decode in ("d/0", "d/1"):
            plan = story.send_to(decode, "p/0")
            story.wait(LATE_S_MIN + 0.5)
            story.end(plan, Outcome.CLIENT_GONE)
    assert not story.outs()


def test_a_prefill_that_fails_for_one_decode_endpoint_is_the_paths_matter() -> None:
    story = Story(decodes=2, prefills=2, model=SPLIT)
    for _ in range(FAILURES_MAX + 2):
        plan = story.send()
        assert plan.prefill is not None
        rung = RungTaken(
            rung=RungKind.COLOCATED, reason=RungReason.PREFILL_TIMEOUT, target=plan.prefill.address
        )
        if plan.decode.id == "d/0" and plan.prefill.id == "p/0":
            story.begin(plan, ServedHeader(mode=Mode.COLOCATED, rungs=(rung,)))
        else:
            story.begin(plan, served(plan))
        story.end(plan)
    assert story.symptom("p/0") is None


def test_steps_far_slower_than_the_pools_put_one_out() -> None:
    story = Story(decodes=3)
    step_s = {"d/0": 0.01 * SLOW_FACTOR * 2.5, "d/1": 0.01, "d/2": 0.01}
    for number in range(90):
        plan = story.send_to(f"d/{number % 3}", output_tokens_max=20)
        story.wait(0.05)
        story.begin(plan)
        story.wait(19 * step_s[plan.decode.id])
        story.end(plan, tokens=20)
        if story.symptom("d/0"):
            break
    assert story.symptom("d/0") is Symptom.SLOW
    assert story.symptom("d/1") is story.symptom("d/2") is None


def test_where_all_who_could_serve_are_out_or_gone_the_suspected_one_serves() -> None:
    story = Story()
    story.hang("d/0")
    assert story.phase("d/0") is Phase.OUT
    story.tell(EndpointGone(EndpointId("d/1")))
    plan = story.send()
    assert plan.decode.id == "d/0"
    story.serve(plan)
    assert story.phase("d/0") is Phase.READMITTING


def test_the_only_one_is_never_out() -> None:
    story = Story(decodes=1)
    for _ in range(3):
        story.hang("d/0")
    assert story.phase("d/0") is Phase.SUSPECTED


def test_a_policy_may_have_none_of_it() -> None:
    story = Story(model=replace(MODEL, fallback=Fallback(quarantine_share_max=0.0)))
    for _ in range(3):
        story.hang("d/0")
    assert story.phase("d/0") is Phase.SUSPECTED


def test_another_process_at_its_place_starts_clear() -> None:
    story = Story()
    story.hang("d/0")
    story.tell(EndpointSeen(Endpoint(EndpointId("d/0"), D, HostPort("elsewhere:80"))))
    assert story.phase("d/0") is None


class Sidecar:
    """What another coordinator's requests at d/0 are told as."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.ordinal = 0

    def tell(self, *events: object) -> None:
        self.story.tell(SidecarReported(HostPort("d-0:80"), "e", Events(events)))  # type: ignore[arg-type]

    def begin(self) -> int:
        self.ordinal += 1
        self.tell(RequestBegan(self.ordinal, PlannedLoad(model=M, prompt_tokens=10)))
        return self.ordinal

    def leg_ended(self, ordinal: int, outcome: str) -> None:
        self.tell(LegEnded(ordinal, 1, ControlLegKind.DECODE, None, outcome, 1.0))

    def end(self, ordinal: int, outcome: str) -> None:
        self.tell(RemoteEnded(ordinal, outcome))


def test_what_sidecars_tell_of_others_requests_counts_as_well() -> None:
    story = Story()
    sidecar = Sidecar(story)
    for _ in range(FAILURES_MAX):
        ordinal = sidecar.begin()
        sidecar.leg_ended(ordinal, RungReason.DECODE_TIMEOUT)
        sidecar.end(ordinal, "refused")
    assert story.symptom("d/0") is Symptom.TIMEOUT


def test_others_streams_that_break_off_count_and_those_that_end_well_make_good() -> None:
    story = Story()
    sidecar = Sidecar(story)
    for outcomes in (["broken-off", "served"] * FAILURES_MAX, ["broken-off"] * FAILURES_MAX):
        assert story.phase("d/0") in {None, Phase.SUSPECTED}
        for outcome in outcomes:
            ordinal = sidecar.begin()
            sidecar.tell(OutputBegan(ordinal, ALONE))
            if outcome != "served":
                sidecar.leg_ended(ordinal, RungReason.DECODE_ERROR)
            sidecar.end(ordinal, outcome)
    assert story.symptom("d/0") is Symptom.BROKEN_OFF


def test_a_policy_with_objectives_has_no_bearing_on_what_is_late() -> None:
    story = Story(model=replace(MODEL, slo=Slo(ttft_s=0.1)))
    plan = story.send()
    story.wait(LATE_S_MIN / 2)
    story.begin(plan)
    story.end(plan)
    assert story.phase(plan.decode.id) is None


def test_a_continuation_that_drew_other_tokens_is_no_endpoints_fault() -> None:
    story = Story()
    for _ in range(2 * FAILURES_MAX):
        plan = story.send()
        story.begin(plan)
        (action,) = story.tell(StreamBroke(plan.request_id, RungReason.DECODE_DIVERGED, 1))
        assert isinstance(action, Dispatch)
        assert action.plan.decode.id != plan.decode.id, "for this request it is another's turn"
        story.begin(action.plan)
        story.end(action.plan)
    assert not story.outs()
