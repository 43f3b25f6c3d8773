"""Second attempts: who gets one, how often, and how the accounts of two become one."""

from dataclasses import replace

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    DecodeFailed,
    Dispatch,
    HedgeAsked,
    HedgeOver,
    ModelsReplaced,
    Outcome,
    Refuse,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
    TimePassed,
)
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Health,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.hedging import exclusions, id_of
from pdcoord.core.ladder import BUDGET_SAMPLE_MIN
from pdcoord.core.model import AdmissionRules, Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.core.trouble import Phase
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
R = RequestId("r")
REQUEST = Request(R, M, prompt_tokens=400)


def pool(name: str, role: Role) -> Pool:
    return Pool(
        name=PoolName(name),
        model=M,
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.01, 1e-4, 0.01, step_s_per_sequence=1e-4),
        kv_bytes_per_token=1_000,
        link_bytes_per_s=1e10,
    )


P, D = pool("p", Role.PREFILL), pool("d", Role.DECODE)
MODEL = Model(M, (P, D), slo=Slo(ttft_s=1.0), admission=AdmissionRules(wait_s_max=0.0))
SPLIT = replace(MODEL, disaggregation=Disaggregation(mode=SplitMode.ALWAYS))


class Story:
    """A coordinator with so many endpoints; validated after each event."""

    def __init__(self, decodes: int = 2, prefills: int = 0, model: Model = MODEL) -> None:
        self.now_s = 0.0
        self.coordinator = Coordinator()
        self.tell(ModelsReplaced((model,)))
        for of, count in ((P, prefills), (D, decodes)):
            for index in range(count):
                seen = Endpoint(EndpointId(f"{of.name}/{index}"), of, HostPort(f"{of.name}-{index}:80"))
                self.tell(EndpointSeen(seen))
                self.tell(SampleTaken(seen.id, Sample(0, 0, 0.1, 0.0)))

    def tell(self, event: object) -> list[Dispatch | Refuse]:
        actions = self.coordinator.handle(event, self.now_s)  # type: ignore[arg-type]
        self.coordinator.validate()
        return actions  # type: ignore[return-value]

    def send(self, name: str = "r", **changes: object) -> Plan:
        request = replace(REQUEST, id=RequestId(name), **changes)  # type: ignore[arg-type]
        return self.plan(self.tell(RequestArrived(request)))

    def hedge(self, name: str = "r") -> Plan | None:
        actions = self.tell(HedgeAsked(RequestId(name)))
        return self.plan(actions) if actions else None

    @staticmethod
    def plan(actions: list[Dispatch | Refuse]) -> Plan:
        (action,) = actions
        assert isinstance(action, Dispatch), action
        return action.plan

    def over(self, *, is_won: bool, reason: RungReason | None = None) -> None:
        assert self.tell(HedgeOver(R, is_won=is_won, reason=reason)) == []

    def requests(self) -> dict[str, int]:
        """Of each endpoint that has any."""
        return {
            str(name): load.request_count
            for name, load in self.coordinator.ledger.loads()
            if load.request_count
        }

    def counts(self) -> dict[str, int]:
        return {end.value: count for (_, end), count in self.coordinator.hedges.counts.items()}

    def end(self, outcome: Outcome = Outcome.OK) -> None:
        self.tell(RequestEnded(R, outcome, 20))
        assert self.requests() == {}
        assert self.coordinator.live_count == 0


def test_the_second_goes_elsewhere_under_an_id_of_its_own() -> None:
    story = Story()
    first = story.send()
    second = story.hedge()
    assert second is not None
    assert (second.request_id, second.attempt) == (id_of(R), 1)
    assert second.decode.id != first.decode.id
    assert story.requests() == {"d/0": 1, "d/1": 1}
    assert story.hedge() is None, "there are two already"
    story.over(is_won=False)
    story.tell(ResponseBegan(R, None))
    assert story.requests() == {str(first.decode.id): 1}
    story.end()
    assert story.counts() == {"lost": 1}


def test_the_second_wins_and_the_request_goes_on_there() -> None:
    story = Story()
    first = story.send()
    second = story.hedge()
    assert second is not None
    story.over(is_won=True)
    assert story.requests() == {str(second.decode.id): 1}
    story.tell(ResponseBegan(R, ServedHeader(mode=Mode.COLOCATED)))
    story.end()
    assert story.counts() == {"won": 1}
    trouble = story.coordinator.progress.quarantine.trouble(first.decode.id)
    assert trouble is not None, "whoever was overtaken so late is suspected"


def test_the_first_fails_and_the_second_goes_on_alone() -> None:
    story = Story(decodes=3)
    first = story.send()
    second = story.hedge()
    assert second is not None
    story.over(is_won=True, reason=RungReason.DECODE_UNREACHABLE)
    state = story.coordinator.fleet.get(first.decode.id)
    assert state is not None
    assert state.health is Health.UNREACHABLE
    third = story.plan(story.tell(DecodeFailed(R, RungReason.DECODE_ERROR)))
    assert third.decode.id not in {first.decode.id, second.decode.id}
    assert third.attempt == 2
    story.end(Outcome.CLIENT_GONE)


