"""One call's life, edge by edge: what the client gets, what upstream gets, what the core hears."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import Outcome, RequestArrived, RequestEnded
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.wire.errors import ConnectError, StreamError

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
PACKED = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]
EXHAUSTED = Refusal(RefuseReason.LADDER_EXHAUSTED, "no other")


async def test_a_call_is_decided_forwarded_relayed_and_ended_once(stage: Any, reply: Any) -> None:
    chunks = [b"data: 1\n\n", b"data: 2\n\ndata: [DO", b"NE]\n\n"]
    stage.upstream.script = [reply(headers=SSE, chunks=chunks)]
    answer = await stage.call(body=b'{"model":"org/model","prompt":"hi","stream":true}', query=b"beta=true")
    assert (answer.status, answer.body, answer.is_complete) == (200, b"".join(chunks), True)
    assert answer.header("x-pdcoord-decision") == "colocated; colocated-faster"
    assert stage.coordination.told() == ["RequestArrived", "ResponseBegan", "RequestEnded"]
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.OK, 2)
    (asked,) = stage.upstream.asked
    assert (asked["method"], asked["address"], asked["target"]) == (
        "POST",
        "10.0.0.2:8000",
        "/v1/completions?beta=true",
    )
    (record,) = stage.observer.records
    assert (record.outcome, record.status, record.model) == (Outcome.OK, 200, "org/model")
    assert record.began_s <= record.first_byte_s <= record.ended_s


async def test_one_call_too_many_is_refused_before_its_body_is_read(stage: Any) -> None:
    stage.limits = replace(stage.limits, live_max=0)
    answer = await stage.call(body=None)
    assert (answer.status, answer.header("retry-after")) == (429, "1")
    assert stage.coordination.events == []


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        (b"abc-1", "abc-1"),
        (b"a/b?c~", "a/b?c~"),
        (b"a b", "made-1"),
        (b"x" * 122, "x" * 122),
        (b"x" * 129, "made-1"),
        (b"", "made-1"),
        (b"caf\xc3\xa9", "made-1"),
        (b"a\tb", "made-1"),
    ],
)
async def test_request_ids_are_echoed_if_they_are_fit_to_be(stage: Any, given: bytes, echoed: str) -> None:
    answer = await stage.call(headers=[(b"x-request-id", given)])
    assert answer.header("x-request-id") == echoed
    assert (b"x-request-id", echoed.encode()) in stage.upstream.asked[0]["headers"]
    assert stage.coordination.events[0].request.id == echoed


async def test_an_id_without_room_for_a_second_attempts_is_cut_upstream_only(stage: Any) -> None:
    given = b"x" * 123
    answer = await stage.call(headers=[(b"x-request-id", given)])
    assert answer.header("x-request-id") == given.decode()
    sent = dict(stage.upstream.asked[0]["headers"])[b"x-request-id"]
    assert sent == b"x" * 80 + b"-made-1" == stage.coordination.events[0].request.id.encode()


async def test_two_live_calls_under_one_id_have_two_accounts(stage: Any, reply: Any, until: Any) -> None:
    silent = reply(chunks=[None])
    stage.upstream.script = [silent, reply()]
    header = [(b"x-request-id", b"same")]
    async with asyncio.TaskGroup() as group:
        first = group.create_task(stage.call(headers=header))
        await until(silent.reading.is_set)
        second = await stage.call(headers=header)
        stage.gone.set()
    assert second.header("x-request-id") == "same"
    arrived = [e.request.id for e in stage.coordination.events if isinstance(e, RequestArrived)]
    ended = [e.id for e in stage.coordination.events if isinstance(e, RequestEnded)]
    assert arrived == ["same", "same-made-1"]
    assert sorted(ended) == sorted(arrived)
    assert first.result().status is None


async def test_an_id_may_be_used_again_once_its_call_has_ended(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(), reply()]
    for _ in range(2):
        await stage.call(headers=[(b"x-request-id", b"same")])
    arrived = [e.request.id for e in stage.coordination.events if isinstance(e, RequestArrived)]
    assert arrived == ["same", "same"]


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (Refusal(RefuseReason.SATURATED, "full", retry_after_s=1), Outcome.REFUSED),
        (Refusal(RefuseReason.NO_ENDPOINTS, "none", retry_after_s=2), Outcome.REFUSED),
        (Refusal(RefuseReason.CONTEXT_TOO_LONG, "long"), Outcome.CLIENT_ERROR),
    ],
)
async def test_the_cores_refusal_is_the_answer_and_the_end(
    stage: Any, refusal: Refusal, outcome: Outcome
) -> None:
    stage.coordination.script = [refusal]
    answer = await stage.call()
    assert (answer.status, answer.error["code"]) == (refusal.status, refusal.reason)
    assert answer.header("retry-after") == (
        None if refusal.retry_after_s is None else str(refusal.retry_after_s)
    )
    assert stage.coordination.told() == ["RequestArrived"]
    assert stage.observer.records[0].outcome is outcome


async def test_the_engines_last_answer_is_relayed_when_nothing_is_left(stage: Any, reply: Any) -> None:
    stage.coordination.script = ["10.0.0.2:8000", "10.0.0.4:8000", EXHAUSTED]
    stage.upstream.script = [
        reply(
            status=500,
            headers=[(b"content-type", b"application/json"), (b"x-engine", b"1")],
            chunks=[b'{"error":', b'"engine"}'],
        ),
        ConnectError("refused"),
    ]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (500, b'{"error":"engine"}', True)
    assert answer.header("x-engine") == "1"
    assert answer.header("x-request-id") == "made-1"
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed", "DecodeFailed"]
    assert stage.observer.records[0].outcome is Outcome.UPSTREAM_ERROR


async def test_the_cores_refusal_is_told_where_no_engine_answered(stage: Any, reply: Any) -> None:
    stage.coordination.script = ["10.0.0.2:8000", EXHAUSTED]
    stage.upstream.script = [reply(status=503, headers=[(b"x-pdcoord-reason", b"draining")])]
    answer = await stage.call()
    assert (answer.status, answer.error["code"]) == (503, "ladder-exhausted")
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed"]


async def test_attempts_are_bounded_whatever_the_core_says(stage: Any) -> None:
    stage.limits = replace(stage.limits, attempts_max=3)
    stage.upstream.script = [ConnectError("refused")] * 9
    answer = await stage.call()
    assert (answer.status, len(stage.upstream.asked)) == (503, 3)
    assert stage.coordination.told()[-1] == "RequestEnded"
    assert stage.coordination.told().count("RequestEnded") == 1


async def test_an_empty_answer_is_whole(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(chunks=[])]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"", True)


async def test_an_error_event_of_the_sidecar_is_the_only_one(stage: Any, reply: Any) -> None:
    said = b'data: 1\n\ndata: {"error": {}}\n\n'
    stage.upstream.script = [reply(headers=SSE, chunks=[said, StreamError("gone")])]
    answer = await stage.call()
    assert answer.body == said
    assert not answer.is_complete


async def test_a_stream_that_breaks_off_ends_with_an_error_event_and_no_end(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=SSE, chunks=[b"data: 1\n\n", StreamError("gone")])]
    answer = await stage.call()
    assert answer.status == 200
    first, second, rest = answer.body.split(b"\n\n")
    assert (first, rest) == (b"data: 1", b"")
    assert json.loads(second.removeprefix(b"data: "))["error"]["code"] == "stream-lost"
    assert not answer.is_complete
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.UPSTREAM_ERROR, 1)


@pytest.mark.parametrize(
    ("headers", "chunk"),
    [
        (SSE, b"data: 1\n\ndata: {"),
        ([*SSE, (b"content-encoding", b"gzip")], b"\x1f\x8b\n\n"),
        (PACKED, b"\x1f\x8b\n\n"),
    ],
)
async def test_inside_an_event_or_outside_a_stream_nothing_is_added(
    stage: Any, reply: Any, headers: Any, chunk: bytes
) -> None:
    stage.upstream.script = [reply(headers=headers, chunks=[chunk, StreamError("gone")])]
    answer = await stage.call()
    assert (answer.body, answer.is_complete) == (chunk, False)


@pytest.mark.parametrize("silent_at", ["request", "first", "later"])
async def test_a_client_that_leaves_takes_the_upstream_connection_with_it(
    stage: Any, reply: Any, until: Any, silent_at: Any
) -> None:
    silent = reply(headers=SSE, chunks=[None] if silent_at == "first" else [b"data: 1\n\n", None])
    stage.upstream.script = [None if silent_at == "request" else silent]
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call())
        await until(lambda: silent.reading.is_set() if silent_at != "request" else bool(stage.upstream.asked))
        stage.gone.set()
    assert silent.is_closed or silent_at == "request"
    assert not call.result().is_complete
    tokens = 1 if silent_at == "later" else None
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.CLIENT_GONE, tokens)
    assert stage.coordination.told().count("RequestEnded") == 1
    assert stage.observer.records[0].status == (200 if silent_at == "later" else 499)


QUEUE_FULL = Refusal(RefuseReason.QUEUE_FULL, "full", retry_after_s=7)


async def test_a_call_that_waits_is_served_when_its_turn_comes(stage: Any, until: Any) -> None:
    stage.coordination.script = ["wait", "10.0.0.7:8000"]
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call())
        await until(lambda: stage.coordination.expected)
        assert stage.upstream.asked == []
        stage.coordination.decide("made-1")
    assert call.result().status == 200
    assert stage.upstream.asked[0]["address"] == "10.0.0.7:8000"
    assert stage.coordination.told() == ["RequestArrived", "ResponseBegan", "RequestEnded"]


async def test_a_call_that_waited_in_vain_is_refused_and_the_core_hears_no_more(
    stage: Any, until: Any
) -> None:
    stage.coordination.script = ["wait", QUEUE_FULL]
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call())
        await until(lambda: stage.coordination.expected)
        stage.coordination.decide("made-1")
    answer = call.result()
    assert (answer.status, answer.header("retry-after")) == (429, "7")
    assert answer.header("x-pdcoord-reason") == "queue-full"
    assert stage.coordination.told() == ["RequestArrived"]
    assert stage.observer.records[0].outcome is Outcome.REFUSED


@pytest.mark.parametrize("then", [None, "10.0.0.2:8000", QUEUE_FULL])
async def test_a_client_that_leaves_while_it_waits_frees_its_place(
    stage: Any, until: Any, then: str | Refusal | None
) -> None:
    """Whatever the core decides in the moment between the client's going and the call's end."""
    stage.coordination.script = ["wait"] if then is None else ["wait", then]
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call())
        await until(lambda: stage.coordination.expected)
        stage.gone.set()
        await asyncio.sleep(0)
        if then is not None and stage.coordination.expected:
            stage.coordination.decide("made-1")
    assert call.result().status is None
    told = ["RequestArrived"] if then is QUEUE_FULL else ["RequestArrived", "RequestEnded"]
    assert stage.coordination.told() == told
    assert stage.upstream.asked == []


async def test_a_call_waits_no_longer_than_its_deadline(stage: Any) -> None:
    stage.limits = replace(stage.limits, request_deadline_s=0.02)
    stage.coordination.script = ["wait"]
    answer = await stage.call()
    assert (answer.status, answer.error["code"]) == (504, "upstream-timeout")
    assert stage.coordination.told() == ["RequestArrived", "RequestEnded"]
