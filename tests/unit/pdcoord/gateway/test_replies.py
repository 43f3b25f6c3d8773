"""What a client gets: an engine's answer, an error, a refusal, and how an answer that began is ended."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import Outcome, RequestEnded, ResponseBegan
from pdcoord.protocol.errors import RefuseReason, RungReason
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader, encode_served

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
PACKED = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]


async def test_answer_headers_of_the_connection_and_of_ours_stay_behind(stage: Any, reply: Any) -> None:
    stage.upstream.script = [
        reply(
            headers=[
                (b"content-type", b"application/json"),
                (b"content-length", b"11"),
                (b"connection", b"keep-alive, x-hop"),
                (b"keep-alive", b"5"),
                (b"x-hop", b"1"),
                (b"x-engine", b"1"),
                (b"x-request-id", b"engine's"),
                (b"x-pdcoord-served", encode_served(ServedHeader(mode=Mode.COLOCATED))),
            ]
        )
    ]
    answer = await stage.call(headers=[(b"x-request-id", b"mine")])
    assert sorted(name for name, _ in answer.headers) == [
        b"content-length",
        b"content-type",
        b"x-engine",
        b"x-pdcoord-decision",
        b"x-request-id",
    ]
    assert answer.header("x-request-id") == "mine"


async def test_a_call_past_its_deadline_is_answered_or_broken_off(stage: Any, reply: Any) -> None:
    stage.limits = replace(stage.limits, request_deadline_s=0.02)
    stage.upstream.script = [None, reply(headers=PACKED, chunks=[b"part", None])]
    early = await stage.call()
    assert (early.status, early.error["code"]) == (504, "upstream-timeout")
    late = await stage.call()
    assert (late.status, late.body, late.is_complete) == (200, b"part", False)
    # Our own deadline is no failure of the endpoint that was still answering.
    outcomes = [record.outcome for record in stage.observer.records]
    assert outcomes == [Outcome.UPSTREAM_ERROR, Outcome.REFUSED]
    assert stage.coordination.told().count("RequestEnded") == 2


def last_error(body: bytes) -> str:
    code: str = json.loads(body.removesuffix(b"\n\n").rpartition(b"data: ")[2])["error"]["code"]
    return code


async def test_a_stream_past_its_deadline_ends_with_that_reason(stage: Any, reply: Any) -> None:
    stage.limits = replace(stage.limits, request_deadline_s=0.05)
    stage.upstream.script = [reply(headers=SSE, chunks=[b"data: 1\n\n", None])]
    answer = await stage.call()
    assert (last_error(answer.body), answer.is_complete) == ("upstream-timeout", False)
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.REFUSED, 1)
    assert stage.observer.records[0].reason is RefuseReason.UPSTREAM_TIMEOUT


async def test_a_stream_that_the_drain_cuts_ends_with_that_reason(stage: Any, reply: Any) -> None:
    silent = reply(headers=SSE, chunks=[b"data: 1\n\n", None])
    stage.upstream.script = [silent]
    read: list[bytes] = []
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call(read=read.append))
        await silent.reading.wait()
        call.cancel()
    assert call.cancelled()
    assert last_error(b"".join(read)) == "draining"
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.REFUSED, 1)


async def test_a_defect_within_a_stream_ends_it_with_a_named_error(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=SSE, chunks=[b"data: 1\n\n", RuntimeError("secret")])]
    answer = await stage.call()
    assert (last_error(answer.body), answer.is_complete) == ("internal", False)
    assert b"secret" not in answer.body
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.REFUSED, 1)


async def test_a_defect_is_a_500_without_a_trace(stage: Any) -> None:
    stage.coordination.script = [RuntimeError("secret of /srv/pdcoord")]
    answer = await stage.call()
    assert (answer.status, answer.error["code"]) == (500, "internal")
    assert b"secret" not in answer.body
    assert [str(error) for error in stage.observer.crashes] == ["secret of /srv/pdcoord"]


async def test_a_defect_within_an_answer_breaks_it_off(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=PACKED, chunks=[b"part", RuntimeError("secret")])]
    answer = await stage.call()
    assert (answer.body, answer.is_complete) == (b"part", False)
    assert stage.coordination.told()[-1] == "RequestEnded"
    assert len(stage.observer.crashes) == 1


@pytest.mark.parametrize(
    ("served", "header"),
    [
        (None, "split; split-faster"),
        (ServedHeader(mode=Mode.SPLIT, prefill="10.0.0.1:8000"), "split; split-faster"),
        (
            ServedHeader(
                mode=Mode.COLOCATED,
                rungs=(
                    RungTaken(
                        rung=RungKind.COLOCATED, reason=RungReason.PREFILL_ERROR, target="10.0.0.1:8000"
                    ),
                ),
            ),
            "colocated; prefill-error",
        ),
    ],
)
async def test_the_decision_header_says_how_it_was_served_in_the_end(
    stage: Any, reply: Any, served: Any, header: str
) -> None:
    stage.coordination.is_split = True
    headers = [] if served is None else [(b"x-pdcoord-served", encode_served(served))]
    stage.upstream.script = [reply(headers=headers)]
    answer = await stage.call()
    assert answer.header("x-pdcoord-decision") == header
    assert answer.header("x-pdcoord-served") is None
    assert stage.coordination.events[1] == ResponseBegan("made-1", served)
