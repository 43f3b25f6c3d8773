"""A stream that breaks off goes on elsewhere: what the client sees, what engines get, what the core hears."""

import asyncio
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import DecodeFailed, Outcome, RequestEnded, ResponseBegan, StreamBroke
from pdcoord.core.fleet import EngineKind
from pdcoord.core.model import Fallback
from pdcoord.front.ports import BreakOutcome
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.plans import decode_plan
from pdcoord.resume.continuation import Unresumable, continue_stream
from pdcoord.wire import reading
from pdcoord.wire.errors import ConnectError, StalledError, StreamError

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
FIRST, SECOND, THIRD = "10.0.0.2:8000", "10.0.0.4:8000", "10.0.0.5:8000"
DONE = b"data: [DONE]\n\n"
GONE = StreamError("gone")
LOST = Refusal(RefuseReason.STREAM_LOST, "no other endpoint can take it")


def event(ids: Sequence[int], *, stream: str = "a", finish: str | None = None) -> bytes:
    """A chunk of a completion whose tokens are numbers."""
    text = "".join(f" {token}" for token in ids)
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, "token_ids": list(ids)}
    chunk = {
        "id": f"cmpl-{stream}",
        "object": "text_completion",
        "created": 1 if stream == "a" else 2,
        "model": "org/model",
        "choices": [choice],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def body(**changes: object) -> bytes:
    asked = {"model": "org/model", "prompt": [1, 2, 3], "stream": True, "max_tokens": 6, "temperature": 0}
    return json.dumps({**asked, "return_token_ids": True, **changes}).encode()


def tokens_of(answer: bytes) -> list[int]:
    events = [part for part in answer.split(b"\n\n") if part.startswith(b"data: {")]
    chunks = [json.loads(part.removeprefix(b"data: ")) for part in events]
    assert {chunk["id"] for chunk in chunks} == {"cmpl-a"}, "one stream has one id"
    return [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]


def sent(stage: Any, index: int) -> dict[str, Any]:
    asked: dict[str, Any] = json.loads(stage.upstream.asked[index]["body"])
    return asked


@pytest.fixture
def two(stage: Any) -> Any:
    """A stage on which a second endpoint takes over."""
    stage.coordination.script = [FIRST, SECOND]
    return stage


async def test_a_stream_that_breaks_off_goes_on_and_the_client_sees_one(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), event([11]) + event([12])[:20], GONE]),
        reply(headers=SSE, chunks=[event([12], stream="b"), event([13], stream="b", finish="stop") + DONE]),
    ]
    answer = await two.call(body=body())
    assert (answer.status, answer.is_complete) == (200, True)
    assert tokens_of(answer.body) == [10, 11, 12, 13]
    assert answer.body.endswith(DONE)
    assert answer.body.count(DONE) == 1
    assert two.coordination.told() == [
        "RequestArrived",
        "ResponseBegan",
        "StreamBroke",
        "ResponseBegan",
        "RequestEnded",
    ]
    assert two.coordination.events[2] == StreamBroke("made-1", RungReason.DECODE_ERROR, 2)
    assert two.coordination.events[-1] == RequestEnded("made-1", Outcome.OK, 4)
    assert [asked["address"] for asked in two.upstream.asked] == [FIRST, SECOND]
    assert sent(two, 1)["prompt"] == [1, 2, 3, 10, 11]
    assert sent(two, 1)["max_tokens"] == 4
    (record,) = two.observer.records
    (broke,) = record.breaks
    assert (broke.outcome, broke.output_tokens, broke.why) == (BreakOutcome.CONTINUED, 2, None)
    assert broke.gap_s is not None
    assert record.outcome is Outcome.OK
    assert record.output_tokens == 4


