"""The ledger's accounts: sums of what is open, zero when nothing is."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pdcoord.core.fleet import EndpointId, Sample
from pdcoord.core.ledger import Entry, Ledger, Load
from pdcoord.core.request import RequestId

P, D, E = EndpointId("p"), EndpointId("d"), EndpointId("e")
SPLIT = Entry(RequestId("r1"), D, P, 100_000, 1_000, 5_000)
LOCAL = Entry(RequestId("r2"), D, D, 40_000, 300, 0)


class LedgerMachine(RuleBasedStateMachine):
    """Requests begin, finish their prefill and end in any order."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.now_s = 0.0
        self.count = 0
        self.open: set[RequestId] = set()

    @rule(
        target=requests,
        decode=st.sampled_from([D, E]),
        worker=st.sampled_from([P, D, E]),
        prefill_us=st.integers(0, 10**6),
        tokens=st.integers(0, 10**5),
        transfer_bytes=st.integers(0, 10**9),
    )
    def begin(
        self, decode: EndpointId, worker: EndpointId, prefill_us: int, tokens: int, transfer_bytes: int
    ) -> RequestId:
        self.count += 1
        request_id = RequestId(f"r{self.count}")
        self.ledger.begin(Entry(request_id, decode, worker, prefill_us, tokens, transfer_bytes), self.now_s)
        self.open.add(request_id)
        return request_id

    @rule(request_id=requests)
    def finish_prefill(self, request_id: RequestId) -> None:
        if request_id in self.open:
            self.ledger.finish_prefill(request_id, self.now_s)

    @rule(request_id=consumes(requests))
    def end(self, request_id: RequestId) -> None:
        self.ledger.end(request_id, self.now_s)
        self.open.discard(request_id)

    @rule(endpoint_id=st.sampled_from([P, D, E]))
    def sample(self, endpoint_id: EndpointId) -> None:
        self.ledger.note_sample(endpoint_id, self.now_s)

    @rule(endpoint_id=st.sampled_from([P, D, E]))
    def forget(self, endpoint_id: EndpointId) -> None:
        self.ledger.forget(endpoint_id)

    @rule(seconds=st.floats(0.0, 2.0))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def accounts_are_right(self) -> None:
        self.ledger.validate()
        assert self.ledger.open_count == len(self.open)
        for _, load in self.ledger.loads():
            assert 0.0 <= load.pending_prefill_s(self.now_s) <= load.prefill_us / 1e6
            assert load.own_peak >= load.request_count

    def teardown(self) -> None:
        for request_id in self.open:
            self.ledger.end(request_id, self.now_s)
        self.ledger.validate()
        for endpoint_id in (P, D, E):
            assert self.ledger.load(endpoint_id).request_count == 0
            self.ledger.forget(endpoint_id)
        assert list(self.ledger.loads()) == []


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=25)


def test_a_split_requests_life() -> None:
    ledger = Ledger()
    ledger.begin(SPLIT, 10.0)
    worker, decode = ledger.load(P), ledger.load(D)
    assert (worker.request_count, worker.decode_count, worker.prefill_us) == (1, 0, 100_000)
    assert (decode.request_count, decode.decode_count, decode.context_tokens) == (1, 1, 1_000)
    assert worker.bytes_in_flight == decode.bytes_in_flight == 5_000
    assert decode.streaming_count == 0

    ledger.finish_prefill(SPLIT.request_id, 10.2)
    assert (worker.request_count, worker.prefill_us, worker.bytes_in_flight) == (0, 0, 0)
    assert (decode.streaming_count, decode.bytes_in_flight, decode.context_tokens) == (1, 0, 1_000)

    ledger.end(SPLIT.request_id, 11.0)
    assert (decode.request_count, decode.streaming_count, decode.context_tokens) == (0, 0, 0)
    assert ledger.open_count == 0


def test_a_colocated_request_counts_once() -> None:
    ledger = Ledger()
    ledger.begin(LOCAL, 0.0)
    assert ledger.load(D).request_count == 1
    ledger.finish_prefill(LOCAL.request_id, 0.1)
    assert ledger.load(D).request_count == 1
    assert ledger.load(D).streaming_count == 1


def test_finishing_a_prefill_twice_is_finishing_it_once() -> None:
    ledger = Ledger()
    ledger.begin(SPLIT, 0.0)
    ledger.finish_prefill(SPLIT.request_id, 0.1)
    ledger.finish_prefill(SPLIT.request_id, 0.2)
    ledger.validate()
    assert ledger.load(D).streaming_count == 1


def test_a_request_begins_once() -> None:
    ledger = Ledger()
    ledger.begin(SPLIT, 0.0)
    with pytest.raises(AssertionError, match="already in the ledger"):
        ledger.begin(SPLIT, 0.0)


