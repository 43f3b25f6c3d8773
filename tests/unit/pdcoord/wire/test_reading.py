"""Streams that broke off are read in a thread, few at a time, and are asked about where nobody counted."""

import asyncio
import json
import threading
from typing import Any

import pytest

from pdcoord.resume.continuation import Continuation, Finished, Unresumable, continue_stream
from pdcoord.resume.tape import Shelf, Tape
from pdcoord.wire import reading
from pdcoord.wire.reading import READERS_MAX, Known, Readers

PATH = "/v1/completions"


def tape(*, finish: str | None = None, **changes: object) -> Tape:
    body = {"model": "m", "prompt": "hi", "stream": True, "max_tokens": 9, "temperature": 0, **changes}
    made = Tape(Shelf(1 << 20, 1 << 20), json.dumps(body).encode())
    head = {"id": "a", "object": "text_completion", "created": 1, "model": "m"}
    choice = {"index": 0, "text": " a b", "logprobs": None, "finish_reason": finish}
    made(b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n")
    return made


async def test_a_text_that_nobody_counted_is_asked_about_until_it_was() -> None:
    made, readers = tape(), Readers()
    found = await readers.read(PATH, made, known=Known(100))
    assert isinstance(found.found, Continuation)
    assert json.loads(found.count_body or b"{}")["prompt"] == " a b"
    assert (found.passed_bytes, found.known) == (len(made.passed), Known(100))
    counted = await readers.read(PATH, made, counted_tokens=2)
    assert isinstance(counted.found, Continuation)
    assert json.loads(counted.found.body)["max_tokens"] == 7
    assert counted.count_body is None


async def test_what_is_over_or_cannot_go_on_is_not_counted() -> None:
    over = await Readers().read(PATH, tape(finish="stop"))
    assert (type(over.found), over.count_body) == (Finished, None)
    lost = await Readers().read(PATH, tape(guided_regex="a+"))
    assert (lost.found, lost.count_body) == (Unresumable.GUIDED_DECODING, None)


async def test_few_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, barrier = threading.Lock(), threading.Barrier(READERS_MAX)
    counts = {"now": 0, "most": 0}

    def slow(*given: Any, **more: Any) -> Any:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        barrier.wait(10.0)  # Passes only if as many as there may be run at once.
        with lock:
            counts["now"] -= 1
        return continue_stream(*given, **more)

    monkeypatch.setattr(reading, "continue_stream", slow)
    readers, made = Readers(), tape()
    async with asyncio.timeout(30.0), asyncio.TaskGroup() as group:
        for _ in range(4 * READERS_MAX):
            group.create_task(readers.read(PATH, made))
    assert counts == {"now": 0, "most": READERS_MAX}
