"""Transfers share NICs: each has an n-th of either end, and the lesser counts."""

import pytest

from pdcoord.sim.coarse.agenda import Agenda
from pdcoord.sim.coarse.links import Links, Transfer


def run(agenda: Agenda) -> None:
    while agenda.next_s() is not None:
        do, subject = agenda.take()
        do(subject)


class Yard:
    """Links of four places and a list of what was done when."""

    def __init__(self, *bytes_per_s: float) -> None:
        self.agenda = Agenda()
        self.done: list[tuple[str, float]] = []
        self.links = Links(bytes_per_s, self.agenda, self._note)

    def _note(self, transfer: Transfer) -> None:
        self.links.validate()
        self.done.append((transfer.subject, pytest.approx(self.agenda.now_s)))

    def at(self, at_s: float, prefill: int, decode: int, size: float, name: str) -> None:
        def begin(_: object) -> None:
            self.links.begin(prefill, decode, size, name)
            self.links.validate()

        self.agenda.at(at_s, begin)


def test_one_alone_has_the_slower_end() -> None:
    yard = Yard(100.0, 50.0)
    yard.at(1.0, 0, 1, 100.0, "a")
    run(yard.agenda)
    assert yard.done == [("a", 3.0)]


def test_two_on_one_nic_have_half_each_until_one_is_done() -> None:
    yard = Yard(100.0, 1_000.0, 1_000.0)
    yard.at(0.0, 0, 1, 100.0, "a")
    yard.at(0.5, 0, 2, 100.0, "b")
    run(yard.agenda)
    # a: 50 alone, 50 at half speed until 1.5; b: 50 by then, the rest alone until 2.0.
    assert yard.done == [("a", 1.5), ("b", 2.0)]


def test_a_share_that_one_cannot_use_is_not_given_to_others() -> None:
    yard = Yard(100.0, 10.0, 1_000.0)
    yard.at(0.0, 0, 1, 100.0, "slow")
    yard.at(0.0, 0, 2, 100.0, "fast")
    run(yard.agenda)
    assert yard.done == [("fast", 2.0), ("slow", 10.0)]


def test_a_slow_link_heals() -> None:
    yard = Yard(100.0, 100.0)
    yard.at(0.0, 0, 1, 100.0, "a")
    yard.agenda.at(0.5, lambda _: yard.links.slow(1, 0.1))
    yard.agenda.at(1.5, lambda _: yard.links.slow(1, 1.0))
    run(yard.agenda)
    assert yard.done == [("a", 1.9)]
    with pytest.raises(ValueError, match="expected more than 0"):
        yard.links.slow(0, 0.0)


def test_one_that_is_taken_off_is_never_done() -> None:
    yard = Yard(100.0, 100.0)
    transfer = yard.links.begin(0, 1, 100.0, "a")
    other = yard.links.begin(0, 1, 100.0, "b")
    assert yard.links.touching(0) == yard.links.touching(1) == yard.links.between(0, 1) == [transfer, other]
    yard.links.end(transfer)
    yard.links.end(transfer)
    run(yard.agenda)
    assert yard.done == [("b", 1.0)]
    assert yard.links.touching(0) == []