@pytest.mark.parametrize("has_output", [True, False])
async def test_the_core_hears_of_output_where_what_goes_on_shows_some(
    two: Any, reply: Any, *, has_output: bool
) -> None:
    failed = b'data: {"error":{"message":"x","code":500}}\n\n'
    first = event([11], stream="b", finish="stop") if has_output else failed
    two.coordination.script = [FIRST, SECOND, LOST]
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[first, DONE]),
    ]
    assert (await two.call(body=body())).is_complete is has_output
    began = [told for told in two.coordination.events if isinstance(told, ResponseBegan)]
    assert began == [
        ResponseBegan("made-1", None, has_output=True),
        ResponseBegan("made-1", None, has_output=has_output),
    ]


async def test_what_a_draining_endpoint_gives_back_is_called_so(two: Any, reply: Any) -> None:
    two.coordination.is_draining = True
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="stop"), DONE]),
    ]
    assert (await two.call(body=body())).is_complete
    assert two.coordination.events[2] == StreamBroke("made-1", RungReason.DECODE_DRAINING, 1)
    (record,) = two.observer.records
    assert record.breaks[0].reason is RungReason.DECODE_DRAINING


async def test_the_sidecar_is_told_that_the_stream_is_continued_from_here(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="stop"), DONE]),
    ]
    await two.call(body=body(), headers=[(b"accept-encoding", b"gzip")])
    for asked in two.upstream.asked:
        assert decode_plan(dict(asked["headers"])[b"x-pdcoord-plan"]).is_resumed_above
    assert (b"accept-encoding", b"gzip") in two.upstream.asked[0]["headers"]
    assert b"accept-encoding" not in dict(two.upstream.asked[1]["headers"]), "the client's head is out"


@pytest.mark.parametrize("changes", [{"stream": False}, {"n": 2}])
async def test_what_is_not_continued_is_not_promised_to_the_sidecar(stage: Any, changes: Any) -> None:
    await stage.call(body=body(**changes))
    plan = decode_plan(dict(stage.upstream.asked[0]["headers"])[b"x-pdcoord-plan"])
    assert not plan.is_resumed_above
    assert plan.is_ended_above == ("n" in changes), "of a stream that is lost the gateway says why"


async def test_without_the_rung_a_stream_ends_where_it_broke(two: Any, reply: Any) -> None:
    two.coordination.served = replace(two.coordination.served, fallback=Fallback(rungs=()))
    two.upstream.script = [reply(headers=SSE, chunks=[event([10]), GONE])]
    answer = await two.call(body=body())
    assert b"stream-lost" in answer.body
    assert two.observer.records[0].reason is RefuseReason.STREAM_LOST, "the log names what the client got"
    assert not answer.is_complete
    assert two.coordination.told() == ["RequestArrived", "ResponseBegan", "RequestEnded"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("is_whole", [False, True])
async def test_without_the_rung_a_stream_that_ends_early_is_noted_and_passes_as_it_is(
    stage: Any, reply: Any, path: str, *, is_whole: bool
) -> None:
    stage.coordination.served = replace(stage.coordination.served, fallback=Fallback(rungs=()))
    chunks = [event([10]), event([11])] + ([DONE] if is_whole else [])
    stage.upstream.script = [reply(headers=SSE, chunks=chunks)]
    asked = body(messages=[{"role": "user", "content": "x"}])
    answer = await stage.call(path=path, body=asked)
    assert (answer.body, answer.is_complete) == (b"".join(chunks), True)
    (record,) = stage.observer.records
    outcome = Outcome.OK if is_whole else Outcome.UPSTREAM_ERROR
    assert (record.is_cut_short, record.outcome) == (not is_whole, outcome)
    assert stage.coordination.events[-1] == RequestEnded("made-1", outcome, 2)


@pytest.mark.parametrize(
    ("path", "headers", "stream"),
    [
        ("/v1/messages", SSE, True),
        ("/v1/completions", [*SSE, (b"content-encoding", b"gzip")], True),
        ("/v1/completions", [(b"content-type", b"application/json")], False),
    ],
)
async def test_what_has_no_such_end_is_not_cut_short(
    stage: Any, reply: Any, path: str, headers: Any, *, stream: bool
) -> None:
    stage.coordination.served = replace(stage.coordination.served, fallback=Fallback(rungs=()))
    stage.upstream.script = [reply(headers=headers, chunks=[b"{}"])]
    asked = body(messages=[{"role": "user", "content": "x"}], stream=stream)
    assert (await stage.call(path=path, body=asked)).is_complete
    (record,) = stage.observer.records
    assert (record.is_cut_short, record.outcome) == (False, Outcome.OK)


async def test_a_continuation_that_fails_before_its_first_byte_takes_the_next_try(
    stage: Any, reply: Any
) -> None:
    stage.coordination.script = [FIRST, SECOND, THIRD, FIRST, SECOND]
    stage.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        ConnectError("refused"),
        reply(headers=SSE, chunks=[GONE]),
        reply(status=503, headers=[(b"x-pdcoord-reason", b"draining")]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="stop"), DONE]),
    ]
    answer = await stage.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11], True)
    failures = [told for told in stage.coordination.events if isinstance(told, DecodeFailed)]
    assert [told.reason for told in failures] == [
        RungReason.DECODE_UNREACHABLE,
        RungReason.DECODE_ERROR,
        RungReason.DECODE_DRAINING,
    ]
    assert stage.observer.records[0].failures == tuple(told.reason for told in failures)
    assert stage.coordination.told().count("RequestEnded") == 1


