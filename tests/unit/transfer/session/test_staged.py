"""Who may read a transfer, in which form, and what it is offered."""

import pytest

from transfer.canonical import Form, PartShape, TokenRange
from transfer.errors import FailureKind
from transfer.layout import HeadRange
from transfer.session.staged import Phase, Transfer
from transfer.session.vocabulary import FetchAsked, Proof, SendOffer, StagedPart, TransferId

ID = TransferId("1" * 32)
PROOF = Proof(b"n" * 16, b"p" * 16)


def part(first: int, end: int) -> StagedPart:
    shape = PartShape(Form.TOKENS, 0, HeadRange(0, 1), TokenRange(first, end - first))
    return StagedPart(shape, 0, 1, b"d" * 16)


def transfer(*parts: StagedPart) -> Transfer:
    own = Transfer(ID, "r", PROOF, token_count=64, opened_s=0.0)
    own.parts += parts
    return own


def fetch(consumer: str = "c", *, first: int = 0, readers: int = 1, is_equal: bool = False) -> FetchAsked:
    return FetchAsked(consumer, ID, PROOF, first, readers, is_equal, wait_s=5.0)


def told(offers: list[SendOffer]) -> list[tuple[list[int], bool]]:
    return [([p.shape.tokens.first for p in o.parts], o.is_last) for o in offers]


def test_parts_are_offered_once_and_only_those_that_are_wanted() -> None:
    own = transfer(part(0, 16), part(16, 32))
    own.add_reader(fetch(first=16), 9.0)
    assert told(own.offers("c", 9)) == [([16], False)]
    assert own.readers["c"].wait_until_s is None
    assert own.offers("c", 9) == []
    own.parts.append(part(32, 64))
    own.phase = Phase.KEPT
    assert told(own.offers("c", 9)) == [([32], True)]
    assert own.offers("c", 9) == []


def test_a_reader_that_wants_nothing_is_told_the_end_and_holds_no_memory() -> None:
    own = transfer(part(0, 64))
    own.add_reader(fetch(first=64), 9.0)
    assert own.offers("c", 9) == []
    assert own.readers["c"].wait_until_s == 9.0
    own.phase = Phase.KEPT
    assert told(own.offers("c", 9)) == [([], True)]
    assert not own.readers["c"].may_read


def test_many_parts_come_in_more_than_one_offer() -> None:
    own = transfer(*(part(i, i + 1) for i in range(7)))
    own.phase = Phase.KEPT
    own.add_reader(fetch(), 9.0)
    assert told(own.offers("c", 3)) == [([0, 1, 2], False), ([3, 4, 5], False), ([6], True)]


@pytest.mark.parametrize(
    ("early", "form"),
    [
        ([], Form.TOKENS),
        ([("a", True)], Form.TOKENS),
        ([("a", True), ("b", False)], Form.TOKENS),
        ([("a", True), ("b", True)], Form.PAGES),
    ],
)
def test_pages_are_for_when_all_readers_are_here_and_equal(early: list[tuple[str, bool]], form: Form) -> None:
    own = transfer()
    for consumer, is_equal in early:
        own.add_reader(fetch(consumer, readers=2, is_equal=is_equal), 9.0)
    assert own.choose_form() is form


def test_a_place_is_for_one_rank_of_as_many_as_were_said_first() -> None:
    own = transfer()
    own.add_reader(fetch("a", readers=2), 9.0)
    kinds = [
        failure.kind if (failure := own.no_place(consumer, count, 8)) else None
        for consumer, count in [("a", 2), ("b", 2), ("b", 3), ("b", 0), ("b", 9)]
    ]
    assert kinds == [FailureKind.REPLAYED_TICKET, None, *[FailureKind.MALFORMED] * 3]
    own.done.add("b")
    refused = own.no_place("c", 2, 8)
    assert refused is not None
    assert refused.kind is FailureKind.REPLAYED_TICKET


def test_what_is_due_next_depends_on_the_phase() -> None:
    own = transfer()
    assert own.deadline_s(600.0, 10.0) == 600.0
    own.add_reader(fetch(), 9.0)
    assert own.deadline_s(600.0, 10.0) == 9.0
    own.phase, own.lease_until_s, own.kept_until_s = Phase.KEPT, 7.0, 8.0
    assert own.deadline_s(600.0, 10.0) == 7.0
    own.phase, own.drop_at_s = Phase.ENDING, 3.0
    assert own.deadline_s(600.0, 10.0) == 3.0
    own.readers["c"].was_dropped = True
    assert own.deadline_s(600.0, 10.0) is None
