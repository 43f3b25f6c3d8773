"""Lessons: what is drawn from a request's life, and what is left alone because nobody can know."""

from dataclasses import replace

import pytest

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import (
    DecodeFailed,
    Dispatch,
    Event,
    ModelsReplaced,
    Outcome,
    RequestArrived,
    RequestEnded,
    ResponseBegan,
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
from pdcoord.core.learned import LearnedSpeed
from pdcoord.core.model import Disaggregation, Model, SplitMode
from pdcoord.core.observations import Observation, OutputSeen, PrefillSeen, StepsSeen, TransferSeen
from pdcoord.core.plan import Plan
from pdcoord.core.request import Request, RequestId
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

M = ModelName("m")
SIDE = Side(Connector.NIXL, KvLayout(16))
P = Pool(
    PoolName("p"), M, Role.PREFILL, "v", EngineKind.VLLM, SIDE, SpeedFigures(0.01, 1e-4, 0.01), 1_000, 1e9
)
D = replace(P, name=PoolName("d"), role=Role.DECODE, speed=SpeedFigures(0.01, 1e-3, 0.01))


class Recorder(LearnedSpeed):
    """Learns nothing and remembers what it was to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Observation] = []

    def learn(self, observation: Observation) -> None:
        self.seen.append(observation)

    def take(self, kind: type[Observation]) -> list[Observation]:
        taken = [each for each in self.seen if isinstance(each, kind)]
        self.seen = [each for each in self.seen if not isinstance(each, kind)]
        return taken


class Story:
    """A coordinator with one prefill and one decode endpoint, told one thing after another."""

    def __init__(self, mode: SplitMode = SplitMode.ALWAYS) -> None:
        self.now_s = 100.0
        self.speed = Recorder()
        self.coordinator = Coordinator(self.speed)
        self.tell(ModelsReplaced((Model(M, (P, D), disaggregation=Disaggregation(mode=mode)),)))
        self.endpoints = [
            Endpoint(EndpointId(f"{of.name}/0"), of, HostPort(f"{of.name}:80")) for of in (P, D)
        ]
        for each in self.endpoints:
            self.tell(EndpointSeen(each))
            self.sample(each.id)

    def tell(self, event: Event, now_s: float | None = None) -> list[object]:
        self.now_s = self.now_s if now_s is None else now_s
        actions = self.coordinator.handle(event, self.now_s)
        self.coordinator.validate()
        return list(actions)

    def sample(self, name: str, running: int = 0, waiting: int = 0) -> None:
        self.tell(SampleTaken(EndpointId(name), Sample(running, waiting, 0.0, self.now_s)))

    def ask(self, name: str = "r", at_s: float = 100.0, tokens: int = 4_000, **more: object) -> Plan:
        request = Request(RequestId(name), M, tokens, tenant="t", **more)  # type: ignore[arg-type]
        (action,) = self.tell(RequestArrived(request), at_s)
        assert isinstance(action, Dispatch)
        return action.plan

    def begin(
        self, at_s: float, name: str = "r", served: ServedHeader | None = None, *, has_output: bool = False
    ) -> None:
        assert self.tell(ResponseBegan(RequestId(name), served, has_output), at_s) == []

    def end(
        self, at_s: float, name: str = "r", tokens: int | None = 11, outcome: Outcome = Outcome.OK
    ) -> None:
        assert self.tell(RequestEnded(RequestId(name), outcome, tokens), at_s) == []


def split(prefill_ms: float = 400.0, transfer_ms: float = 100.0, **more: object) -> ServedHeader:
    return ServedHeader(
        mode=Mode.SPLIT,
        prefill=HostPort("p:80"),
        prefill_ms=prefill_ms,
        transfer_ms=transfer_ms,
        **more,  # type: ignore[arg-type]
    )


TOGETHER = ServedHeader(mode=Mode.COLOCATED)


def test_a_split_request_alone_teaches_prefill_transfer_steps_and_output() -> None:
    story = Story()
    plan = story.ask()
    story.begin(100.5, served=split())
    (prefill,) = story.speed.take(PrefillSeen)
    assert isinstance(prefill, PrefillSeen)
    assert (prefill.endpoint.id, prefill.uncached_tokens, prefill.is_alone) == ("p/0", 4_000, True)
    assert prefill.took_s == pytest.approx(0.4)
    (transfer,) = story.speed.take(TransferSeen)
    assert isinstance(transfer, TransferSeen)
    assert (transfer.transfer_bytes, transfer.bytes_ahead) == (4_000_000, 0)
    assert transfer.took_s == pytest.approx(0.1 - plan.chosen.figures.step_s)
    story.end(101.5, tokens=101)
    steps, output = story.speed.seen[::-1]
    assert output == OutputSeen(M, "t", 101)
    assert isinstance(steps, StepsSeen)
    assert (steps.endpoint.id, steps.step_count) == ("d/0", 100)
    assert (steps.took_s, steps.batch) == (pytest.approx(1.0), pytest.approx(1.0))
    assert steps.context_tokens == pytest.approx(4_050.5)


def test_the_engines_own_count_of_cached_tokens_is_believed() -> None:
    story = Story()
    story.ask()
    story.begin(100.5, served=split(cached_tokens=1_500))
    (prefill,) = story.speed.take(PrefillSeen)
    assert isinstance(prefill, PrefillSeen)
    assert prefill.uncached_tokens == 2_500


def test_a_prefill_behind_another_began_when_that_one_was_done() -> None:
    story = Story()
    story.ask("a", 100.0)
    story.ask("b", 100.1)
    story.begin(100.5, "a", split(prefill_ms=400, transfer_ms=100))
    story.begin(101.0, "b", split(prefill_ms=800, transfer_ms=100))
    first, second = story.speed.take(PrefillSeen)
    assert isinstance(first, PrefillSeen)
    assert isinstance(second, PrefillSeen)
    assert (first.took_s, first.is_alone) == (pytest.approx(0.4), False)
    assert (second.took_s, second.is_alone) == (pytest.approx(0.5), False)


@pytest.mark.parametrize(
    ("prefill_ms", "took_s"),
    # Each is predicted to take 400 ms: up to 800 ms may be of both, computed in the same steps.
    [(300.0, 0.3), (500.0, None), (790.0, None), (1_000.0, 0.6)],
)
def test_what_others_may_have_had_of_a_prefills_time_is_not_its_own(
    prefill_ms: float, took_s: float | None
) -> None:
    story = Story()
    story.ask("a", 100.0)
    story.ask("b", 100.0)
    story.begin(102.0, "a", split(prefill_ms=prefill_ms, transfer_ms=2_000.0 - prefill_ms))
    seen = [each.took_s for each in story.speed.take(PrefillSeen) if isinstance(each, PrefillSeen)]
    assert seen == ([] if took_s is None else [pytest.approx(took_s, rel=0.05)])


def test_a_prefill_behind_one_that_is_not_known_to_be_done_teaches_nothing() -> None:
    story = Story()
    story.ask("a", 100.0)
    story.ask("b", 100.1)
    story.begin(101.0, "b", split())
    assert story.speed.take(PrefillSeen) == []


def test_a_prefill_beside_work_of_others_is_not_alone() -> None:
    story = Story()
    story.sample("p/0", running=2)
    story.ask()
    story.begin(100.5, served=split())
    (prefill,) = story.speed.take(PrefillSeen)
    assert isinstance(prefill, PrefillSeen)
    assert not prefill.is_alone


def test_a_sidecar_that_boasts_of_a_time_before_the_request_is_not_believed() -> None:
    story = Story()
    story.ask()
    story.begin(100.5, served=split(prefill_ms=1e12))
    (prefill,) = story.speed.take(PrefillSeen)
    assert isinstance(prefill, PrefillSeen)
    assert prefill.took_s == pytest.approx(0.4)
    story = Story()
    story.ask()
    story.begin(100.5, served=split(transfer_ms=1e12))
    assert story.speed.take(PrefillSeen) == []


def test_a_response_that_fell_back_teaches_nothing_of_prefill_or_transfer() -> None:
    rung = RungTaken(rung=RungKind.COLOCATED, reason=RungReason.TRANSFER_FAILED, target=HostPort("p:80"))
    story = Story()
    story.ask()
    story.begin(102.0, served=ServedHeader(mode=Mode.COLOCATED, rungs=(rung,)))
    assert story.speed.seen == []
    story.end(103.0, tokens=50)
    assert [type(each) for each in story.speed.seen] == [OutputSeen, StepsSeen]


def test_without_a_sidecars_word_only_the_length_of_the_answer_is_certain() -> None:
    story = Story()
    story.ask()
    story.begin(100.5)
    story.end(101.5)
    assert story.speed.seen == [OutputSeen(M, "t", 11)]


def test_an_engine_without_a_sidecar_teaches_by_its_first_output() -> None:
    seen = []
    for told in ({"served": TOGETHER}, {"has_output": True}, {}):
        story = Story(SplitMode.NEVER)
        story.ask()
        story.begin(104.0, **told)  # type: ignore[arg-type]
        story.end(106.0)
        seen.append(story.speed.seen)
    behind, alone, head_only = seen
    assert [type(each) for each in behind] == [PrefillSeen, OutputSeen, StepsSeen]
    assert alone == [each for each in behind if not isinstance(each, StepsSeen)]
    assert [type(each) for each in head_only] == [OutputSeen]


def test_an_engine_without_a_sidecar_does_not_tell_what_a_split_took() -> None:
    story = Story()
    assert story.ask().prefill is not None
    story.begin(100.5, has_output=True)
    story.end(101.5)
    assert story.speed.seen == [OutputSeen(M, "t", 11)]


def test_an_answer_that_is_not_streamed_teaches_its_prefill_and_length() -> None:
    story = Story()
    story.ask(is_streamed=False)
    story.begin(103.0, served=split(transfer_ms=2_600))
    story.end(103.0)
    assert [type(each) for each in story.speed.seen] == [PrefillSeen, OutputSeen]
    assert story.coordinator.lessons.take_ttfts() == []


@pytest.mark.parametrize("outcome", [o for o in Outcome if o is not Outcome.OK])
def test_what_did_not_end_well_has_no_length(outcome: Outcome) -> None:
    story = Story()
    story.ask()
    story.begin(100.5, served=split())
    story.speed.seen.clear()
    story.end(101.5, outcome=outcome)
    assert story.speed.seen == []


def test_a_short_answer_says_nothing_of_steps() -> None:
    story = Story()
    story.ask()
    story.begin(100.5, served=split())
    story.speed.seen.clear()
    story.end(101.5, tokens=7)
    assert story.speed.seen == [OutputSeen(M, "t", 7)]


def test_several_answers_at_once_say_nothing_of_one() -> None:
    story = Story(SplitMode.NEVER)
    story.ask(choice_count=3)
    story.begin(104.5, served=TOGETHER)
    story.speed.seen.clear()
    story.end(105.0, tokens=300)
    assert story.speed.seen == []


def test_a_colocated_prefill_is_what_is_left_of_the_first_token() -> None:
    story = Story(SplitMode.NEVER)
    plan = story.ask()
    story.begin(104.0, served=TOGETHER)
    (prefill,) = story.speed.seen
    assert isinstance(prefill, PrefillSeen)
    assert (prefill.endpoint.id, prefill.is_alone) == ("d/0", True)
    assert prefill.took_s == pytest.approx(4.0 - plan.chosen.figures.step_s)
    (ttft,) = story.coordinator.lessons.take_ttfts()
    assert (ttft.mode, ttft.took_s) == (Mode.COLOCATED, pytest.approx(4.0))
    assert ttft.predicted_s == plan.chosen.figures.ttft_s
    assert story.coordinator.lessons.take_ttfts() == []


def test_a_batch_is_averaged_over_time() -> None:
    story = Story()
    story.ask("a", 100.0)
    story.begin(100.5, "a", split())
    story.ask("b", 101.0)
    story.begin(101.5, "b", split())
    story.end(103.5, "b", tokens=3)
    story.speed.seen.clear()
    story.end(104.5, "a", tokens=9)
    _, steps = story.speed.seen
    assert isinstance(steps, StepsSeen)
    assert steps.batch == pytest.approx((1 * 1.0 + 2 * 2.0 + 1 * 1.0) / 4.0)
    assert steps.took_s == pytest.approx(4.0)


def test_prefills_beside_a_stream_are_not_its_steps() -> None:
    story = Story(SplitMode.NEVER)
    story.ask("a", 100.0)
    story.begin(104.0, "a", TOGETHER)
    plan = story.ask("b", 110.0)
    story.begin(114.0, "b", TOGETHER)
    story.speed.seen.clear()
    story.end(124.0, "a", tokens=101)
    _, steps = story.speed.seen
    assert isinstance(steps, StepsSeen)
    assert steps.took_s == pytest.approx(20.0 - plan.chosen.figures.prefill_s)


def test_a_transfer_into_an_engine_that_makes_wait_teaches_nothing() -> None:
    story = Story()
    story.ask()
    story.sample("d/0", running=4, waiting=3)
    story.begin(100.5, served=split())
    assert story.speed.take(TransferSeen) == []


def test_transfers_that_stay_slow_make_their_path_slow() -> None:
    story = Story()
    for index in range(6):
        at_s = story.now_s + 1.0
        story.ask(f"r{index}", at_s)
        story.begin(at_s + 1.0, f"r{index}", split(prefill_ms=400, transfer_ms=500))
        story.end(at_s + 2.0, f"r{index}", tokens=20)
    assert EndpointId("p/0") in story.coordinator.paths.troubled
    assert story.coordinator.paths.has_measured


def test_an_endpoint_that_is_gone_or_another_process_teaches_nothing() -> None:
    story = Story()
    story.ask()
    story.tell(EndpointGone(EndpointId("p/0")))
    story.tell(EndpointSeen(replace(story.endpoints[1], address=HostPort("d-other:80"))))
    story.begin(100.5, served=split())
    story.end(101.5)
    assert story.speed.seen == [OutputSeen(M, "t", 11)]


def test_a_request_that_failed_over_teaches_of_its_last_attempt_only() -> None:
    story = Story()
    other = replace(story.endpoints[1], id=EndpointId("d/1"), address=HostPort("d1:80"))
    story.tell(EndpointSeen(other))
    story.sample("d/1")
    failed = story.ask().decode.id
    (again,) = story.tell(DecodeFailed(RequestId("r"), RungReason.DECODE_ERROR), 101.0)
    assert isinstance(again, Dispatch)
    story.begin(101.5, served=split())
    story.end(102.5)
    prefill, transfer, _, steps = story.speed.seen
    assert isinstance(prefill, PrefillSeen)
    assert prefill.took_s == pytest.approx(0.4)
    assert isinstance(transfer, TransferSeen)
    assert isinstance(steps, StepsSeen)
    assert transfer.decode.id == steps.endpoint.id != failed
