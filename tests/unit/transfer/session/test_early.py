"""Who came too early is remembered for a while, and how transfers ended."""

from transfer.errors import Failure, FailureKind
from transfer.session.early import Early, EarlyBook, EndedBook
from transfer.session.vocabulary import DoneHeard, FetchAsked, Proof, TransferId

PROOF = Proof(b"n" * 16, b"p" * 16)
ONE, TWO = TransferId("1" * 32), TransferId("2" * 32)


def fetch(consumer: str, transfer: TransferId = ONE) -> FetchAsked:
    return FetchAsked(consumer, transfer, PROOF, 0, 1, is_layout_equal=False, wait_s=1.0)


def done(consumer: str, transfer: TransferId = ONE) -> DoneHeard:
    return DoneHeard(consumer, transfer, PROOF, 1)


def kind(failure: Failure | None) -> FailureKind | None:
    return failure.kind if failure else None


def test_what_waits_is_taken_in_order_of_arrival() -> None:
    book = EarlyBook(9)
    for event in (fetch("a"), done("b"), fetch("c"), fetch("a", TWO)):
        assert book.add(Early(event, 5.0)) is None
    assert book.take(ONE) == [fetch("a"), done("b"), fetch("c")]
    assert len(book) == 1
    assert book.take(ONE) == []
    book.validate()


def test_a_release_takes_the_place_of_its_fetch() -> None:
    book = EarlyBook(1)
    book.add(Early(fetch("a"), 5.0))
    assert kind(book.add(Early(fetch("a"), 5.0))) is FailureKind.REPLAYED_TICKET
    assert book.add(Early(done("a"), 5.0)) is None
    assert kind(book.add(Early(fetch("b", TWO), 5.0))) is FailureKind.OVERLOADED
    assert book.take(ONE) == [done("a")]
    book.validate()


def test_time_and_a_lost_connection_take_what_waits() -> None:
    book = EarlyBook(9)
    book.add(Early(fetch("a"), 5.0))
    book.add(Early(done("b"), 4.0))
    book.add(Early(fetch("c", TWO), 6.0))
    assert book.deadline_s == 4.0
    assert book.expire(3.9) == []
    assert book.expire(5.0) == [fetch("a")], "a release is forgotten without a word"
    book.add(Early(done("c"), 9.0))
    book.forget("c")
    assert book.take(TWO) == []
    assert book.take(ONE) == [done("c")], "a release stays true when its consumer is gone"
    assert book.deadline_s is None
    book.validate()


def test_ended_transfers_are_remembered_up_to_a_bound() -> None:
    book = EndedBook(2)
    book.add(ONE, None)
    book.add(TWO, Failure(FailureKind.LEASE_EXPIRED))
    assert book.answer(ONE).kind is FailureKind.REPLAYED_TICKET
    assert book.answer(TWO).kind is FailureKind.LEASE_EXPIRED
    book.add(TransferId("3" * 32), None)
    assert ONE not in book
    assert TWO in book
    book.validate()
