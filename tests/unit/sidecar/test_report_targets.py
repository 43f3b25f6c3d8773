"""What coordinators name: dialled while any of them does, passed over when all of them would."""

from pdcoord.protocol.control import Target, Targets
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PrefillTarget
from sidecar.report_targets import KEEP_S, REPLICAS_MAX, TargetBook

P, Q = HostPort("p:1"), HostPort("q:1")


def whole(*targets: Target) -> Targets:
    return Targets(targets, is_whole=True)


def target(address: HostPort, breaker: str = "closed", verdict: str = "native") -> Target:
    return Target(address, verdict, "", breaker, kv_port=7)


def test_what_any_replica_names_may_be_dialled() -> None:
    book = TargetBook()
    book.connect("a")
    book.take("a", whole(target(P)))
    book.connect("b")
    book.take("b", whole(target(Q), target(P)))
    assert {each.address for each in book.targets()} == {P, Q}
    assert book.get(P) == PrefillTarget(address=P, kv_port=7)
    book.take("b", Targets(removed=(Q,)))
    assert book.get(Q) is None
    assert len(book) == 1


def test_decode_endpoints_are_named_apart_and_go_with_their_replica() -> None:
    book = TargetBook()
    book.connect("a")
    book.take("a", Targets(is_whole=True, decodes=(P, Q)))
    assert (book.has_decode(P), book.has_decode(Q)) == (True, True)
    assert list(book.targets()) == []  # They are not probed.
    book.take("a", Targets(decodes_removed=(Q,)))
    assert (book.has_decode(P), book.has_decode(Q)) == (True, False)
    book.take("a", Targets(is_whole=True))
    assert not book.has_decode(P)
    book.take("a", Targets(decodes=(P,)))
    book.lose("a", 0.0)
    book.sweep(KEEP_S)
    assert not book.has_decode(P)


def test_what_is_impossible_may_not() -> None:
    book = TargetBook()
    book.connect("a")
    book.take("a", whole(target(P, verdict="impossible")))
    assert book.get(P) is None


def test_a_path_is_shut_when_every_connected_replica_says_so() -> None:
    book = TargetBook()
    assert not book.is_shut(P)
    book.connect("a")
    assert not book.is_shut(P)
    book.take("a", whole(target(P, "open")))
    assert book.is_shut(P)
    book.connect("b")
    assert book.is_shut(P)  # It has not told anything yet.
    book.take("b", whole(target(P)))
    assert not book.is_shut(P)
    book.lose("b", 0.0)
    assert book.is_shut(P)
    book.lose("a", 0.0)
    assert not book.is_shut(P)
    assert not book.is_shut(Q)


def test_what_a_lost_replica_named_holds_for_a_while() -> None:
    book = TargetBook()
    book.connect("a")
    book.take("a", whole(target(P)))
    book.lose("a", 100.0)
    book.sweep(100.0 + KEEP_S - 1.0)
    assert book.get(P) is not None
    assert [row.is_connected for row in book.rows()] == [False]
    book.sweep(100.0 + KEEP_S)
    assert book.get(P) is None
    assert list(book.rows()) == []


def test_a_replica_that_connects_again_tells_all_anew() -> None:
    book = TargetBook()
    book.connect("a")
    book.take("a", whole(target(P)))
    book.lose("a", 0.0)
    book.connect("a")
    book.sweep(KEEP_S * 2)
    book.take("a", whole(target(Q)))
    assert {each.address for each in book.targets()} == {Q}


def test_replicas_are_bounded_and_strangers_ignored() -> None:
    book = TargetBook()
    book.take("stranger", whole(target(P)))
    assert len(book) == 0
    for number in range(REPLICAS_MAX + 5):
        name = f"r{number}"
        book.connect(name)
        book.take(name, whole(target(HostPort(f"p{number}:1"))))
        book.lose(name, 0.0)
    book.sweep(0.0)
    assert len(book) == REPLICAS_MAX
    assert book.states()["usable"] == REPLICAS_MAX
