"""Engines are asked what they make of a text or of a chat; what they do not say proves nothing."""

import json
from typing import Any, Self

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.resume.continuation import Continuation, continue_stream
from pdcoord.wire.errors import ConnectError
from pdcoord.wire.tokenizing import Proved, Tokenizer

CHAT = "/v1/chat/completions"


class Reply:
    def __init__(self, raw: bytes, status: int, reason: bytes | None) -> None:
        self.raw, self.status, self.reason = raw, status, reason

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_details: object) -> None:
        pass

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        assert timeout_s > 0
        assert len(self.raw) <= bytes_max
        return self.raw

    def header(self, name: bytes) -> bytes | None:
        assert name == b"x-pdcoord-reason"
        return self.reason


class Engine:
    """Answers in order; nothing left means that nobody is there."""

    def __init__(self, *answers: object, status: int = 200, reason: bytes | None = None) -> None:
        self.answers = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in answers]
        self.status, self.reason = status, reason
        self.asked: list[dict[str, Any]] = []

    async def request(self, method: str, address: str, target: str, **options: Any) -> Reply:
        assert (method, address, target) == ("POST", "10.0.0.1:8000", "/tokenize")
        assert options["headers"] == [(b"authorization", b"Bearer engine")]
        if not self.answers:
            raise ConnectError("refused")
        self.asked.append(json.loads(options["body"]))
        return Reply(self.answers.pop(0), self.status, self.reason)


def tokenizer(engine: Engine) -> Tokenizer:
    headers = [(b"authorization", b"Bearer engine")]
    return Tokenizer(engine, HostPort("10.0.0.1:8000"), headers, 1.0)  # type: ignore[arg-type]


def continuation(path: str = CHAT) -> Continuation:
    asked: dict[str, Any] = {"stream": True, "messages": [{"role": "user", "content": "hi"}]}
    choice: dict[str, Any] = {"index": 0, "delta": {"content": "Once"}}
    if path != CHAT:
        asked, choice = {"stream": True, "prompt": "hi"}, {"index": 0, "text": "Once"}
    event = b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"
    found = continue_stream(path, json.dumps(asked).encode(), event)
    assert isinstance(found, Continuation)
    return found


def said(*tokens: int) -> dict[str, object]:
    return {"count": len(tokens), "tokens": tokens}


async def test_a_count() -> None:
    assert await tokenizer(Engine({"count": 7})).count(b'{"prompt":"x"}') == 7
    for engine in (Engine(b"{"), Engine({"count": 7}, status=404), Engine()):
        assert await tokenizer(engine).count(b'{"prompt":"x"}') is None


async def test_a_proof_takes_three_answers() -> None:
    engine = Engine(said(5, 6), said(1, 2), said(1, 2, 5, 6))
    assert await tokenizer(engine).prove(continuation()) == Proved(is_proved=True, counted_tokens=2)
    assert ["prompt" in each for each in engine.asked] == [True, False, False]
    ended = Engine(said(5, 6), said(1, 2), said(1, 2, 5, 6, 9))
    assert await tokenizer(ended).prove(continuation()) == Proved(is_proved=False, counted_tokens=2)
    assert not (await tokenizer(Engine(said(5), b"{", said(5))).prove(continuation())).is_proved


async def test_what_needs_no_proof_is_not_asked_about() -> None:
    engine = Engine()
    assert (await tokenizer(engine).prove(continuation("/v1/completions"))).is_proved
    assert engine.asked == []


async def test_an_engine_that_does_not_say_is_told_by_its_status() -> None:
    engine = Engine(b"draining", status=503, reason=b"draining")
    proved = await tokenizer(engine).prove(continuation())
    assert proved == Proved(is_proved=False, status=503, reason=b"draining")
    with pytest.raises(ConnectError):
        await tokenizer(Engine()).prove(continuation())
