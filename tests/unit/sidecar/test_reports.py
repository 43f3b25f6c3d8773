"""The journal of requests: every stream hears of all of them, by events or by a snapshot."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.protocol.control import (
    EVENTS_MAX,
    ControlLegKind,
    Events,
    LegBegan,
    LegEnded,
    LoadEvent,
    OutputBegan,
    RequestBegan,
    RequestEnded,
    Snapshot,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport, PathsReport
from pdcoord.protocol.plans import DialectName, Mode, PlannedLoad, PrefillTarget, ServedHeader
from pdcoord.protocol.tickets import Ticket
from sidecar.handoff import Handoff
from sidecar.reports import Journal, PathNews, Reader, RequestReport
from sidecar.vocabulary import (
    Begun,
    ClientLeft,
    DecodeEnded,
    DecodeLost,
    DecodeOpened,
    Event,
    Fault,
    Order,
    PrefillAnswered,
    PrefillLost,
    Resume,
)

P, Q = HostPort("p:1"), HostPort("q:1")
LOAD = PlannedLoad(replica="a/1", model="m", prefill_us=5)
PREFILL, DECODE = ControlLegKind.PREFILL, ControlLegKind.DECODE
TICKET = Ticket(b'{"secret":1}')


def told_of(
    *events: Event,
    load: PlannedLoad | None = LOAD,
    targets: int = 2,
    end: str = "",
    resume: Resume | None = None,
) -> list[LoadEvent]:
    """What a journal is told of one request to which this happens, one thing a second."""
    journal = Journal()
    prefills = tuple(PrefillTarget(address=address) for address in (P, Q)[:targets])
    order = Order(dialect=DialectName.NIXLV2, engine=HostPort("e:1"), prefills=prefills, is_stream=True)
    order = replace(order, resume=resume)
    report, handoff = RequestReport(journal, order, load, 0.0), Handoff(order)
    for second, event in enumerate((Begun(), *events)):
        handoff.handle(event, float(second))
        report.look(handoff, float(second))
        journal.validate()
    if end:
        report.end(handoff, end, 10.0)
        report.end(handoff, end, 11.0)
        assert journal.live_count == 0
    found, _ = journal.since(0)
    return list(found.events)


def test_a_split_request_is_told_leg_by_leg() -> None:
    told = told_of(PrefillAnswered(1, TICKET, 5), DecodeOpened(2), DecodeEnded(2), end="served")
    began, first, first_ended, second, output, *rest = told
    assert began == RequestBegan(1, LOAD, P)
    assert first == LegBegan(1, 1, PREFILL, P)
    assert first_ended == LegEnded(1, 1, PREFILL, P, "ok", 1.0)
    assert second == LegBegan(1, 2, DECODE, P)
    assert isinstance(output, OutputBegan)
    assert (output.served.mode, output.served.prefill, output.served.cached_tokens) == (Mode.SPLIT, P, 5)
    assert rest == [LegEnded(1, 2, DECODE, P, "ok", 2.0), RequestEnded(1, "served")]
    assert "secret" not in repr(told)


def test_a_rung_is_told_with_its_reason_as_its_leg_ends() -> None:
    told = told_of(PrefillLost(1, Fault.UNREACHABLE))
    assert told[2:] == [
        LegEnded(1, 1, PREFILL, P, "prefill-unreachable", 1.0),
        LegBegan(1, 2, PREFILL, Q),
    ]


def test_a_stream_that_goes_on_elsewhere_is_no_load_here_any_more() -> None:
    resume = Resume((HostPort("d:1"),))
    lost = DecodeLost(1, Fault.LOST_IN_BODY)
    told = told_of(
        DecodeOpened(1), lost, DecodeOpened(2), DecodeEnded(2), targets=0, resume=resume, end="served"
    )
    assert told[-2:] == [LegEnded(1, 1, DECODE, None, "decode-error", 2.0), RequestEnded(1, "moved")]
    # At the own engine it stays.
    told = told_of(DecodeOpened(1), lost, DecodeOpened(2), targets=0, resume=Resume(()), end="served")
    assert told[-1] == RequestEnded(1, "served")
    assert LegBegan(1, 2, DECODE, None) in told


def test_a_request_that_ends_early_is_told_with_what_was_done_and_no_leg_left_open() -> None:
    told = told_of(ClientLeft(), end="client-left")
    assert told[2:] == [
        LegEnded(1, 1, PREFILL, P, "cancelled", 1.0),
        RequestEnded(1, "client-left", ServedHeader(mode=Mode.SPLIT, prefill=P)),
    ]
    cut = told_of(end="broken-off")
    assert cut[2] == LegEnded(1, 1, PREFILL, P, "cancelled", 10.0)


def test_a_request_without_a_plan_counts_without_figures() -> None:
    told = told_of(load=None)
    assert told[0] == RequestBegan(1, PlannedLoad(), None)
    assert told_of(load=None, targets=0)[1] == LegBegan(1, 1, DECODE, None)


def test_a_stream_begins_with_a_snapshot_and_goes_on_with_events() -> None:
    journal = Journal()
    journal.begin(RequestBegan(0, LOAD, P), 1.0)
    reader = Reader(journal)
    assert reader.next(3.0) == Snapshot((RequestBegan(1, LOAD, P, age_s=2.0),))
    assert reader.next(3.0) is None
    journal.note(OutputBegan(1, ServedHeader(mode=Mode.SPLIT)))
    assert reader.next(3.0) == Events((OutputBegan(1, ServedHeader(mode=Mode.SPLIT)),))
    assert Reader(journal).next(4.0) == Snapshot((RequestBegan(1, LOAD, P, has_output=True, age_s=3.0),))


def test_a_stream_that_is_too_slow_gets_a_snapshot_for_what_it_missed() -> None:
    journal = Journal(events_max=4)
    reader = Reader(journal)
    reader.next(0.0)
    for _ in range(5):
        journal.begin(RequestBegan(0, LOAD), 0.0)
    message = reader.next(0.0)
    assert isinstance(message, Snapshot)
    assert len(message.requests) == 5
    assert (reader.take_lost(), reader.take_lost()) == (5, 0)


def test_a_message_has_a_bounded_number_of_events() -> None:
    journal = Journal()
    reader = Reader(journal)
    reader.next(0.0)
    for _ in range(EVENTS_MAX + 1):
        journal.begin(RequestBegan(0, LOAD), 0.0)
    sizes = [len(m.events) for m in (reader.next(0.0), reader.next(0.0)) if isinstance(m, Events)]
    assert sizes == [EVENTS_MAX, 1]


def test_requests_beyond_the_bound_are_left_out_and_counted() -> None:
    journal = Journal(requests_max=1)
    order = Order(dialect=DialectName.NIXLV2, engine=HostPort("e:1"))
    first, second = (RequestReport(journal, order, LOAD, 0.0) for _ in range(2))
    handoff = Handoff(order)
    handoff.handle(Begun(), 0.0)
    assert first.look(handoff, 0.0)
    assert not second.look(handoff, 0.0)
    second.end(handoff, "served", 0.0)
    assert (journal.left_out, journal.live_count) == (1, 1)


def test_each_probe_is_told_once_on_a_stream() -> None:
    news = PathNews()
    paths = [PathReport(target=P, kv_address=P, probe_count=1), PathReport(target=Q, kv_address=Q)]
    report = PathsReport(interval_s=30.0, is_agent_up=True, paths=tuple(paths))
    found = news.news(report)
    assert found is not None
    assert [path.target for path in found.paths] == [P]
    assert news.news(report) is None
    paths[1] = PathReport(target=Q, kv_address=Q, probe_count=1)
    found = news.news(PathsReport(interval_s=30.0, is_agent_up=True, paths=tuple(paths)))
    assert found is not None
    assert [path.target for path in found.paths] == [Q]
    down = news.news(PathsReport(interval_s=30.0, is_agent_up=False, paths=tuple(paths)))
    assert down is not None
    assert (down.is_agent_up, down.paths) == (False, ())


class Streams(RuleBasedStateMachine):
    """Streams of any pace end with the same requests as the journal."""

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(events_max=8)
        self.readers = [Reader(self.journal) for _ in range(2)]
        self.views: list[dict[int, bool]] = [{}, {}]
        self.live: dict[int, bool] = {}

    @rule()
    def begin(self) -> None:
        self.live[self.journal.begin(RequestBegan(0, LOAD), 0.0)] = False

    @rule(data=st.data())
    def output(self, data: st.DataObject) -> None:
        silent = [ordinal for ordinal, has_output in self.live.items() if not has_output]
        if silent:
            ordinal = data.draw(st.sampled_from(silent))
            self.live[ordinal] = True
            self.journal.note(OutputBegan(ordinal, ServedHeader(mode=Mode.COLOCATED)))

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.live:
            ordinal = data.draw(st.sampled_from(list(self.live)))
            del self.live[ordinal]
            self.journal.note(RequestEnded(ordinal, "served"))

    @rule(which=st.integers(0, 1))
    def read(self, which: int) -> None:
        while (message := self.readers[which].next(0.0)) is not None:
            self.take(self.views[which], message)
        assert self.views[which] == self.live

    @staticmethod
    def take(view: dict[int, bool], message: Snapshot | Events) -> None:
        if isinstance(message, Snapshot):
            view.clear()
            view.update({each.ordinal: each.has_output for each in message.requests})
            return
        for event in message.events:
            match event:
                case RequestBegan():
                    view[event.ordinal] = False
                case OutputBegan(ordinal):
                    view[ordinal] = True
                case RequestEnded(ordinal):
                    del view[ordinal]

    @invariant()
    def is_valid(self) -> None:
        self.journal.validate()


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=40, stateful_step_count=40)
