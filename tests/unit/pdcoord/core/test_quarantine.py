"""The quarantine: transcripts of each rule, and any interleaving of events by a state machine."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core.fleet import EndpointId
from pdcoord.core.quarantine import Gone, Ill, Over, Quarantine, Sent, Shown, TimeCame, Turned, Well
from pdcoord.core.request import RequestId
from pdcoord.core.trouble import (
    FAILED_MAX,
    FAILURES_MAX,
    OUT_S_MAX,
    OUT_S_MIN,
    READMITTED_AT,
    RELAPSE_S,
    STEP_S_MAX,
    Phase,
    Symptom,
    Track,
)

A, B, C, D = (EndpointId(name) for name in "abcd")


class Ward:
    """A quarantine over endpoints that stand in for each other, with requests numbered as they come."""

    def __init__(self, *names: EndpointId, share_max: float = 0.5) -> None:
        self.names = list(names)
        self.quarantine = Quarantine(lambda _: self.names, lambda _: share_max)
        self.now_s = 0.0
        self.count = 0
        self.live: set[RequestId] = set()

    def tell(self, event: object) -> list[Turned]:
        turned = self.quarantine.handle(event, self.now_s)  # type: ignore[arg-type]
        self.quarantine.validate(self.names, self.live)
        return turned

    def send(self, endpoint: EndpointId = A) -> RequestId:
        self.count += 1
        request = RequestId(f"r{self.count}")
        self.live.add(request)
        self.tell(Sent(endpoint, request))
        return request

    def over(self, request: RequestId) -> None:
        self.tell(Over(request))
        self.live.discard(request)

    def fail(
        self, endpoint: EndpointId = A, symptom: Symptom = Symptom.ERROR, partner: EndpointId | None = None
    ) -> list[Turned]:
        request = self.send(endpoint)
        turned = self.tell(Ill(endpoint, symptom, request, partner))
        self.over(request)
        return turned

    def succeed(self, endpoint: EndpointId = A, track: Track = Track.START) -> list[Turned]:
        request = self.send(endpoint)
        turned = self.tell(Well(endpoint, track, request))
        self.over(request)
        return turned

    def put_out(self, endpoint: EndpointId = A, symptom: Symptom = Symptom.ERROR) -> None:
        for _ in range(FAILURES_MAX):
            self.fail(endpoint, symptom)
        assert self.phase(endpoint) is Phase.OUT

    def wait(self, seconds: float) -> list[Turned]:
        self.now_s += seconds
        return self.tell(TimeCame())

    def phase(self, endpoint: EndpointId = A) -> Phase | None:
        trouble = self.quarantine.trouble(endpoint)
        return trouble.phase if trouble is not None else None

    def lets_pass(self, endpoint: EndpointId = A) -> bool:
        return self.quarantine.lets_pass(endpoint, self.now_s)

    def let_in(self, endpoint: EndpointId = A) -> list[RequestId]:
        """As many requests as are let in at a time."""
        sent = []
        while self.lets_pass(endpoint) and len(sent) <= 2 * READMITTED_AT:
            sent.append(self.send(endpoint))
        return sent


def test_several_failures_in_a_row_put_an_endpoint_out() -> None:
    ward = Ward(A, B)
    assert [ward.fail() for _ in range(FAILURES_MAX - 1)] == [[]] * (FAILURES_MAX - 1)
    assert (ward.phase(), ward.lets_pass()) == (Phase.SUSPECTED, True)
    assert ward.fail() == [Turned(A, Phase.OUT, Symptom.ERROR)]
    assert (ward.lets_pass(), ward.lets_pass(B)) == (False, True)
    assert set(ward.quarantine.barred) == {A}


def test_isolated_failures_do_not_and_are_forgotten() -> None:
    ward = Ward(A, B)
    for _ in range(20):
        ward.fail()
        for _ in range(99):
            ward.succeed()
        assert ward.phase() is None
    assert list(ward.quarantine.troubles()) == []


def test_every_other_failure_puts_it_out_within_the_window() -> None:
    ward = Ward(A, B)
    for _ in range(FAILED_MAX - 1):
        assert ward.fail() == []
        ward.succeed()
    assert ward.fail() == [Turned(A, Phase.OUT, Symptom.ERROR)]


def test_a_first_output_does_not_make_good_streams_that_stall() -> None:
    ward = Ward(A, B)
    for _ in range(FAILURES_MAX):
        ward.succeed(track=Track.START)
        ward.fail(symptom=Symptom.STALLED)
    assert ward.phase() is Phase.OUT


def test_it_is_let_back_in_step_by_step() -> None:
    ward = Ward(A, B)
    ward.put_out()
    assert ward.quarantine.next_event_s() == OUT_S_MIN
    assert ward.wait(OUT_S_MIN) == [Turned(A, Phase.READMITTING, Symptom.ERROR)]
    rounds = []
    while ward.phase() is Phase.READMITTING:
        sent = ward.let_in()
        rounds.append(len(sent))
        for request in sent:
            ward.tell(Well(A, Track.START, request))
            ward.over(request)
    assert rounds == [1, 2, 4, 8, 16]
    assert ward.phase() is Phase.SUSPECTED
    assert ward.quarantine.next_event_s() is None
    ward.now_s += RELAPSE_S
    assert ward.succeed() == [Turned(A, None, Symptom.ERROR)]


def test_a_failure_on_the_way_sends_it_back_for_longer() -> None:
    ward = Ward(A, B)
    ward.put_out()
    periods = []
    for _ in range(9):
        until_s = ward.quarantine.next_event_s()
        assert until_s is not None
        periods.append(until_s - ward.now_s)
        ward.wait(periods[-1])
        assert ward.fail() == [Turned(A, Phase.OUT, Symptom.ERROR)]
    assert periods == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, OUT_S_MAX, OUT_S_MAX, OUT_S_MAX]


def test_a_relapse_soon_after_is_out_for_longer_and_one_much_later_is_not() -> None:
    ward = Ward(A, B)

    def recover() -> None:
        ward.wait(OUT_S_MAX)
        while ward.phase() is Phase.READMITTING:
            ward.succeed()

    ward.put_out()
    recover()
    ward.put_out()
    trouble = ward.quarantine.trouble(A)
    assert trouble is not None
    assert trouble.out_s == 2 * OUT_S_MIN
    recover()
    ward.now_s += RELAPSE_S
    ward.put_out()
    trouble = ward.quarantine.trouble(A)
    assert trouble is not None
    assert trouble.out_s == OUT_S_MIN


def test_what_was_sent_before_is_old_news() -> None:
    ward = Ward(A, B)
    old = [ward.send() for _ in range(5)]
    ward.put_out()
    ward.wait(OUT_S_MIN)
    for request in old[:3]:
        assert ward.tell(Ill(A, Symptom.TIMEOUT, request)) == []
    assert ward.tell(Well(A, Track.START, old[3])) == []
    trouble = ward.quarantine.trouble(A)
    assert trouble is not None
    assert (trouble.phase, trouble.limit) == (Phase.READMITTING, 1)


def test_one_who_was_out_for_stalls_is_not_let_in_for_first_outputs() -> None:
    ward = Ward(A, B)
    ward.put_out(symptom=Symptom.STALLED)
    ward.wait(OUT_S_MIN)
    request = ward.send()
    ward.tell(Well(A, Track.START, request))
    assert not ward.lets_pass()
    ward.tell(Well(A, Track.FLOW, request))
    assert ward.lets_pass()
    # It passed, and may fail all the same.
    assert ward.tell(Ill(A, Symptom.SLOW, request)) == [Turned(A, Phase.OUT, Symptom.SLOW)]


def test_a_trial_that_tells_nothing_makes_room_for_the_next() -> None:
    ward = Ward(A, B)
    ward.put_out()
    ward.wait(OUT_S_MIN)
    request = ward.send()
    assert not ward.lets_pass()
    ward.over(request)
    assert ward.lets_pass()


def test_without_anything_to_tell_time_lets_it_in() -> None:
    ward = Ward(A, B)
    ward.put_out()
    ward.wait(OUT_S_MIN)
    limits = []
    while ward.phase() is Phase.READMITTING:
        trouble = ward.quarantine.trouble(A)
        assert trouble is not None
        limits.append(trouble.limit)
        turned = ward.wait(STEP_S_MAX)
    assert limits == [1, 2, 4, 8, 16]
    assert [each.phase for each in turned] == [Phase.SUSPECTED]


def test_at_most_a_share_of_those_that_stand_in_for_each_other_is_out() -> None:
    ward = Ward(A, B, C, D)
    for name in (A, B, C, D):
        for _ in range(10):
            ward.fail(name)
    assert sorted(ward.quarantine.barred) == [A, B]
    alone = Ward(A)
    for _ in range(50):
        assert alone.fail() == []


def test_a_share_of_nothing_puts_nobody_out() -> None:
    ward = Ward(A, B, share_max=0.0)
    assert [ward.fail() for _ in range(30)] == [[]] * 30


def test_a_fleet_that_is_slow_as_a_whole_keeps_all() -> None:
    ward = Ward(A, B)
    for _ in range(10):
        for name in (A, B):
            ward.now_s += 1.0
            assert ward.fail(name, Symptom.LATE) == []
            ward.tell(Shown(name))
    assert not ward.quarantine.barred


def test_one_that_shows_nothing_at_all_is_out_though_others_are_late() -> None:
    ward = Ward(A, B, C)
    for _ in range(FAILURES_MAX):
        ward.now_s += 1.0
        for name in (B, C):
            ward.fail(name, Symptom.LATE)
            ward.tell(Shown(name))
        ward.fail(A, Symptom.LATE)
    assert set(ward.quarantine.barred) == {A}


def test_what_may_be_the_other_legs_fault_takes_two_of_those() -> None:
    ward = Ward(A, B)
    for _ in range(10):
        assert ward.fail(symptom=Symptom.PREFILL, partner=C) == []
    assert ward.fail(symptom=Symptom.PREFILL, partner=D) == [Turned(A, Phase.OUT, Symptom.PREFILL)]


def test_a_success_clears_the_other_legs_too() -> None:
    ward = Ward(A, B)
    ward.fail(symptom=Symptom.PREFILL, partner=C)
    ward.succeed(track=Track.PREFILL)
    for _ in range(FAILURES_MAX):
        assert ward.fail(symptom=Symptom.PREFILL, partner=D) == []


def test_used_as_the_last_resort_it_may_show_that_it_works() -> None:
    ward = Ward(A, B)
    ward.put_out()
    assert ward.succeed() == [Turned(A, Phase.READMITTING, Symptom.ERROR)]
    assert ward.lets_pass()


def test_another_process_under_its_name_starts_clear() -> None:
    ward = Ward(A, B)
    ward.put_out()
    ward.wait(OUT_S_MIN)
    request = ward.send()
    ward.tell(Gone(A))
    assert (ward.phase(), ward.lets_pass(), set(ward.quarantine.barred)) == (None, True, set())
    ward.over(request)


class QuarantineMachine(RuleBasedStateMachine):
    """Any order of sends, outcomes and time: bounded, never all out, and always let in again."""

    names = (A, B, C, D)

    def __init__(self) -> None:
        super().__init__()
        self.ward = Ward(*self.names)
        self.under_way: list[tuple[EndpointId, RequestId]] = []

    @rule(name=st.sampled_from(names), is_forced=st.booleans())
    def send(self, name: EndpointId, *, is_forced: bool) -> None:
        if is_forced or self.ward.lets_pass(name):
            self.under_way.append((name, self.ward.send(name)))

    @rule(
        data=st.data(),
        symptom=st.sampled_from(Symptom),
        partner=st.sampled_from([None, A, B, C]),
        ends=st.booleans(),
    )
    def fail(self, data: st.DataObject, symptom: Symptom, partner: EndpointId | None, *, ends: bool) -> None:
        if self.under_way:
            name, request = data.draw(st.sampled_from(self.under_way))
            self.ward.tell(Ill(name, symptom, request, partner))
            if ends:
                self._end(name, request)

    @rule(data=st.data(), track=st.sampled_from(Track), ends=st.booleans())
    def succeed(self, data: st.DataObject, track: Track, *, ends: bool) -> None:
        if self.under_way:
            name, request = data.draw(st.sampled_from(self.under_way))
            self.ward.tell(Well(name, track, request))
            if ends:
                self._end(name, request)

    @rule(name=st.sampled_from(names), symptom=st.sampled_from(Symptom))
    def fail_thrice(self, name: EndpointId, symptom: Symptom) -> None:
        for _ in range(FAILURES_MAX):
            self.ward.fail(name, symptom)

    @rule(name=st.sampled_from(names))
    def show(self, name: EndpointId) -> None:
        self.ward.tell(Shown(name))

    @rule(name=st.sampled_from(names))
    def forget(self, name: EndpointId) -> None:
        self.ward.tell(Gone(name))

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.ward.wait(seconds)

    def _end(self, name: EndpointId, request: RequestId) -> None:
        self.under_way.remove((name, request))
        self.ward.over(request)

    @invariant()
    def half_of_them_take_work(self) -> None:
        assert len(self.ward.quarantine.barred) <= len(self.names) // 2

    @invariant()
    def time_is_known(self) -> None:
        due_s = self.ward.quarantine.next_event_s()
        assert (due_s is not None) == bool(self.ward.quarantine.barred)

    def teardown(self) -> None:
        """Whoever is out is let in again by time alone, or by what it serves well."""
        for name, request in list(self.under_way):
            self._end(name, request)
        for _ in range(12):
            due_s = self.ward.quarantine.next_event_s()
            if due_s is None:
                break
            self.ward.wait(max(due_s - self.ward.now_s, 0.0))
        while self.ward.quarantine.barred:
            due_s = self.ward.quarantine.next_event_s()
            assert due_s is not None
            assert due_s <= self.ward.now_s + STEP_S_MAX
            self.ward.wait(max(due_s - self.ward.now_s, 0.0))
        assert all(self.ward.lets_pass(name) for name in self.names)


TestQuarantineMachine = QuarantineMachine.TestCase
TestQuarantineMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