async def test_a_continuation_that_breaks_off_is_continued_from_all_that_came(stage: Any, reply: Any) -> None:
    stage.coordination.script = [FIRST, SECOND, THIRD]
    stage.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[event([11], stream="b"), event([12], stream="b")[:9], GONE]),
        reply(headers=SSE, chunks=[event([12, 13], stream="c", finish="stop") + DONE]),
    ]
    answer = await stage.call(body=body())
    assert tokens_of(answer.body) == [10, 11, 12, 13]
    assert sent(stage, 2)["prompt"] == [1, 2, 3, 10, 11]
    broke = [told for told in stage.coordination.events if isinstance(told, StreamBroke)]
    assert [told.output_tokens for told in broke] == [1, 2]
    assert [each.outcome for each in stage.observer.records[0].breaks] == [BreakOutcome.CONTINUED] * 2


async def test_tries_are_bounded_whatever_the_core_says(stage: Any, reply: Any) -> None:
    stage.limits = replace(stage.limits, attempts_max=3)
    breaking = [
        reply(headers=SSE, chunks=[event([token], stream=s), GONE]) for token, s in ((10, "a"), (11, "b"))
    ]
    stage.upstream.script = [*breaking, *[ConnectError("refused")] * 9]
    answer = await stage.call(body=body())
    assert len(stage.upstream.asked) == 4
    assert b"stream-lost" in answer.body
    assert not answer.is_complete
    assert stage.coordination.told().count("RequestEnded") == 1


@pytest.mark.parametrize(
    "said",
    [
        b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n',
        event([], finish="abort"),
    ],
)
async def test_an_engine_that_says_it_failed_is_replaced_and_its_word_kept_back(
    two: Any, reply: Any, said: bytes
) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), event([11]) + said + DONE]),
        reply(headers=SSE, chunks=[event([12], stream="b", finish="stop"), DONE]),
    ]
    answer = await two.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11, 12], True)
    assert b"EngineCore" not in answer.body
    assert b"abort" not in answer.body
    assert sent(two, 1)["prompt"] == [1, 2, 3, 10, 11]


async def test_an_engines_own_error_is_told_where_nobody_can_go_on(two: Any, reply: Any) -> None:
    said = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
    two.upstream.script = [reply(headers=SSE, chunks=[event([10]) + said + DONE])]
    two.coordination.script = [FIRST, LOST]
    answer = await two.call(body=body())
    assert answer.body == event([10]) + said
    assert not answer.is_complete


async def test_a_body_that_ends_well_in_the_middle_of_a_stream_is_no_end(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10])]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="length"), DONE]),
    ]
    answer = await two.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11], True)