def test_the_second_fails_and_the_first_goes_on_alone() -> None:
    story = Story(decodes=3)
    first = story.send()
    second = story.hedge()
    assert second is not None
    story.over(is_won=False, reason=RungReason.DECODE_ERROR)
    assert story.requests() == {str(first.decode.id): 1}
    third = story.plan(story.tell(DecodeFailed(R, RungReason.DECODE_ERROR)))
    assert third.decode.id not in {first.decode.id, second.decode.id}
    story.end(Outcome.CLIENT_GONE)
    assert story.counts() == {"failed": 1}


def test_a_client_that_leaves_takes_both_along() -> None:
    story = Story(decodes=2, prefills=2, model=SPLIT)
    story.send()
    assert story.hedge() is not None
    story.end(Outcome.CLIENT_GONE)


def test_of_a_split_request_both_legs_are_avoided_where_that_can_be() -> None:
    story = Story(decodes=2, prefills=2, model=SPLIT)
    first = story.send()
    second = story.hedge()
    assert second is not None
    assert first.prefill is not None
    assert second.prefill is not None
    assert first.prefill.id != second.prefill.id
    story.over(is_won=True)
    assert story.requests() == {str(second.decode.id): 1, str(second.prefill.id): 1}
    story.end(Outcome.CLIENT_GONE)
    one = Story(decodes=2, prefills=1, model=replace(SPLIT, fallback=Fallback(colocated_share_max=0.0)))
    first = one.send()
    assert list(exclusions(first, frozenset(), ())) == [
        {first.decode.id, EndpointId("p/0")},
        {first.decode.id},
    ]
    second = one.hedge()
    assert second is not None
    assert second.decode.id != first.decode.id
    one.end(Outcome.CLIENT_GONE)


def test_nobody_is_asked_who_is_not_well() -> None:
    story = Story(decodes=2)
    first = story.send()
    other = EndpointId("d/1" if first.decode.id == "d/0" else "d/0")
    for number in range(3):
        sent = story.send(f"x{number}", allowed=frozenset({other.replace("/", "-") + ":80"}))
        story.tell(DecodeFailed(sent.request_id, RungReason.DECODE_ERROR))
    assert story.coordinator.progress.quarantine.is_out(other)
    assert story.hedge() is None
    story.end(Outcome.CLIENT_GONE)


def test_few_requests_have_a_second_attempt_unless_the_first_is_out() -> None:
    story = Story(model=replace(MODEL, fallback=Fallback(hedge_share_max=0.05)))
    for number in range(BUDGET_SAMPLE_MIN):
        sent = story.send(f"x{number}")
        story.tell(ResponseBegan(sent.request_id, None))
        story.tell(RequestEnded(sent.request_id, Outcome.OK))
    asked = {f"r{number}": story.send(f"r{number}") for number in range(8)}
    plans = [story.hedge(name) for name in asked]
    assert [plan is not None for plan in plans] == [True, True] + [False] * 6
    assert story.counts() == {"withheld": 6}
    # All of these show no output: their endpoint is put out, and then they are moved.
    story.now_s = 2.5
    story.tell(TimePassed())
    (out,) = story.coordinator.progress.quarantine.barred
    for name, plan in list(asked.items())[2:]:
        assert (story.hedge(name) is not None) == (plan.decode.id == out)
    trouble = story.coordinator.progress.quarantine.trouble(out)
    assert trouble is not None
    assert trouble.phase is Phase.OUT


def test_an_answer_that_has_begun_has_no_second_attempt() -> None:
    story = Story()
    story.send()
    story.tell(ResponseBegan(R, None))
    assert story.hedge() is None
    story.end()


def test_shares_are_kept_by_model_and_forgotten_with_it() -> None:
    story = Story()
    hedges = story.coordinator.hedges
    for _ in range(BUDGET_SAMPLE_MIN):
        hedges.note(M, is_second=True)
    assert hedges.share(M) == 1.0
    story.tell(ModelsReplaced((MODEL,)))
    assert hedges.share(M) == 1.0
    story.tell(ModelsReplaced((replace(MODEL, fallback=Fallback(window=7)),)))
    assert hedges.share(M) == 0.0
    story.tell(ModelsReplaced(()))
    hedges.note(M, is_second=True)
    assert hedges.share(M) == 0.0


def test_two_accounts_become_one_and_end_as_one() -> None:
    """Whichever goes on: nothing is left of the other, whatever its plan booked."""
    for is_won in (False, True):
        story = Story(decodes=2, prefills=2, model=SPLIT)
        plans = [story.send(), story.hedge()]
        kept = plans[is_won]
        assert kept is not None
        assert story.coordinator.ledger.open_count == 2
        story.over(is_won=is_won)
        assert list(story.coordinator.bookings.live) == [R]
        assert story.coordinator.bookings.live[R].plan == replace(kept, request_id=R)
        story.tell(ResponseBegan(R, None))
        story.end()
