"""What an engine's last words say of its answer, as vLLM 0.32 writes them in each API."""

import json
from pathlib import Path

import pytest

from pdcoord.resume.failure import (
    TAIL_BYTES,
    TAIL_PARTS,
    Tail,
    ends_in_error,
    next_sequence_number,
    tells_failure,
    was_given_up,
)

RECORDED = Path(__file__).parents[4] / "contract" / "vllm-0.32.0"
DONE = b"data: [DONE]\n\n"
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


def event(name: str | None = None, **fields: object) -> bytes:
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(fields).encode() + b"\n\n"


def message_delta(stop_reason: str | None) -> bytes:
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return event("message_delta", type="message_delta", delta=delta, usage={"output_tokens": 3}) + STOP


def chunk(finish: str | None, text: str = "a") -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": finish}])


def response_end(status: str, reason: str | None = None, *, length: int = 0) -> bytes:
    """With its members in vLLM 0.32's order."""
    response = {
        "incomplete_details": None if reason is None else {"reason": reason},
        "object": "response",
        "output": [{"content": [{"text": "x" * length}], "status": "completed"}],
        "status": status,
        "text": None,
    }
    return event("response.completed", response=response, sequence_number=7, type="response.completed")


@pytest.mark.parametrize(
    ("tail", "is_failure"),
    [
        (chunk("stop") + DONE, False),
        (chunk(None, '"finish_reason":"abort", "error"') + chunk("stop") + DONE, False),
        (chunk("abort") + chunk("abort") + event(choices=[], usage={}) + DONE, True),
        (event(error={"message": "x"}) + DONE, True),
        (event(error=None, choices=[]) + DONE, False),
        (message_delta("end_turn"), False),
        (message_delta(None), True),
        (event("error", type="error", error={"type": "internal_error"}), True),
        (event("error", type="error", code="x", message="m", sequence_number=3), True),
        (event("response.failed", type="response.failed", response={"status": "failed"}), True),
        (response_end("completed"), False),
        (response_end("incomplete", "max_output_tokens"), False),
        (response_end("incomplete"), True),
        (response_end("cancelled"), True),
        (event("error", type="error", error={})[:-2], True),
        (event("response.output_text.delta", type="response.output_text.delta", delta="error"), False),
        (b'data: {"error"\n\n', False),
        (b"", False),
    ],
)
def test_the_last_events_tell_whether_the_engine_failed(tail: bytes, is_failure: bool) -> None:
    assert tells_failure(tail) is is_failure
    assert tells_failure(tail.replace(b"\n", b"\r\n")) is is_failure


@pytest.mark.parametrize("status", ["completed", "incomplete", "cancelled"])
def test_of_a_long_last_event_its_end_tells(status: str) -> None:
    tail = response_end(status, "max_output_tokens", length=2 * TAIL_BYTES)[-TAIL_BYTES:]
    assert tells_failure(tail) is (status == "cancelled")


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.sse")), ids=lambda path: path.name)
def test_recorded_streams(path: Path) -> None:
    # A failed /v1/responses just breaks off.
    is_told = path.name in {"chat.failed.sse", "completions.failed.sse", "messages.failed.sse"}
    data = path.read_bytes()
    assert tells_failure(data[-TAIL_BYTES:]) is is_told
    assert ends_in_error(data[-TAIL_BYTES:]) is is_told


@pytest.mark.parametrize(
    ("tail", "is_error"),
    [
        (chunk("abort") + DONE, False),
        (event(error={"message": "x"}) + DONE, True),
        (event(error={}) + b": alive\n\n", True),
        (event(error={}) + chunk("stop"), False),
        (event("error", type="error"), True),
        (b"data: 1\n\n", False),
        (b"", False),
    ],
)
def test_a_stream_that_ends_in_an_error_needs_no_other(tail: bytes, is_error: bool) -> None:
    assert ends_in_error(tail) is is_error


def test_an_event_is_numbered_behind_the_last() -> None:
    assert next_sequence_number(response_end("completed")) == 8
    assert next_sequence_number(event(text='"sequence_number": 4')) == 0


@pytest.mark.parametrize(
    ("body", "is_given_up"),
    [
        ({"choices": [{"text": "a", "finish_reason": "abort"}]}, True),
        ({"choices": [{"text": '"finish_reason":"abort"', "finish_reason": "stop"}]}, False),
        ({"type": "message", "content": [], "stop_reason": "end_turn"}, False),
        ({"type": "message", "content": [], "stop_reason": None}, True),
        ({"type": "message", "content": []}, True),
        ({"type": "message", "content": [{"input": {"finish_reason": "abort"}}], "stop_reason": "x"}, False),
        ({"object": "response", "status": "completed"}, False),
        ({"object": "response", "status": "in_progress"}, False),
        ({"object": "response", "status": "cancelled"}, True),
        ({"object": "response", "status": "incomplete", "incomplete_details": {"reason": "x"}}, False),
        ({"object": "response", "status": "incomplete", "incomplete_details": None}, True),
        ({"object": "response", "status": 3}, False),
        ({"type": "error", "error": {}}, False),
        ({"object": "list", "data": []}, False),
        ([], False),
    ],
)
def test_an_answer_in_one_piece_says_whether_its_engine_gave_it_up(body: object, is_given_up: bool) -> None:
    assert was_given_up(json.dumps(body).encode()) is is_given_up
    assert was_given_up(json.dumps(body, separators=(",", ":")).encode()) is is_given_up


def test_what_is_no_json_was_not_given_up() -> None:
    assert not was_given_up(b"\xff")
    assert not was_given_up(b'{"a":' * 5_000)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.name)
def test_recorded_answers_were_not_given_up(path: Path) -> None:
    assert not was_given_up(path.read_bytes())


def test_a_tail_is_bounded_and_behind_the_change() -> None:
    tail = Tail(bytes.upper)
    assert tail(b"ab") == b"AB"
    assert tail.data == b"AB"
    long = b"x" * (2 * TAIL_BYTES)
    assert tail(long) == long.upper()
    assert len(tail.data) == TAIL_BYTES
    plain = Tail()
    for _ in range(TAIL_PARTS + 1):
        plain(b"a")
    assert plain.data == b"a" * TAIL_PARTS
