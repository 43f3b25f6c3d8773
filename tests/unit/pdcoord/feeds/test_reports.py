"""What of a sidecar's words reaches the core, and when what it told is void."""

import pytest
import structlog

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, PathProbed, SidecarLost, SidecarReported
from pdcoord.core.fleet import (
    Endpoint,
    EndpointGone,
    EndpointId,
    EndpointSeen,
    EngineKind,
    Fleet,
    ModelName,
    Pool,
    PoolName,
    Role,
)
from pdcoord.core.paths import PathTable
from pdcoord.core.targets import TargetLists
from pdcoord.feeds import reports
from pdcoord.feeds.reports import GRACE_S, ReportsFeed, Session, TooManyStreamsError
from pdcoord.protocol.control import (
    HEARTBEAT_S,
    REQUESTS_MAX,
    ControlError,
    Events,
    OutputBegan,
    PathFacts,
    RequestBegan,
    RequestEnded,
    SidecarHello,
    Snapshot,
)
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PathReport
from pdcoord.protocol.plans import Mode, PlannedLoad, ServedHeader
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side

AT = HostPort("10.0.0.1:8000")
PREFILL = HostPort("10.0.0.2:8000")
OWN, OTHER = PlannedLoad(replica="a/1"), PlannedLoad(replica="b/1")


def endpoint(name: str, role: Role, address: HostPort) -> Endpoint:
    pool = Pool(
        name=PoolName(role),
        model=ModelName("m"),
        role=role,
        vendor="v",
        engine=EngineKind.VLLM,
        side=Side(Connector.PDCOORD, KvLayout(16)),
        speed=SpeedFigures(0.0, 0.0, 0.0),
        kv_bytes_per_token=1,
        link_bytes_per_s=0.0,
    )
    return Endpoint(EndpointId(name), pool, address)


D, P = endpoint("d", Role.DECODE, AT), endpoint("p", Role.PREFILL, PREFILL)


class Bench:
    """A feed whose clock moves by hand."""

    def __init__(self, *endpoints: Endpoint) -> None:
        self.now_s = 100.0
        self.fleet = Fleet()
        for each in endpoints:
            self.fleet.handle(EndpointSeen(each))
        self.events: list[Event] = []
        self.feed = ReportsFeed(
            self,
            TargetLists(self.fleet, PathTable()),
            at=lambda address: [state.endpoint for state in self.fleet.at(address)],
            replica="a/1",
            clock=lambda: self.now_s,
            log=structlog.get_logger(),
        )

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        return []

    def open(self, epoch: str = "e", address: HostPort = AT) -> Session:
        return self.feed.open(SidecarHello(1, "pod", address, epoch, b""))

    def told(self) -> list[Event]:
        told, self.events = self.events, []
        return told


def test_own_requests_are_left_out_from_their_beginning_to_their_end() -> None:
    bench = Bench(D)
    session = bench.open()
    output = OutputBegan(1, ServedHeader(mode=Mode.COLOCATED))
    bench.feed.hear(session, Events((RequestBegan(1, OWN), RequestBegan(2, OTHER), output)))
    bench.feed.hear(session, Events((RequestEnded(1, "served"), RequestEnded(2, "served"))))
    bench.feed.hear(session, Events((RequestEnded(1, "served"),)))
    assert [event.report for event in bench.told() if isinstance(event, SidecarReported)] == [
        Events((RequestBegan(2, OTHER),)),
        Events((RequestEnded(2, "served"),)),
        Events((RequestEnded(1, "served"),)),  # Its ordinal is nobody's any more.
    ]
    assert session.own == set()


def test_a_snapshot_says_anew_which_requests_are_own() -> None:
    bench = Bench(D)
    session = bench.open()
    bench.feed.hear(session, Snapshot((RequestBegan(1, OWN), RequestBegan(2, OTHER))))
    assert bench.told() == [SidecarReported(AT, "e", Snapshot((RequestBegan(2, OTHER),)))]
    bench.feed.hear(session, Snapshot(()))
    assert session.own == set()


def test_a_sign_of_life_tells_the_core_nothing() -> None:
    bench = Bench(D)
    session = bench.open()
    bench.now_s += 3.0
    assert bench.feed.report_age_s == 3.0
    bench.feed.hear(session, Events())
    assert bench.told() == []
    assert bench.feed.report_age_s == 0.0


def test_a_lost_sidecar_is_void_after_a_grace_unless_it_comes_back() -> None:
    bench = Bench(D)
    bench.feed.close(bench.open())
    bench.now_s += GRACE_S - 0.1
    bench.feed.look()
    again = bench.open()
    bench.now_s += GRACE_S
    bench.feed.look()
    assert bench.told() == []
    bench.feed.close(again)
    bench.now_s += GRACE_S
    bench.feed.look()
    bench.feed.look()
    assert bench.told() == [SidecarLost(AT)]