def test_the_wait_shrinks_with_time_but_not_past_the_oldest_prefill() -> None:
    ledger = Ledger()
    for index in range(3):
        ledger.begin(replace(SPLIT, request_id=RequestId(f"r{index}")), 10.0)
    load = ledger.load(P)
    assert load.pending_prefill_s(9.0) == pytest.approx(0.3)
    assert load.pending_prefill_s(10.0) == pytest.approx(0.3)
    assert load.pending_prefill_s(10.04) == pytest.approx(0.26)
    # Nothing was heard of the first, so the second is not taken to have started.
    assert load.pending_prefill_s(99.0) == pytest.approx(0.2)

    ledger.finish_prefill(RequestId("r0"), 10.1)
    assert load.pending_prefill_s(10.1) == pytest.approx(0.2)
    assert load.pending_prefill_s(10.15) == pytest.approx(0.15)


def test_a_later_prefill_that_ends_first_leaves_the_oldest_its_progress() -> None:
    ledger = Ledger()
    for index in range(3):
        ledger.begin(replace(SPLIT, request_id=RequestId(f"r{index}")), 10.0)
    ledger.end(RequestId("r1"), 10.06)
    assert ledger.load(P).pending_prefill_s(10.06) == pytest.approx(0.14)


def test_a_prefill_sent_to_an_idle_endpoint_starts_when_it_is_sent() -> None:
    ledger = Ledger()
    ledger.begin(SPLIT, 0.0)
    ledger.end(SPLIT.request_id, 1.0)
    ledger.begin(replace(SPLIT, request_id=RequestId("r9")), 50.0)
    assert ledger.load(P).pending_prefill_s(50.05) == pytest.approx(0.05)


def sample(running: int, waiting: int) -> Sample:
    return Sample(running, waiting, 0.0, 0.0)


def test_others_are_what_a_sample_counts_beyond_our_own() -> None:
    ledger = Ledger()
    assert ledger.load(D).others(None) == 0
    assert ledger.load(D).others(sample(2, 1)) == 3

    ledger.begin(LOCAL, 0.0)
    ledger.note_sample(D, 1.0)
    assert ledger.load(D).others(sample(2, 1)) == 2
    assert ledger.load(D).others(sample(0, 0)) == 0


def test_own_requests_that_ended_since_the_last_sample_are_not_taken_for_others() -> None:
    ledger = Ledger()
    ledger.begin(LOCAL, 0.0)
    ledger.begin(SPLIT, 0.0)
    ledger.end(LOCAL.request_id, 0.1)
    ledger.end(SPLIT.request_id, 0.1)
    ledger.note_sample(D, 1.0)  # The engine may still have counted both.
    assert ledger.load(D).others(sample(2, 0)) == 0
    ledger.note_sample(D, 1.0)
    assert ledger.load(D).others(sample(2, 0)) == 2


def test_each_request_sent_puts_its_endpoints_last_in_turn() -> None:
    ledger = Ledger()
    ledger.begin(SPLIT, 0.0)
    ledger.begin(replace(LOCAL, decode=E, worker=E), 0.0)
    assert ledger.load(P).begun_ordinal == ledger.load(D).begun_ordinal < ledger.load(E).begun_ordinal
    assert ledger.load(EndpointId("never")).begun_ordinal == 0


def test_an_account_in_use_is_not_forgotten() -> None:
    ledger = Ledger()
    ledger.begin(LOCAL, 0.0)
    ledger.forget(D)
    assert ledger.load(D).request_count == 1
    ledger.end(LOCAL.request_id, 0.0)
    ledger.forget(D)
    assert ledger.load(D) == Load()


def test_validate_sees_a_cooked_account() -> None:
    ledger = Ledger()
    ledger.begin(LOCAL, 0.0)
    ledger.load(D).context_tokens += 1
    with pytest.raises(AssertionError, match="context"):
        ledger.validate()


def test_a_whole_answers_prefill_is_over_when_its_predicted_time_is() -> None:
    """Nobody tells of its end: such an answer begins when it is complete."""
    ledger = Ledger()
    for index in range(3):
        entry = Entry(RequestId(f"whole-{index}"), D, D, 1_000_000, 100, 0, is_streamed=False)
        ledger.begin(entry, 0.0)
    assert ledger.load(D).pending_prefill_s(0.0) == pytest.approx(3.0)
    ledger.note_sample(D, 2.5)
    ledger.validate()
    assert ledger.load(D).pending_prefill_s(2.5) == pytest.approx(0.5)
    assert ledger.load(D).streaming_count == 2
    ledger.begin(Entry(RequestId("streamed"), D, D, 1_000_000, 100, 0), 9.0)
    ledger.note_sample(D, 60.0)
    assert ledger.load(D).pending_prefill_s(9.5) == pytest.approx(0.5)
    for name in ("whole-0", "whole-1", "whole-2", "streamed"):
        ledger.end(RequestId(name), 61.0)
    ledger.validate()
