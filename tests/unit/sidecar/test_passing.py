"""What is passed on is kept, and only what is more than a sign of life is progress."""

import pytest

from pdcoord.resume.errors import TornError
from pdcoord.resume.tape import Shelf, Tape
from sidecar.passing import Recorder

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


def test_the_end_gives_what_was_held_back() -> None:
    recorder = Recorder(tape())
    recorder(EVENT + b"data: [DO")
    assert recorder.end(b"NE]") == b"data: [DONE]"
    assert Recorder(tape()).end(b"") == b""


def test_an_engine_s_own_word_for_its_failure_is_not_passed_on() -> None:
    kept = tape()
    recorder = Recorder(kept)
    with pytest.raises(TornError):
        recorder(EVENT + b'data: {"error": {"message": "died"}}\n\n')
    assert kept.pending == EVENT
