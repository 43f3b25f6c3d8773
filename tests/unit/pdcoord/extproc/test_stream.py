"""The machine of one stream: transcripts of every mode, and any order of messages."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdcoord.core.events import Outcome
from pdcoord.core.plan import Plan
from pdcoord.extproc.stream import Stream
from pdcoord.extproc.vocabulary import (
    CHUNK_BYTES_MAX,
    Action,
    AnswerBody,
    AnswerHead,
    AnswerTrailers,
    Ask,
    Began,
    BodyMode,
    Closed,
    End,
    Ended,
    Event,
    Failed,
    Headers,
    Immediate,
    Modes,
    Moved,
    Refused,
    RequestBody,
    RequestHead,
    RequestTrailers,
    ResponseBody,
    ResponseHead,
    ResponseTrailers,
    Route,
    Routed,
    TimedOut,
)
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.wire.room import ByteRoom

CHAT: Headers = [(b":method", b"POST"), (b":path", b"/v1/chat/completions?x=1")]
GET: Headers = [(b":method", b"GET"), (b":path", b"/v1/models")]
DUPLEX = BodyMode.FULL_DUPLEX_STREAMED
STREAM: Headers = [(b":status", b"200"), (b"content-type", b"text/event-stream")]
END = End()
USAGE = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'


class Told:
    """A machine told one thing after another; validated after each."""

    def __init__(self, plan: Plan | None = None, body: bytes | None = None) -> None:
        self.room = ByteRoom(300_000)
        self.stream = Stream(body_bytes_max=200_000, body_timeout_s=5.0, room=self.room)
        self.route = Route("10.0.0.2:8000,10.0.0.9:8000", plan=plan, body=body, request_id=b"r")

    def __call__(self, event: Event) -> list[Action]:
        actions = self.stream.handle(event)
        self.stream.validate()
        return actions

    def head(self, headers: Headers = CHAT, mode: BodyMode = DUPLEX, **more: Any) -> list[Action]:
        modes = Modes(mode, more.pop("response", DUPLEX), more.pop("is_body_early", False))
        return self(RequestHead(headers, modes=modes, **more))

    def routed(self) -> list[Action]:
        return self(Routed(self.route))

    def sent(self) -> None:
        """Until the request has gone its way."""
        self.head()
        self(RequestBody(b"{}", is_end=True))
        self.routed()


@pytest.fixture
def told(plan: Callable[..., Plan]) -> Told:
    return Told(plan("r"))


def streamed(data: bytes, *, is_end: bool = False, is_request: bool = True) -> AnswerBody:
    return AnswerBody(is_request, data, is_end, is_streamed=True)


def reason_of(actions: list[Action]) -> RefuseReason:
    (immediate,) = (action for action in actions if isinstance(action, Immediate))
    return immediate.refusal.reason


def test_a_streamed_call_from_head_to_end(told: Told) -> None:
    assert told.head() == []
    assert told.stream.is_reading
    assert told(RequestBody(b'{"a":', is_end=False)) == []
    (ask,) = told(RequestBody(b"1}", is_end=True))
    assert isinstance(ask, Ask)
    assert ask.body == b'{"a":1}'
    assert told.stream.is_asking
    assert told.routed() == [AnswerHead(is_request=True, route=told.route), streamed(b'{"a":1}', is_end=True)]
    served = b'{"mode":"colocated"}'
    (answer,) = told(ResponseHead([*STREAM, (b"x-pdcoord-served", served), (b"x-pdcoord-reason", b"x")]))
    assert isinstance(answer, AnswerHead)
    assert answer.removed == [b"x-pdcoord-served"]
    assert dict(answer.headers) == {
        b"x-request-id": b"r",
        b"x-pdcoord-decision": b"colocated; colocated-faster",
    }
    began, echo = told(ResponseBody(b"data: 1\n\n", is_end=False))
    assert isinstance(began, Began)
    assert began.served is not None
    assert echo == streamed(b"data: 1\n\n", is_request=False)
    assert told(ResponseBody(USAGE, is_end=True)) == [
        streamed(USAGE, is_end=True, is_request=False),
        Ended(Outcome.OK, 7),
        END,
    ]
    assert told(Closed()) == []


def test_a_stream_that_its_engine_gave_up_is_the_engines_fault(told: Told) -> None:
    told.sent()
    told(ResponseHead(STREAM))
    for event in (b'{"type":"message_delta","delta":{"stop_reason":null}}', b'{"type":"message_stop"}'):
        told(ResponseBody(b"data: " + event + b"\n\n", is_end=False))
    *_, ended, end = told(ResponseBody(b"", is_end=True))
    assert isinstance(ended, Ended)
    assert (ended.outcome, end) == (Outcome.UPSTREAM_ERROR, END)


def test_a_body_that_ends_in_trailers_has_no_end_in_its_chunks(told: Told) -> None:
    told.head()
    told(RequestBody(b"{}", is_end=False))
    (ask,) = told(RequestTrailers())
    assert isinstance(ask, Ask)
    answers = told.routed()
    assert answers[1:] == [streamed(b"{}"), AnswerTrailers(is_request=True)]
    told(ResponseHead(STREAM))
    told(ResponseBody(b"x", is_end=False))
    assert told(ResponseTrailers()) == [AnswerTrailers(is_request=False), Ended(Outcome.OK, 0), END]


def test_a_buffered_body_carries_the_route_in_its_answer(told: Told) -> None:
    assert told.head(mode=BodyMode.BUFFERED) == [AnswerHead(is_request=True)]
    told(RequestBody(b"{}", is_end=False))
    assert told.routed() == [AnswerBody(is_request=True, route=told.route)]
    assert told(RequestTrailers()) == [AnswerTrailers(is_request=True)]


def test_a_part_of_a_body_is_not_taken_for_all_of_it(told: Told) -> None:
    told.head(mode=BodyMode.BUFFERED_PARTIAL)
    assert reason_of(told(RequestBody(b"{", is_end=False))) is RefuseReason.BODY_TOO_LARGE


@pytest.mark.parametrize("changed", [None, b"other"])
def test_a_streamed_body_that_comes_early_is_answered_part_by_part(told: Told, changed: bytes | None) -> None:
    told.route.body = changed
    assert told.head(mode=BodyMode.STREAMED, is_body_early=True) == []
    told(RequestBody(b"{", is_end=False))
    told(RequestBody(b"}", is_end=True))
    empty = None if changed is None else b""
    assert told.routed() == [
        AnswerHead(is_request=True, route=told.route),
        AnswerBody(is_request=True, data=changed),
        AnswerBody(is_request=True, data=empty),
    ]


def test_envoy_is_asked_to_buffer_what_it_would_stream_too_late(told: Told) -> None:
    assert told.head(mode=BodyMode.STREAMED) == [AnswerHead(is_request=True, is_buffering=True)]
    told(RequestBody(b"{}", is_end=True))
    assert told.routed() == [AnswerBody(is_request=True, route=told.route)]


def test_an_envoy_that_streams_on_nevertheless_is_told_what_to_set(told: Told) -> None:
    told.head(mode=BodyMode.STREAMED)
    actions = told(RequestBody(b"{", is_end=False))
    assert reason_of(actions) is RefuseReason.INTERNAL
    assert actions[-1] == END


def test_grpc_bodies_are_not_for_us(told: Told) -> None:
    assert reason_of(told.head(mode=BodyMode.GRPC)) is RefuseReason.INTERNAL


@pytest.mark.parametrize(
    ("headers", "mode", "is_end"),
    [(GET, DUPLEX, True), (CHAT, DUPLEX, True), (CHAT, BodyMode.NONE, False), (GET, DUPLEX, False)],
)
def test_without_a_body_to_read_any_endpoint_is_asked_for_at_once(
    headers: Headers, mode: BodyMode, is_end: bool
) -> None:
    told = Told()
    (ask,) = told.head(headers, mode, is_end=is_end)
    assert isinstance(ask, Ask)
    assert ask.body is None
    assert told.routed() == [AnswerHead(is_request=True, route=told.route)]
    (answer,) = told(ResponseHead([(b":status", b"200")]))
    assert isinstance(answer, AnswerHead)
    assert told(ResponseBody(b"x", is_end=True)) == [streamed(b"x", is_end=True, is_request=False), END]


def test_the_body_of_another_path_passes_as_it_comes() -> None:
    told = Told()
    told.head([(b":method", b"POST"), (b":path", b"/v1/audio/transcriptions")])
    told.routed()
    big = bytes(CHUNK_BYTES_MAX * 2 + 1)
    chunks = told(RequestBody(big, is_end=False))
    assert b"".join(bytes(chunk.data or b"") for chunk in chunks if isinstance(chunk, AnswerBody)) == big
    assert told(RequestBody(b"", is_end=True)) == [streamed(b"", is_end=True)]


@pytest.mark.parametrize("length", [b"200001", b"9" * 40])
def test_a_body_that_says_it_is_too_long_is_not_waited_for(told: Told, length: bytes) -> None:
    assert reason_of(told.head([*CHAT, (b"content-length", length)])) is RefuseReason.BODY_TOO_LARGE


def test_a_body_that_gets_too_long_is_cut(told: Told) -> None:
    told.head()
    assert told(RequestBody(bytes(200_000), is_end=False)) == []
    actions = told(RequestBody(b"x", is_end=False))
    assert reason_of(actions) is RefuseReason.BODY_TOO_LARGE
    assert actions[-1] == END


def test_a_body_for_which_there_is_no_room_is_refused_and_what_was_taken_given_back(told: Told) -> None:
    others = 150_000
    assert told.room.take(others)
    told.head()
    assert told(RequestBody(bytes(100_000), is_end=False)) == []
    actions = told(RequestBody(bytes(50_001), is_end=False))
    assert reason_of(actions) is RefuseReason.SATURATED
    assert actions[-1] == END
    for _ in range(2):
        told.stream.let_go()
        assert told.room.held_bytes == others


@pytest.mark.parametrize("mode", [DUPLEX, BodyMode.BUFFERED, BodyMode.STREAMED])
def test_a_body_takes_room_until_its_route_is_there(told: Told, mode: BodyMode) -> None:
    told.head(mode=mode, is_body_early=True)
    told(RequestBody(b"{}" * 500, is_end=True))
    assert told.room.held_bytes == 1_000
    told.routed()
    told.stream.let_go()
    assert told.room.held_bytes == 0


def test_a_body_that_does_not_end_is_answered_in_time(told: Told) -> None:
    told.head()
    assert reason_of(told(TimedOut())) is RefuseReason.BODY_TOO_SLOW


def test_a_plan_that_does_not_come_is_answered_in_time(told: Told) -> None:
    told.head()
    told(RequestBody(b"{}", is_end=True))
    actions = told(TimedOut())
    assert reason_of(actions) is RefuseReason.UPSTREAM_TIMEOUT
    assert actions[1:] == [Ended(Outcome.UPSTREAM_ERROR), END]


def test_a_response_that_does_not_end_is_ended_with_its_account(told: Told) -> None:
    told.sent()
    ended, end = told(TimedOut())
    assert ended == Ended(Outcome.UPSTREAM_ERROR)
    assert isinstance(end, End)
    assert end.violation


def test_a_refusal_is_answered_at_once_and_nothing_is_accounted(told: Told) -> None:
    told.head()
    told(RequestBody(b"{}", is_end=True))
    refusal = Refusal(RefuseReason.SATURATED, "Full.")
    assert told(Refused(refusal)) == [Immediate(refusal), END]


def test_envoy_leaves_while_a_plan_is_awaited(told: Told) -> None:
    told.head()
    told(RequestBody(b"{}", is_end=True))
    assert told(Closed()) == [Ended(Outcome.CLIENT_GONE), END]
    assert told.routed() == []


def test_envoy_answers_by_itself_while_a_plan_is_awaited(told: Told) -> None:
    told.head()
    told(RequestBody(b"{}", is_end=True))
    actions = told(ResponseHead([(b":status", b"504")]))
    assert actions == [Ended(Outcome.UPSTREAM_ERROR), AnswerHead(is_request=False)]
    assert not told.stream.is_asking
    assert told.routed() == []


def test_another_endpoint_answered_than_the_first(told: Told) -> None:
    told.sent()
    moved, *_ = told(ResponseHead(STREAM, served_by="10.0.0.9:8000"))
    assert moved == Moved("10.0.0.9:8000")


@pytest.mark.parametrize(
    ("headers", "details", "reason"),
    [
        ([(b":status", b"500")], "", RungReason.DECODE_ERROR),
        ([(b":status", b"503")], "", RungReason.DECODE_OVERLOADED),
        ([(b":status", b"429"), (b"x-pdcoord-reason", b"queue-full")], "", RungReason.DECODE_OVERLOADED),
        ([(b":status", b"504")], "upstream_response_timeout", RungReason.DECODE_TIMEOUT),
        (
            [(b":status", b"503")],
            "upstream_reset_before_response_started{connection_failure|x}",
            RungReason.DECODE_UNREACHABLE,
        ),
        (
            [(b":status", b"503")],
            "upstream_reset_before_response_started{remote_reset}",
            RungReason.DECODE_ERROR,
        ),
    ],
)
def test_a_failure_ends_the_account_and_passes(
    told: Told, headers: Headers, details: str, reason: RungReason
) -> None:
    told.sent()
    failed, answer = told(ResponseHead(headers, details=details))
    assert failed == Failed(int(headers[0][1]), reason, None)
    assert isinstance(answer, AnswerHead)
    assert told(ResponseBody(b"why", is_end=True)) == [streamed(b"why", is_end=True, is_request=False), END]


def test_the_clients_own_error_is_a_response_like_any_other(told: Told) -> None:
    told.sent()
    began, _ = told(ResponseHead([(b":status", b"400")]))
    assert began == Began(400, None)
    assert told(ResponseBody(b"{}", is_end=True))[1:] == [Ended(Outcome.CLIENT_ERROR), END]


def test_a_response_without_a_body_begins_and_ends_with_its_head(told: Told) -> None:
    told.sent()
    began, _, ended, end = told(ResponseHead([(b":status", b"204")], is_end=True))
    assert (began, ended, end) == (Began(204, None), Ended(Outcome.OK), END)


@pytest.mark.parametrize("is_told", [True, False])
def test_without_response_bodies_the_end_of_the_stream_ends_the_call(told: Told, is_told: bool) -> None:
    if is_told:
        told.head(response=BodyMode.NONE)
    else:
        told(RequestHead(CHAT))
    told(RequestBody(b"{}", is_end=True))
    told.routed()
    began, _ = told(ResponseHead(STREAM))
    assert isinstance(began, Began)
    ended, end = told(Closed())
    assert isinstance(ended, Ended)
    assert (ended.outcome, end) == (Outcome.OK, END)


@pytest.mark.parametrize("mode", [BodyMode.STREAMED, BodyMode.BUFFERED])
def test_response_bodies_that_envoy_keeps_are_left_as_they_are(told: Told, mode: BodyMode) -> None:
    told.head(response=mode)
    told(RequestBody(b"{}", is_end=True))
    told.routed()
    told(ResponseHead([(b":status", b"200"), (b"content-encoding", b"gzip")]))
    _, answer, ended, _ = told(ResponseBody(b"x", is_end=True))
    assert answer == AnswerBody(is_request=False)
    assert ended == Ended(Outcome.OK)


def test_a_client_that_leaves_in_the_middle_of_an_answer(told: Told) -> None:
    told.sent()
    told(ResponseHead(STREAM))
    told(ResponseBody(b"data: 1\n\n", is_end=False))
    assert told(Closed()) == [Ended(Outcome.CLIENT_GONE, 1), END]


def test_who_only_watches_is_not_answered(told: Told) -> None:
    assert told.head(is_watched=True) == [END]


def test_conformance_tests_are_told_who_answered() -> None:
    told = Told()
    told.route.is_conformance = True
    told.head(GET, is_end=True)
    told.routed()
    (answer,) = told(ResponseHead([(b":status", b"200")], served_by="10.0.0.9:8000"))
    assert isinstance(answer, AnswerHead)
    assert (b"x-conformance-test-served-endpoint", b"10.0.0.9:8000") in answer.headers


@pytest.mark.parametrize(
    "wrong",
    [RequestBody(b"", is_end=True), RequestTrailers(), ResponseTrailers(), ResponseBody(b"", is_end=True)],
)
def test_nothing_comes_before_a_head(told: Told, wrong: Event) -> None:
    actions = told(wrong)
    assert reason_of(actions) is RefuseReason.INTERNAL
    assert isinstance(actions[-1], End)
    assert actions[-1].violation


def test_an_answer_without_a_request_passes_and_takes_its_time(told: Told) -> None:
    modes = Modes(response_body=BodyMode.STREAMED)
    assert told(ResponseHead([(b":status", b"403")], modes=modes)) == [AnswerHead(is_request=False)]
    assert not told.stream.is_reading
    assert told(ResponseBody(b"no", is_end=True)) == [AnswerBody(is_request=False), END]


@pytest.mark.parametrize(
    "wrong",
    [RequestHead(CHAT), RequestBody(b"", is_end=True), RequestTrailers(), ResponseBody(b"", is_end=True)],
)
def test_what_comes_out_of_order_later_ends_the_stream_and_the_account(told: Told, wrong: Event) -> None:
    told.sent()
    ended, end = told(wrong)
    assert ended == Ended(Outcome.UPSTREAM_ERROR)
    assert isinstance(end, End)
    assert end.violation


@given(st.binary(max_size=3 * CHUNK_BYTES_MAX), st.lists(st.integers(1, 70_000), max_size=12), st.booleans())
def test_any_cutting_of_a_body_comes_back_whole_in_legal_chunks(
    body: bytes, cuts: list[int], has_trailers: bool
) -> None:
    told = Told()
    told.head()
    rest, parts = body, []
    for cut in cuts:
        parts.append(rest[:cut])
        rest = rest[cut:]
    for part in parts:
        told(RequestBody(part, is_end=False))
    told(RequestBody(rest, is_end=not has_trailers))
    if has_trailers:
        told(RequestTrailers())
    assert told.stream.is_asking
    _, *answers = told.routed()
    chunks = [answer for answer in answers if isinstance(answer, AnswerBody)]
    assert b"".join(bytes(chunk.data or b"") for chunk in chunks) == body
    assert all(len(chunk.data or b"") <= CHUNK_BYTES_MAX for chunk in chunks)
    assert [chunk.is_end for chunk in chunks[:-1]] == [False] * (len(chunks) - 1 if chunks else 0)
    assert not chunks or chunks[-1].is_end is not has_trailers
    assert isinstance(answers[-1], AnswerTrailers) is has_trailers


@pytest.mark.parametrize("length", [CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, 2 * CHUNK_BYTES_MAX, 199_999])
def test_only_the_last_chunk_has_the_end(told: Told, length: int) -> None:
    told.head()
    told(RequestBody(bytes(length), is_end=True))
    _, *chunks = told.routed()
    assert all(isinstance(chunk, AnswerBody) for chunk in chunks)
    sizes = [(len(chunk.data or b""), chunk.is_end) for chunk in chunks if isinstance(chunk, AnswerBody)]
    assert sum(size for size, _ in sizes) == length
    assert max(sizes)[0] <= CHUNK_BYTES_MAX
    assert [is_end for _, is_end in sizes] == [False] * (len(sizes) - 1) + [True]


EVENTS = st.one_of(
    st.builds(
        RequestHead,
        st.sampled_from([CHAT, GET]),
        st.booleans(),
        st.none(),
        st.none() | st.builds(Modes, st.sampled_from(BodyMode), st.sampled_from(BodyMode), st.booleans()),
        st.just(False),
    ),
    st.builds(RequestBody, st.binary(max_size=4), st.booleans()),
    st.just(RequestTrailers()),
    st.builds(
        ResponseHead,
        st.sampled_from([STREAM, [(b":status", b"503")], [(b":status", b"404")], []]),
        st.booleans(),
        st.sampled_from([None, "10.0.0.2:8000", "10.0.0.9:8000"]),
    ),
    st.builds(ResponseBody, st.binary(max_size=4), st.booleans()),
    st.just(ResponseTrailers()),
    st.sampled_from(["routed", "refused"]),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # The fixture is a pure function.
@given(st.lists(EVENTS, max_size=12), st.sampled_from([Closed(), TimedOut()]))
def test_whatever_comes_every_account_ends_once_and_the_stream_ends(
    plan: Callable[..., Plan], events: list[Event | str], last: Event
) -> None:
    told = Told(plan("r"))
    actions: list[Action] = []
    is_live = False
    for event in [*events, last]:
        if event == "refused":
            given_event: Event = Refused(Refusal(RefuseReason.SATURATED, "Full."))
        else:
            given_event = Routed(told.route) if isinstance(event, str) else event
        was_asking = told.stream.is_asking
        new = told(given_event)
        is_live = is_live or (isinstance(given_event, Routed) and was_asking)
        actions += new
    ends = [action for action in actions if isinstance(action, Ended | Failed)]
    assert len(ends) <= 1
    assert len([action for action in actions if isinstance(action, Began)]) <= 1
    if is_live:
        assert len(ends) == 1
    assert told.stream.is_over
    assert [action for action in actions if isinstance(action, End)] == actions[-1:]
    immediates = [index for index, action in enumerate(actions) if isinstance(action, Immediate)]
    routed = [
        i for i, a in enumerate(actions) if isinstance(a, AnswerHead | AnswerBody) and a.route is not None
    ]
    assert len(immediates) + len(routed) <= 1