@pytest.mark.parametrize(
    ("changes", "path", "is_whole"),
    [
        ({"guided_regex": "a+"}, "/v1/completions", False),
        ({"n": 2}, "/v1/completions", False),
        ({"input": "x"}, "/v1/responses", True),
    ],
)
async def test_a_middle_that_cannot_go_on_is_no_end_unless_nobody_can_read_it(
    two: Any, reply: Any, changes: Any, path: str, *, is_whole: bool
) -> None:
    two.upstream.script = [reply(headers=SSE, chunks=[event([10])])]
    answer = await two.call(path, body=body(**changes))
    assert answer.is_complete is is_whole
    assert (b"stream-lost" in answer.body) is not is_whole
    outcome = Outcome.OK if is_whole else Outcome.UPSTREAM_ERROR
    assert two.coordination.events[-1] == RequestEnded("made-1", outcome, 1)


async def test_an_answer_of_many_choices_is_whole_at_its_end(two: Any, reply: Any) -> None:
    two.upstream.script = [reply(headers=SSE, chunks=[event([10]), DONE[:9], DONE[9:]])]
    assert (await two.call(body=body(n=2))).is_complete


@pytest.mark.parametrize("is_cut", [True, False])
async def test_nothing_is_asked_for_where_only_the_end_is_missing(
    stage: Any, reply: Any, *, is_cut: bool
) -> None:
    chunks = [event([10]), event([11], finish="stop"), GONE]
    stage.upstream.script = [reply(headers=SSE, chunks=chunks if is_cut else chunks[:2])]
    answer = await stage.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11], True)
    assert answer.body.endswith(DONE)
    assert stage.coordination.told() == ["RequestArrived", "ResponseBegan", "RequestEnded"]
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.OK, 2)
    assert stage.observer.records[0].breaks[0].outcome is BreakOutcome.FINISHED


@pytest.mark.parametrize(
    ("changes", "path", "why"),
    [
        ({"guided_regex": "a+"}, "/v1/completions", Unresumable.GUIDED_DECODING),
        ({"n": 2}, "/v1/completions", Unresumable.MANY_CHOICES),
        ({"input": "x"}, "/v1/responses", Unresumable.API),
    ],
)
async def test_what_cannot_be_continued_faithfully_ends_with_a_named_error(
    two: Any, reply: Any, changes: Any, path: str, why: Unresumable
) -> None:
    two.upstream.script = [reply(headers=SSE, chunks=[event([10]), GONE])]
    answer = await two.call(path, body=body(**changes))
    assert answer.body.startswith(event([10]))
    error = json.loads(answer.body.removeprefix(event([10])).rpartition(b"data: ")[2])["error"]
    assert (error["code"], why.value in error["message"]) == ("stream-lost", True)
    assert not answer.is_complete
    assert two.coordination.told() == ["RequestArrived", "ResponseBegan", "RequestEnded"]
    (record,) = two.observer.records
    assert (record.outcome, record.reason) == (Outcome.UPSTREAM_ERROR, RefuseReason.STREAM_LOST)
    assert (record.breaks[0].outcome, record.breaks[0].why) == (BreakOutcome.UNRESUMABLE, why)


async def test_the_cores_no_is_told_in_the_stream_and_ends_the_call_once(two: Any, reply: Any) -> None:
    two.coordination.script = [FIRST, LOST]
    two.upstream.script = [reply(headers=SSE, chunks=[event([10]), GONE])]
    answer = await two.call(body=body())
    assert b"no other endpoint can take it" in answer.body
    assert not answer.is_complete
    assert two.coordination.told() == ["RequestArrived", "ResponseBegan", "StreamBroke"]
    assert two.observer.records[0].breaks[0].outcome is BreakOutcome.REFUSED
    assert two.observer.records[0].output_tokens == 1


async def test_an_engine_that_refuses_what_is_left_ends_it(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(status=400, chunks=[b'{"error":{"message":"prompt text"}}']),
    ]
    answer = await two.call(body=body())
    assert b"the engine answered 400" in answer.body
    assert b"prompt text" not in answer.body
    assert two.coordination.told()[-2:] == ["StreamBroke", "RequestEnded"]


