"""A tape passes whole events on, keeps them within its bounds, and finds the engine's own failure."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.resume.tape import BLOCK_BYTES, Shelf, Tape, TornError, seems_whole

RECORDED = Path(__file__).parents[3] / "contract" / "vllm-0.32.0"
BODY = b'{"model":"tiny"}'


def chunk(text: str, finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish} | more
    return b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n"


def new_tape(bytes_max: int = 1 << 20, tape_bytes_max: int = 1 << 20) -> tuple[Shelf, Tape]:
    shelf = Shelf(bytes_max, tape_bytes_max)
    return shelf, Tape(shelf, BODY)


@given(
    blocks=st.lists(st.sampled_from([b"data: {}", b": ping", b"event: x\ndata: 1", b"data: a\r\ndata: b"])),
    ends=st.lists(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n\r\n"]), min_size=1),
    sizes=st.lists(st.integers(1, 40), min_size=1),
    tail=st.sampled_from([b"", b"data: half", b"data: half\r\n\r", b"data: half\n"]),
)
def test_only_whole_events_are_passed_on_however_they_are_cut(
    blocks: list[bytes], ends: list[bytes], sizes: list[int], tail: bytes
) -> None:
    whole = b"".join(block + ends[n % len(ends)] for n, block in enumerate(blocks))
    raw = whole + tail
    shelf, tape = new_tape()
    out, at, turn = b"", 0, 0
    while at < len(raw):
        size = sizes[turn % len(sizes)]
        out += tape(raw[at : at + size])
        assert tape.passed == out
        assert out + tape.pending == raw[: at + size]
        assert out == b"" or out.endswith((b"\n\n", b"\n\r\n"))
        at, turn = at + size, turn + 1
    assert (out, tape.pending) == (whole, tail)
    assert len(BODY) + len(raw) <= shelf.bytes_held < len(BODY) + len(raw) + BLOCK_BYTES
    tape.begin_again()
    tape.close()
    tape.close()
    assert shelf.bytes_held == 0


def test_what_did_not_go_out_takes_no_room() -> None:
    failure = b'data: {"error": {"message": "died"}}\n\n'
    _, tape = new_tape(tape_bytes_max=len(BODY) + len(failure) + 20)
    for _ in range(50):
        tape(b"data: half an event")
        tape.begin_again()
        with pytest.raises(TornError):
            tape(failure)
        tape.begin_again()
    assert tape.is_whole


def test_room_is_taken_in_blocks_and_to_the_last_byte_of_a_bound() -> None:
    event = b"data: " + b"x" * 100 + b"\n\n"
    shelf, tape = new_tape(tape_bytes_max=BLOCK_BYTES + 150)
    tape(event)
    assert shelf.bytes_held == BLOCK_BYTES
    kept = event
    while len(BODY) + len(kept) + len(event) <= BLOCK_BYTES + 150:
        tape(event)
        kept += event
    assert tape.passed == kept
    assert tape.is_whole
    tape(event)
    assert (tape.is_whole, shelf.bytes_held) == (False, 0)


def test_once_it_let_go_parts_go_through_what_comes_after() -> None:
    _, tape = new_tape(tape_bytes_max=100)
    tape.after = bytes.upper
    tape(b"data: hal")
    assert tape(b"f" * 100) == b"DATA: HAL" + b"F" * 100
    assert tape(b"more\n\n") == b"MORE\n\n"


@pytest.mark.parametrize("call", ["chat", "completions", "messages", "responses"])
@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_a_recorded_answer_passes_untouched(call: str, size: int) -> None:
    raw = (RECORDED / f"{call}.bare.sse").read_bytes()
    _, tape = new_tape()
    assert b"".join(tape(raw[at : at + size]) for at in range(0, len(raw), size)) == raw


@pytest.mark.parametrize("call", ["chat", "completions", "messages"])
@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_a_recorded_failure_is_found(call: str, size: int) -> None:
    raw = (RECORDED / f"{call}.failed.sse").read_bytes()
    _, tape = new_tape()
    out = b""
    with pytest.raises(TornError) as torn:
        for at in range(0, len(raw), size):
            out += tape(raw[at : at + size])
    before = tape.pending
    assert b"error" in torn.value.error_event
    assert torn.value.error_event.endswith(b"\n\n")
    assert raw.startswith(out + before + torn.value.error_event)
    assert tape.passed == out + before
    tape.begin_again()
    more = chunk("x")
    assert tape(more) == more


@pytest.mark.parametrize(
    "event",
    [
        chunk("", "abort"),
        chunk("x", "error"),
        b'data: {"error":{"message":"EngineCore died","code":500}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error"}}\n\n',
        b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{}}}\n\n',
    ],
)
def test_what_came_before_a_failure_in_the_same_part_is_left_to_be_sent(event: bytes) -> None:
    _, tape = new_tape()
    tape(chunk("a"))
    with pytest.raises(TornError) as torn:
        tape(chunk("b") + event + b"data: [DONE]\n\n")
    assert tape.pending == chunk("b")
    assert tape.passed == chunk("a") + chunk("b")
    assert torn.value.error_event == event


@pytest.mark.parametrize(
    "event",
    [
        chunk('"error"'),
        chunk("x", logprobs={"tokens": ["error", "abort"]}),
        chunk('{"finish_reason":"abort"}'),
        b'data: {"type":"response.created","response":{"error":null},"error":null}\n\n',
        b'data: "error" is not JSON\n\n',
        b': "error"\n\n',
    ],
)
def test_the_words_alone_are_no_failure(event: bytes) -> None:
    _, tape = new_tape()
    assert tape(event) == event


@pytest.mark.parametrize(("bytes_max", "tape_bytes_max"), [(1 << 20, 400), (400, 1 << 20)])
def test_past_a_bound_it_lets_go_and_passes_everything_on(bytes_max: int, tape_bytes_max: int) -> None:
    shelf, tape = new_tape(bytes_max, tape_bytes_max)
    raw = b"".join(chunk(str(n)) for n in range(20))
    out = b"".join(tape(raw[at : at + 30]) for at in range(0, len(raw), 30))
    assert out == raw
    assert not tape.is_whole
    assert (tape.pending, tape.passed, shelf.bytes_held) == (b"", b"", 0)
    assert tape(b"half") == b"half"


def test_a_request_that_is_too_large_is_not_kept() -> None:
    shelf = Shelf(100, 10)
    tape = Tape(shelf, b"x" * 11)
    assert (tape.is_whole, shelf.bytes_held) == (False, 0)


def test_one_long_tape_does_not_take_the_room_of_others() -> None:
    shelf = Shelf(100, 60)
    first, second = Tape(shelf, b"x" * 50), Tape(shelf, b"x" * 50)
    assert first.is_whole
    assert second.is_whole
    second(b"data: 1\n\n")
    assert not second.is_whole
    assert first.is_whole
    assert shelf.bytes_held == 50
    first.close()
    assert shelf.bytes_held == 0


DONE = b"data: [DONE]\n\n"
STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'


@pytest.mark.parametrize(
    ("stream", "is_whole"),
    [
        (chunk("a", "stop") + DONE, True),
        (chunk("a", "stop") + DONE + b": bye\n\n", True),
        (chunk("a", "stop") + DONE.rstrip(), True),
        (DONE.replace(b"\n", b"\r\n"), True),
        (chunk("a") + STOP, True),
        (b'event: response.completed\ndata: {"response": {}, "type": "response.completed"}\n\n', True),
        (b"", False),
        (chunk("a"), False),
        (chunk("data: [DONE]"), False),
        (chunk('"type": "message_stop"'), False),
        (chunk("a") + b"data: [DO", False),
        (DONE + chunk("a"), False),
        (b"data: [1]\n\n", False),
    ],
)
def test_a_stream_seems_whole_if_its_last_event_ends_it(stream: bytes, is_whole: bool) -> None:
    assert seems_whole(stream) is is_whole
