"""One attempt: what engines are sent, and what of their answers is a failure, an answer or an error."""

import asyncio
from typing import Any

import pytest

from pdcoord.core.events import DecodeFailed, Outcome, RequestEnded, ResponseBegan
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader, decode_plan, encode_served
from pdcoord.wire.errors import ConnectError, HeadTimeoutError, InvalidRequestError, ResetError, StreamError

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


async def test_routing_headers_from_outside_are_replaced_and_the_rest_goes_on(stage: Any) -> None:
    stage.coordination.is_split = True
    await stage.call(
        headers=[
            (b"authorization", b"Bearer key"),
            (b"x-prefiller-host-port", b"6.6.6.6:1"),
            (b"x-encoder-hosts-ports", b"6.6.6.6:1"),
            (b"x-gateway-destination-endpoint", b"6.6.6.6:1"),
            (b"x-pdcoord-plan", b"{}"),
            (b"x-pdcoord-anything", b"1"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"1"),
            (b"host", b"outside"),
            (b"content-length", b"1"),
            (b"transfer-encoding", b"chunked"),
            (b"accept", b"*/*"),
        ]
    )
    sent = stage.upstream.asked[0]["headers"]
    assert (b"authorization", b"Bearer key") in sent
    assert (b"accept", b"*/*") in sent
    names = [name for name, _ in sent]
    assert sorted(names) == sorted(
        {b"authorization", b"accept", b"x-request-id", b"x-pdcoord-plan", b"x-prefiller-host-port"}
    )
    headers = dict(sent)
    assert headers[b"x-prefiller-host-port"] == b"10.0.0.1:8000"
    plan = decode_plan(headers[b"x-pdcoord-plan"])
    assert [target.address for target in plan.prefills] == ["10.0.0.1:8000", "10.0.0.3:8000"]
    assert plan.is_colocated_allowed


def failed_first(reply: Any, kind: str) -> Any:
    reason = [(b"x-pdcoord-reason", kind.encode()), (b"content-type", b"application/json")]
    match kind:
        case "connect":
            return ConnectError("refused")
        case "reset":
            return ResetError("lost")
        case "head-timeout":
            return HeadTimeoutError("slow")
        case "not-http":
            return StreamError("not http")
        case "no-first-byte":
            return reply(headers=SSE, chunks=[StreamError("gone")])
        case "engine-500" | "engine-503" | "engine-504":
            return reply(status=int(kind[-3:]), chunks=[b'{"error":{"message":"engine"}}'])
        case "target-not-allowed" | "plan-unsigned":
            return reply(status=403, headers=reason)
        case _:
            return reply(status=503, headers=reason)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("connect", RungReason.DECODE_UNREACHABLE),
        ("reset", RungReason.DECODE_UNREACHABLE),
        ("head-timeout", RungReason.DECODE_TIMEOUT),
        ("not-http", RungReason.DECODE_ERROR),
        ("no-first-byte", RungReason.DECODE_ERROR),
        ("engine-500", RungReason.DECODE_ERROR),
        ("engine-504", RungReason.DECODE_TIMEOUT),
        ("draining", RungReason.DECODE_DRAINING),
        ("ladder-exhausted", RungReason.DECODE_ERROR),
        ("upstream-failed", RungReason.DECODE_ERROR),
        ("upstream-timeout", RungReason.DECODE_TIMEOUT),
        ("target-not-allowed", RungReason.TARGET_NOT_ALLOWED),
        ("plan-unsigned", RungReason.PLAN_REFUSED),
    ],
)
async def test_a_failure_before_a_byte_goes_to_the_next_endpoint(
    stage: Any, reply: Any, kind: str, reason: RungReason
) -> None:
    stage.coordination.script = ["10.0.0.2:8000", "10.0.0.4:8000"]
    stage.upstream.script = [failed_first(reply, kind), reply(chunks=[b"second"])]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"second", True)
    assert [asked["address"] for asked in stage.upstream.asked] == ["10.0.0.2:8000", "10.0.0.4:8000"]
    assert stage.upstream.asked[0]["body"] == stage.upstream.asked[1]["body"]
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed", "ResponseBegan", "RequestEnded"]
    assert stage.coordination.events[1].reason is reason
    assert stage.observer.records[0].failures == (reason,)


