"""What is passed on is kept, and only what is more than a sign of life is progress."""

import pytest

from pdcoord.resume.errors import TornError
from pdcoord.resume.tape import Shelf, Tape
from sidecar.passing import Recorder, shows_output

EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'


def tape() -> Tape:
    return Tape(Shelf(1 << 20, 1 << 20), b"{}")


def test_whole_events_are_passed_on_and_kept_as_the_client_sees_them() -> None:
    kept = tape()
    recorder = Recorder(kept, lambda part: part.replace(b'"a"', b'"b"'))
    assert recorder(EVENT[:10]) == b""
    assert (recorder.step_count, recorder.last) == (0, b"")
    assert recorder(EVENT[10:] + EVENT[:3]) == EVENT.replace(b'"a"', b'"b"')
    assert kept.passed == recorder.last
    assert recorder.step_count == 1


@pytest.mark.parametrize("sign", [b": keep-alive\n\n", b'event: ping\ndata: {"type": "ping"}\n\n'])
def test_a_sign_of_life_is_no_progress(sign: bytes) -> None:
    recorder = Recorder(tape())
    assert recorder(sign) == sign
    assert recorder.step_count == 0
    recorder(EVENT)
    assert recorder.step_count == 1


def test_the_end_leaves_an_event_without_its_blank_line_pending() -> None:
    recorder = Recorder(tape())
    recorder(EVENT + b"data: [DO")
    assert recorder.end(b"NE]\n\n: bye") == b"data: [DONE]\n\n"
    assert (recorder.last, recorder.pending) == (b"data: [DONE]\n\n", b": bye")
    assert Recorder(tape()).end(b"") == b""


@pytest.mark.parametrize(
    ("parts", "is_cut_short"),
    [
        ([EVENT, b"data: [DONE]\n\n"], False),
        ([EVENT + b"data: [DONE]\n\n", b": bye\n\n"], False),
        ([EVENT, b"data: [DONE]"], False),
        ([EVENT], True),
        ([EVENT, EVENT.replace(b"a", b"[DONE]")], True),
        ([], True),
    ],
)
def test_a_stream_is_whole_if_it_ends_as_streams_do(parts: list[bytes], is_cut_short: bool) -> None:
    recorder = Recorder(tape())
    for part in parts:
        recorder(part)
    recorder.end(b"")
    assert recorder.is_cut_short is is_cut_short


def test_of_a_stream_that_is_not_kept_nobody_knows_whether_it_is_whole() -> None:
    recorder = Recorder(Tape(Shelf(8, 8), b"{}"))
    recorder(EVENT)
    assert not recorder.is_cut_short


def test_what_comes_before_any_token_is_no_progress() -> None:
    recorder = Recorder(tape())
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    assert recorder(role) == role
    assert recorder.step_count == 0
    assert shows_output(role + EVENT)
    recorder(b": keep-alive\n\n" + EVENT)
    assert recorder.step_count == 1


def test_an_engine_s_own_word_for_its_failure_is_not_passed_on() -> None:
    kept = tape()
    recorder = Recorder(kept)
    with pytest.raises(TornError):
        recorder(EVENT + b'data: {"error": {"message": "died"}}\n\n')
    assert kept.pending == EVENT
