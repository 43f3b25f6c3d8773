"""What the clients under chaos call right, a named error, and wrong."""

import json
import random

import pytest

from benchmarks.chaos.clients import CHAT, COMPLETIONS, Ask, Reader, draw_ask

ASK = Ask(
    COMPLETIONS,
    {"prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}},
    " baba made",
    (256, 257),
    "length",
    None,
)


def chunk(text: str, finish: str | None = None, **fields: object) -> bytes:
    body = {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"gone","type":"server_error","code":"stream-lost"}}\n\n'
WHOLE = chunk(" baba") + chunk(" made", "length") + USAGE + DONE


def read(raw: bytes) -> Reader:
    reader = Reader(ASK)
    for at in range(0, len(raw), 7):
        reader.feed(raw[at : at + 7])
    return reader


def test_a_whole_answer_and_a_beginning_with_a_named_error_are_right() -> None:
    assert read(WHOLE).fault() == ""
    broken = read(chunk(" baba") + ERROR)
    assert (broken.fault(), broken.error) == ("", "stream-lost")


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (chunk(" baba"), "no end and no error"),
        (chunk(" baba") + chunk(" baba") + chunk(" made", "length") + USAGE + DONE, "15 characters"),
        (chunk(" made", "length") + USAGE + DONE, "5 characters, expected 10, alike up to 1"),
        (chunk(" bada") + ERROR, "alike up to 3"),
        (chunk(" baba made", "stop") + USAGE + DONE, "finish 'stop'"),
        (chunk(" baba made", "length") + DONE, "no usage"),
        (WHOLE.replace(b'completion_tokens":2', b'completion_tokens":3'), "usage tells 3 tokens"),
        (WHOLE.replace(b'"id": "c"', b'"id": "d"', 1), "several ids"),
        (chunk(" baba made", "length") + ERROR, "error stream-lost behind finish length"),
    ],
)
def test_anything_else_is_wrong(raw: bytes, fault: str) -> None:
    assert fault in read(raw).fault()


def test_text_behind_the_finish_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="behind the finish"):
        read(chunk(" baba", "length") + chunk(" made"))


def test_a_seed_draws_the_same_calls_of_every_kind() -> None:
    asks = [draw_ask(random.Random(seed)) for seed in range(60)]
    assert asks == [draw_ask(random.Random(seed)) for seed in range(60)]
    assert {ask.path for ask in asks} == {CHAT, COMPLETIONS}
    assert {ask.finish for ask in asks} == {"stop", "length"}
    assert {ask.leaves_after is None for ask in asks} == {True, False}