def test_a_stream_that_was_replaced_counts_no_more() -> None:
    bench = Bench(D)
    old, new = bench.open("e"), bench.open("f")
    bench.feed.hear(old, Snapshot((RequestBegan(1, OTHER),)))
    bench.feed.close(old)
    bench.now_s += GRACE_S
    bench.feed.look()
    assert bench.told() == []
    assert bench.feed.stream_count == 1
    bench.feed.hear(new, Snapshot(()))
    assert bench.told() == [SidecarReported(AT, "f", Snapshot(()))]
    assert (old.is_replaced, old.has_news.is_set()) == (True, True)
    assert not new.is_replaced


def test_a_snapshot_in_parts_counts_from_the_last_on() -> None:
    bench = Bench(D)
    session = bench.open()
    bench.feed.hear(session, Snapshot((RequestBegan(1, OWN), RequestBegan(2, OTHER)), has_more=True))
    assert bench.told() == []
    assert bench.feed.reports["snapshot"] == 0
    bench.feed.hear(session, Snapshot((RequestBegan(3, OTHER),)))
    whole = Snapshot((RequestBegan(2, OTHER), RequestBegan(3, OTHER)))
    assert bench.told() == [SidecarReported(AT, "e", whole)]
    assert session.own == {1}
    bench.feed.hear(session, Events((RequestBegan(4, OTHER),)))
    assert len(bench.told()) == 1


def test_a_snapshot_is_not_left_in_the_middle() -> None:
    bench = Bench(D)
    session = bench.open()
    bench.feed.hear(session, Snapshot((RequestBegan(1, OTHER),), has_more=True))
    with pytest.raises(ControlError, match="has not ended"):
        bench.feed.hear(session, Events())


def test_what_one_sidecar_tells_of_is_bounded() -> None:
    bench = Bench(D)
    session = bench.open()
    half = tuple(RequestBegan(ordinal, OWN) for ordinal in range(REQUESTS_MAX))
    bench.feed.hear(session, Snapshot(half))
    with pytest.raises(ControlError, match="more than 8192 requests are under way"):
        bench.feed.hear(session, Events((RequestBegan(REQUESTS_MAX, OWN),)))
    assert len(session.own) == REQUESTS_MAX
    bench.feed.hear(session, Snapshot(half, has_more=True))
    with pytest.raises(ControlError, match="a snapshot has more than 8192"):
        bench.feed.hear(session, Snapshot((RequestBegan(1, OTHER),)))


def test_probes_are_told_of_each_endpoint_there_also_of_one_that_is_found_later() -> None:
    bench = Bench()
    session = bench.open()
    assert bench.feed.unknown_count == 1
    assert not bench.feed.tells_paths(AT)
    probed = PathReport(target=PREFILL, kv_address=PREFILL, probe_count=1, age_s=2.0, failure="refused")
    unprobed = PathReport(target=HostPort("q:1"), kv_address=HostPort("q:1"))
    bench.feed.hear(session, PathFacts(30.0, True, (probed, unprobed)))
    assert bench.feed.tells_paths(AT)
    assert bench.told() == []
    bench.fleet.handle(EndpointSeen(D))
    bench.now_s += 1.0
    bench.feed.look()
    bench.feed.look()
    (event,) = bench.told()
    assert isinstance(event, PathProbed)
    assert (event.prefill, event.decode, event.probe.at_s, event.probe.failure) == (
        PREFILL,
        D.id,
        98.0,
        "refused",
    )


def test_targets_are_told_whole_then_as_they_change_and_now_and_then_a_sign_of_life() -> None:
    bench = Bench(D, P)
    session = bench.open()
    bench.feed.look()
    first = bench.feed.notice(session)
    assert first is not None
    assert first.is_whole
    assert [target.address for target in first.changed] == [PREFILL]
    assert bench.feed.notice(session) is None
    bench.now_s += HEARTBEAT_S
    life = bench.feed.notice(session)
    assert life is not None
    assert (life.is_whole, life.changed, life.removed) == (False, (), ())
    session.has_news.clear()
    bench.feed.look()
    assert not session.has_news.is_set()
    bench.fleet.handle(EndpointGone(P.id))
    bench.feed.look()
    assert session.has_news.is_set()
    gone = bench.feed.notice(session)
    assert gone is not None
    assert gone.removed == (PREFILL,)


def test_peers_are_told_whole_then_as_they_come_and_go() -> None:
    twin = Endpoint(EndpointId("d2"), D.pool, HostPort("10.0.0.3:8000"))
    bench = Bench(D, P)
    session = bench.open()
    bench.feed.look()
    first = bench.feed.notice(session)
    assert first is not None
    assert first.decodes == ()
    bench.fleet.handle(EndpointSeen(twin))
    bench.feed.look()
    come = bench.feed.notice(session)
    assert come is not None
    assert (come.is_whole, come.changed, come.decodes, come.decodes_removed) == (
        False,
        (),
        (twin.address,),
        (),
    )
    bench.fleet.handle(EndpointGone(twin.id))
    bench.feed.look()
    gone = bench.feed.notice(session)
    assert gone is not None
    assert (gone.decodes, gone.decodes_removed) == ((), (twin.address,))


def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "STREAMS_MAX", 1)
    bench = Bench(D)
    bench.open()
    bench.open()
    with pytest.raises(TooManyStreamsError, match="1 control streams"):
        bench.open(address=PREFILL)