async def test_a_stream_too_long_to_be_kept_passes_and_is_counted_but_not_continued(
    two: Any, reply: Any
) -> None:
    two.limits = replace(two.limits, resume_stream_bytes_max=1_000)
    chunks = [event([10 + index]) for index in range(20)]
    two.upstream.script = [reply(headers=SSE, chunks=[*chunks, GONE])]
    answer = await two.call(body=body(max_tokens=100))
    assert answer.body.startswith(b"".join(chunks))
    assert Unresumable.TAPE_FULL.value.encode() in answer.body
    assert two.coordination.events[-1] == RequestEnded("made-1", Outcome.UPSTREAM_ERROR, 20)


async def test_what_was_kept_is_let_go_of_at_the_end(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="stop"), DONE]),
    ]
    await two.call(body=body())
    assert two.shelf.bytes_held == 0


@pytest.mark.parametrize("silent_at", ["request", "first", "later"])
async def test_a_client_that_leaves_while_its_stream_is_continued_ends_it_once(
    two: Any, reply: Any, until: Any, silent_at: str
) -> None:
    silent = reply(headers=SSE, chunks=[None] if silent_at == "first" else [event([11], stream="b"), None])
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        None if silent_at == "request" else silent,
    ]
    async with asyncio.TaskGroup() as group:
        group.create_task(two.call(body=body()))
        await until(
            lambda: silent.reading.is_set() if silent_at != "request" else len(two.upstream.asked) == 2
        )
        two.gone.set()
    assert silent.is_closed or silent_at == "request"
    assert two.coordination.told().count("RequestEnded") == 1
    tokens = 2 if silent_at == "later" else 1
    assert two.coordination.events[-1] == RequestEnded("made-1", Outcome.CLIENT_GONE, tokens)
    assert two.shelf.bytes_held == 0
    expected = BreakOutcome.CONTINUED if silent_at == "later" else BreakOutcome.LEFT
    assert two.observer.records[0].breaks[0].outcome is expected


async def test_a_stream_without_progress_is_moved_and_says_so(two: Any, reply: Any) -> None:
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), StalledError("silent")]),
        reply(headers=SSE, chunks=[event([11], stream="b", finish="stop"), DONE]),
    ]
    answer = await two.call(body=body())
    assert answer.is_complete
    assert two.coordination.events[2] == StreamBroke("made-1", RungReason.DECODE_STALLED, 1)


async def test_a_continuation_without_an_event_has_failed(two: Any, reply: Any) -> None:
    two.coordination.script = [FIRST, SECOND, THIRD]
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10]), GONE]),
        reply(headers=SSE, chunks=[b": alive\n\n"]),
        reply(headers=SSE, chunks=[event([11], stream="c", finish="stop"), DONE]),
    ]
    answer = await two.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11], True)
    assert two.coordination.events[3] == DecodeFailed("made-1", RungReason.DECODE_ERROR)


