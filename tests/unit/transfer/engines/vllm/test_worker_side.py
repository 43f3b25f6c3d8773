"""The workers' half with an agent that remembers what it was told: every report once, never too early."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest

from transfer.canonical import TokenRange
from transfer.engines.vllm.metadata import Settle, StepOrders
from transfer.engines.vllm.worker_side import Results, TableShape, WorkerSide
from transfer.errors import Failure, FailureKind
from transfer.session.vocabulary import ChunkComputed, LoadAsked, Opened, Proof, Report, TransferId

T = TransferId("ab" * 16)
PROOF = Proof(b"n" * 16, b"h" * 16)
OPENED = Opened(T, "p", PROOF, 8)
CHUNK = ChunkComputed(T, TokenRange(0, 8), ((7, 8), (1, 0)), is_last=True)
LOAD = LoadAsked("d", T, PROOF, "h:1", "", ((3, 4), (0, 2)), TokenRange(0, 8), 2.0)
NOTHING = Results(set(), set(), set())


@dataclass
class Outcomes:
    free_blocks: tuple[str, ...] = ()
    reports: tuple[Report, ...] = ()


@dataclass
class FakeAgent:
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    next: Outcomes = field(default_factory=Outcomes)
    unpacked: set[str] = field(default_factory=set)

    def open(self, opened: Opened) -> None:
        self.calls.append(("open", opened.transfer))

    def stage(self, chunk: ChunkComputed, ready: Callable[[], None] | None = None) -> None:
        self.calls.append(("stage", chunk.tables, ready))

    def abort(self, transfer: TransferId) -> None:
        self.calls.append(("abort", transfer))

    def wait_packed(self, request_ids: Collection[str], timeout_s: float) -> bool:
        self.calls.append(("wait", tuple(sorted(request_ids))))
        return not self.unpacked & set(request_ids)

    def load(self, asked: LoadAsked) -> None:
        self.calls.append(("load", asked.request, asked.tables))

    def cancel(self, request: str) -> None:
        self.calls.append(("cancel", request))

    def poll(self) -> Outcomes:
        told, self.next = self.next, Outcomes()
        return told


class Worker:
    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.now_s = 0.0
        self.side = WorkerSide(self.agent, TableShape((0, 1), (1, 2)), lambda: self.now_s)

    def step(
        self, orders: StepOrders | None = None, free: tuple[str, ...] = (), reports: tuple[Report, ...] = ()
    ) -> Results:
        orders = orders or StepOrders()
        self.side.before_forward(orders)
        self.side.after_forward(orders, None)
        self.agent.next = Outcomes(free, reports)
        return self.side.results()

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        taken, self.agent.calls = self.agent.calls, []
        return taken


@pytest.fixture
def worker() -> Worker:
    return Worker()


def failed(kind: FailureKind, request: str = "d") -> Report:
    return Report(request, Failure(kind), 0)


def test_blocks_are_sent_when_they_are_both_held_and_free_in_this_order(worker: Worker) -> None:
    assert worker.step(StepOrders(opened=(OPENED,), chunks=(CHUNK,))) == NOTHING
    assert worker.calls == [("open", T), ("stage", ((7, 8), (2, 3, 0, 0)), None)]
    assert worker.step(StepOrders(held=("p",))) == NOTHING
    assert worker.step(free=("p",)) == Results({"p"}, set(), set())
    assert worker.step() == NOTHING


def test_and_in_the_other_order(worker: Worker) -> None:
    worker.step(StepOrders(opened=(OPENED,), chunks=(CHUNK,)))
    assert worker.step(free=("p",)) == NOTHING, "the scheduler still runs it"
    assert worker.step(StepOrders(held=("p",))) == Results({"p"}, set(), set())


def test_loads_begin_before_the_forward_pass_and_staging_after_it(worker: Worker) -> None:
    orders = StepOrders(opened=(OPENED,), chunks=(CHUNK,), loads=(LOAD,), cancelled=("c",))
    worker.side.before_forward(orders)
    assert worker.calls == [("load", "d", ((3, 4), (0, 0, 4, 5))), ("cancel", "c")]

    def ready() -> None:
        pass

    worker.side.after_forward(orders, ready)
    assert worker.calls == [("open", T), ("stage", ((7, 8), (2, 3, 0, 0)), ready)]


def test_a_load_is_reported_once_and_timed(worker: Worker) -> None:
    assert worker.step(StepOrders(loads=(LOAD,))) == NOTHING
    worker.now_s = 1.5
    assert worker.step(reports=(Report("d", None, 100),)) == Results(set(), {"d"}, set())
    tally = worker.side.take_tally()
    assert tally is not None
    assert (tally.seconds, tally.loaded_bytes, tally.failures) == ([1.5], 100, {})
    assert worker.side.take_tally() is None
    assert worker.step(reports=(Report("d", None, 100),)) == NOTHING, "nobody waits for it any more"


def test_a_failed_load_is_in_both_sets(worker: Worker) -> None:
    worker.step(StepOrders(loads=(LOAD,)))
    assert worker.step(reports=(failed(FailureKind.PEER_LOST),)) == Results(set(), {"d"}, {"d"})
    tally = worker.side.take_tally()
    assert tally is not None
    assert tally.failures == {FailureKind.PEER_LOST: 1}


def test_a_cancelled_load_is_reported_but_is_no_failure_to_count(worker: Worker) -> None:
    worker.step(StepOrders(loads=(LOAD,)))
    worker.step(StepOrders(cancelled=("d",)))
    assert worker.step(reports=(failed(FailureKind.CANCELLED),)) == Results(set(), {"d"}, {"d"})
    assert worker.side.take_tally() is None


def test_a_release_is_not_reported(worker: Worker) -> None:
    release = LoadAsked("d", T, PROOF, "h:1", "", (), TokenRange(8, 0), 2.0)
    worker.step(StepOrders(loads=(release,)))
    assert worker.calls == [("load", "d", ((), ()))]
    assert worker.step(reports=(Report("d", None, 0),)) == NOTHING


def test_preempted_blocks_are_waited_for(worker: Worker) -> None:
    worker.step(StepOrders(opened=(OPENED,), chunks=(CHUNK,)))
    worker.calls.clear()
    worker.step(StepOrders(settle=(Settle("p", T), Settle("unknown", TransferId("00" * 16)))))
    assert worker.calls[-1] == ("wait", ("p",))


def test_a_transfer_whose_packs_do_not_let_go_is_given_up_and_nothing_more_is_staged(worker: Worker) -> None:
    worker.step(StepOrders(opened=(OPENED,), chunks=(CHUNK,)))
    worker.agent.unpacked = {"p"}
    worker.agent.calls.clear()
    worker.step(StepOrders(settle=(Settle("p", T),), chunks=(CHUNK,)))
    assert worker.calls == [("wait", ("p",)), ("wait", ("p",)), ("abort", T), ("wait", ("p",))]
    worker.step(StepOrders(aborted=(T,), held=("p",)))
    assert worker.calls == []
    assert worker.step(free=("p",)) == Results({"p"}, set(), set())


def test_a_stillborn_hand_over_is_opened_and_aborted_and_never_sent(worker: Worker) -> None:
    worker.step(StepOrders(stillborn=(OPENED,)))
    assert worker.calls == [("open", T), ("abort", T)]
    assert worker.step(free=("p",)) == NOTHING
    assert worker.step() == NOTHING