async def test_a_sidecars_report_travels_with_its_failure(stage: Any, reply: Any) -> None:
    taken = RungTaken(rung=RungKind.OTHER_PREFILL, reason=RungReason.PREFILL_TIMEOUT, target="10.0.0.1:8000")
    served = ServedHeader(mode=Mode.COLOCATED, rungs=(taken,))
    headers = [(b"x-pdcoord-reason", b"ladder-exhausted"), (b"x-pdcoord-served", encode_served(served))]
    stage.coordination.script = ["10.0.0.2:8000", "10.0.0.4:8000"]
    stage.upstream.script = [reply(status=503, headers=headers), reply()]
    await stage.call()
    assert stage.coordination.events[1] == DecodeFailed("made-1", RungReason.DECODE_ERROR, served)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
async def test_an_engines_own_4xx_is_relayed_as_it_is(stage: Any, reply: Any, status: int) -> None:
    stage.upstream.script = [reply(status=status, chunks=[b'{"error":{"code":1}}'])]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (status, b'{"error":{"code":1}}', True)
    assert stage.coordination.events[-1] == RequestEnded("made-1", Outcome.CLIENT_ERROR)


async def test_a_sidecars_refusal_that_is_the_clients_fault_is_relayed_with_its_reason(
    stage: Any, reply: Any
) -> None:
    headers = [(b"x-pdcoord-reason", b"body-too-large"), (b"content-type", b"application/json")]
    stage.upstream.script = [reply(status=413, headers=headers, chunks=[b"{}"])]
    answer = await stage.call()
    assert (answer.status, answer.header("x-pdcoord-reason")) == (413, "body-too-large")


@pytest.mark.parametrize("chunks", [[], [b": alive\n\n", b": alive\n"]])
async def test_an_event_stream_without_an_event_is_a_failure(
    stage: Any, reply: Any, chunks: list[bytes]
) -> None:
    stage.coordination.script = ["10.0.0.2:8000", "10.0.0.4:8000"]
    stage.upstream.script = [reply(headers=SSE, chunks=chunks), reply(headers=SSE, chunks=[b"data: 1\n\n"])]
    answer = await stage.call()
    assert (answer.body, answer.is_complete) == (b"data: 1\n\n", True)
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed", "ResponseBegan", "RequestEnded"]
    assert stage.coordination.events[1].reason is RungReason.DECODE_ERROR


async def test_signs_of_life_are_no_answer_until_an_event_comes(stage: Any, reply: Any) -> None:
    silent = reply(headers=SSE, chunks=[b": alive\n\n", b": alive\n\n", None])
    stage.upstream.script = [silent]
    async with asyncio.TaskGroup() as group:
        call = group.create_task(stage.call())
        await silent.reading.wait()
        assert stage.coordination.told() == ["RequestArrived"]
        stage.gone.set()
    assert call.result().status is None


async def test_a_request_that_cannot_be_put_on_the_wire_is_the_clients_fault(stage: Any) -> None:
    stage.upstream.script = [InvalidRequestError("header x-y has a control character")]
    answer = await stage.call()
    assert (answer.status, answer.error["code"]) == (400, "invalid-field")
    assert stage.coordination.told() == ["RequestArrived", "RequestEnded"]


async def test_a_report_that_cannot_be_read_is_no_report(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=[(b"x-pdcoord-served", b"{")])]
    assert (await stage.call()).status == 200
    assert stage.coordination.events[1] == ResponseBegan("made-1", None)


async def test_waits_differ_for_streams_and_whole_answers(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(), reply()]
    await stage.call()
    await stage.call(body=b'{"model":"org/model","prompt":"hi","stream":true}')
    waits = [asked["head_timeout_s"] for asked in stage.upstream.asked]
    assert waits == [stage.limits.answer_timeout_s, stage.limits.head_timeout_s]