async def test_a_break_is_read_once_and_not_on_the_event_loop(
    two: Any, reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        threads.append(threading.get_ident())
        return continue_stream(*given, **more)

    monkeypatch.setattr(reading, "continue_stream", counted)
    two.coordination.script = [FIRST, SECOND, THIRD]
    two.upstream.script = [
        reply(headers=SSE, chunks=[event([10])]),
        ConnectError("refused"),
        reply(headers=SSE, chunks=[event([11], stream="c", finish="stop"), DONE]),
    ]
    answer = await two.call(body=body())
    assert (tokens_of(answer.body), answer.is_complete) == ([10, 11], True)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_an_engine_counts_a_text_that_nobody_else_did(two: Any, reply: Any) -> None:
    def plain(text: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        head = {"id": "cmpl-a", "object": "text_completion", "created": 1, "model": "org/model"}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    two.upstream.script = [
        reply(headers=SSE, chunks=[plain(" ten eleven"), GONE]),
        reply(chunks=[b'{"count":2,"max_model_len":100,"tokens":[10,11]}']),
        reply(headers=SSE, chunks=[plain(" twelve", "length"), DONE]),
    ]
    asked = {"model": "org/model", "prompt": "hi", "stream": True, "max_tokens": 3}
    key, kind = (b"authorization", b"Bearer engine"), (b"content-type", b"application/json")
    answer = await two.call(body=json.dumps(asked).encode(), headers=[key, (b"x-other", b"1")])
    assert answer.is_complete
    # With its plan, sidecars would tell of it as of a request that is served.
    assert two.upstream.asked[1]["headers"] == [key, kind, (b"x-request-id", b"made-1")]
    assert [each["target"] for each in two.upstream.asked[1:]] == ["/tokenize", "/v1/completions"]
    assert [each["address"] for each in two.upstream.asked[1:]] == [SECOND, SECOND]
    assert sent(two, 2)["prompt"] == "hi ten eleven"
    assert sent(two, 2)["max_tokens"] == 1


# From text: engines prove that they append it, and may come out otherwise.


def texts_of(answer: bytes) -> list[str]:
    assert answer.endswith(DONE)
    chunks = [json.loads(part.removeprefix(b"data: ")) for part in answer.split(b"\n\n")[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1, "one stream has one id"
    choices = [chunk["choices"][0] for chunk in chunks]
    assert not any("reasoning" in choice.get("delta", {}) for choice in choices)
    return [choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices]


def chat_event(text: str, finish: str | None = None, *, stream: str = "a", **delta: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text, **delta}, "logprobs": None, "finish_reason": finish}
    head = {"id": f"chat-{stream}", "object": "chat.completion.chunk", "created": 1, "model": "org/model"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


def tokenized(tokens: str) -> bytes:
    spelled = tokens.split("|")
    ids = [sum(map(ord, each)) for each in spelled]
    return json.dumps({"count": len(ids), "max_model_len": 9, "tokens": ids, "token_strs": spelled}).encode()


ALONE, BEGUN = "Once| upon", "<user>|hi|</s>|<assistant>"
CHAT = "/v1/chat/completions"
CHAT_BODY = json.dumps(
    {"model": "org/model", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}
).encode()


def asks_for_proof(reply: Any, continued: str) -> list[Any]:
    """A chat that breaks off, and what the next engine makes of it."""
    broken = reply(headers=SSE, chunks=[chat_event("Once upon"), GONE])
    return [broken, *(reply(chunks=[tokenized(each)]) for each in (ALONE, BEGUN, continued))]


async def test_a_chat_goes_on_from_text_where_the_engine_says_that_it_appends_that(
    two: Any, reply: Any
) -> None:
    rest = reply(headers=SSE, chunks=[chat_event(" a", "stop", stream="b") + DONE])
    two.upstream.script = [*asks_for_proof(reply, f"{BEGUN}|{ALONE}"), rest]
    answer = await two.call(CHAT, body=CHAT_BODY)
    assert answer.is_complete
    assert texts_of(answer.body) == ["Once upon", " a"]
    assert [each["target"] for each in two.upstream.asked] == [CHAT, *["/tokenize"] * 3, CHAT]
    assert sent(two, 4)["max_tokens"] == 1, "two tokens, as the engine counts them"
    assert sent(two, 3)["continue_final_message"] is True


@pytest.mark.parametrize("continued", [f"{BEGUN}|{ALONE}|</s>", f"{BEGUN}|Once", "<user>|hi|Once| upon"])
async def test_a_template_that_ends_or_trims_the_partial_answer_is_named(
    two: Any, reply: Any, continued: str
) -> None:
    two.upstream.script = asks_for_proof(reply, continued)
    answer = await two.call(CHAT, body=CHAT_BODY)
    assert (b"stream-lost" in answer.body, b"template" in answer.body) == (True, True)
    assert not answer.is_complete
    (record,) = two.observer.records
    assert (record.breaks[0].outcome, record.breaks[0].why) == (
        BreakOutcome.UNRESUMABLE,
        Unresumable.TEMPLATE,
    )


async def test_an_engine_that_cannot_say_continues_no_chat_and_one_that_is_gone_is_passed_over(
    stage: Any, reply: Any
) -> None:
    stage.coordination.script = [FIRST, SECOND, THIRD]
    broken, *_ = asks_for_proof(reply, "")
    nothing = reply(status=404, chunks=[b'{"detail":"Not Found"}'])
    stage.upstream.script = [broken, ConnectError("refused"), nothing]
    answer = await stage.call(CHAT, body=CHAT_BODY)
    assert b"template" in answer.body
    assert [each["address"] for each in stage.upstream.asked] == [FIRST, SECOND, THIRD]
    assert DecodeFailed("made-1", RungReason.DECODE_UNREACHABLE) in stage.coordination.events


async def test_sglang_appends_a_partial_answer_itself_and_is_not_asked(two: Any, reply: Any) -> None:
    make_plan = two.coordination.make_plan

    def of_sglang(*given: Any, **more: Any) -> Any:
        plan = make_plan(*given, **more)
        pool = replace(plan.decode.pool, engine=EngineKind.SGLANG)
        return replace(plan, chosen=replace(plan.chosen, decode=replace(plan.decode, pool=pool)))

    two.coordination.make_plan = of_sglang
    broken, *_ = asks_for_proof(reply, "")
    rest = reply(headers=SSE, chunks=[chat_event(" a", "stop", stream="b") + DONE])
    two.upstream.script = [broken, reply(chunks=[b'{"count":2}']), rest]
    assert (await two.call(CHAT, body=CHAT_BODY)).is_complete
    assert [each["target"] for each in two.upstream.asked] == [CHAT, "/tokenize", CHAT]


async def test_a_continuation_that_diverges_is_no_fault_and_the_next_begins_where_it_began(
    stage: Any, reply: Any
) -> None:
    """Of what diverged the client has nothing, so that all of the overlap must come again."""
    stage.coordination.script = [FIRST, SECOND, THIRD]
    asked = {"model": "org/model", "prompt": [1, 2, 3], "stream": True, "temperature": 0}

    def said(text: str, stream: str, finish: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        head = {"id": f"cmpl-{stream}", "object": "text_completion", "created": 1, "model": "org/model"}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    stage.upstream.script = [
        reply(headers=SSE, chunks=[said(" one", "a"), said(" two", "a"), GONE]),
        reply(headers=SSE, chunks=[said(" one", "b"), said(" zwei", "b"), DONE]),
        reply(headers=SSE, chunks=[said(" one", "c"), said(" two", "c"), said(" three", "c", "stop"), DONE]),
    ]
    answer = await stage.call(body=json.dumps(asked).encode())
    assert answer.is_complete
    assert texts_of(answer.body) == [" one", " two", " three"]
    broke = [told.reason for told in stage.coordination.events if isinstance(told, StreamBroke)]
    assert broke == [RungReason.DECODE_ERROR, RungReason.DECODE_DIVERGED]
    assert [each.reason for each in stage.observer.records[0].breaks] == broke


async def test_reasoning_behind_an_answer_that_had_begun_is_not_passed_on(stage: Any, reply: Any) -> None:
    stage.coordination.script = [FIRST, SECOND, THIRD]
    proved = asks_for_proof(reply, f"{BEGUN}|{ALONE}")
    reasons = reply(headers=SSE, chunks=[chat_event("", stream="b", reasoning="hm")])
    rest = reply(headers=SSE, chunks=[chat_event(" a", "stop", stream="c") + DONE])
    stage.upstream.script = [*proved, reasons, *asks_for_proof(reply, f"{BEGUN}|{ALONE}")[1:], rest]
    answer = await stage.call(CHAT, body=CHAT_BODY)
    assert texts_of(answer.body) == ["Once upon", " a"]
    assert stage.observer.records[0].breaks[1].reason is RungReason.DECODE_DIVERGED
