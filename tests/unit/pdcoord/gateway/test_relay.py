"""One call's life, edge by edge: what the client gets, what upstream gets, what the core hears."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import DecodeFailed, Outcome, RequestArrived, RequestEnded, ResponseBegan
from pdcoord.core.model import PrefixMode
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader, decode_plan, encode_served
from pdcoord.wire.errors import ConnectError, HeadTimeoutError, InvalidRequestError, ResetError, StreamError

SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]
PACKED = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]
EXHAUSTED = Refusal(RefuseReason.LADDER_EXHAUSTED, "no other")


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.header("content-type") == "application/json"
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


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


async def test_the_body_goes_upstream_as_it_came(stage: Any) -> None:
    raw = b' { "prompt" : "h\\u0069", "model":"org/model", "seed": 12345678901234567890, "x": 1.10 } '
    await stage.call(body=raw)
    assert stage.upstream.asked[0]["body"] == raw


async def test_an_alias_goes_upstream_as_the_served_name_and_nothing_else_changes(stage: Any) -> None:
    raw = b'{"prompt":"hi","seed":12345678901234567890,"model":"alias","x":1.10,"u":"\\u00e9"}'
    await stage.call(body=raw)
    sent = stage.upstream.asked[0]["body"]
    assert sent == b'{"prompt":"hi","seed":12345678901234567890,"model":"org/model","x":1.10,"u":"\\u00e9"}'


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


@pytest.mark.parametrize(
    ("body", "status", "reason", "param"),
    [
        (b"{", 400, "malformed-json", None),
        (b"\xff", 400, "malformed-json", None),
        (b"", 400, "malformed-json", None),
        (b"[]", 400, "invalid-field", None),
        (b"{}", 400, "invalid-field", "model"),
        (b'{"model":3,"prompt":"x"}', 400, "invalid-field", "model"),
        (b'{"model":"org/model"}', 400, "invalid-field", "prompt"),
        (b'{"model":"org/model","prompt":3}', 400, "invalid-field", "prompt"),
        (b'{"model":"org/model","prompt":"x","n":0}', 400, "invalid-field", "n"),
        (b'{"model":"org/model","prompt":"x","stream":"yes"}', 400, "invalid-field", "stream"),
        (
            b'{"model":"org/model","prompt":"x","kv_transfer_params":{}}',
            400,
            "invalid-field",
            "kv_transfer_params",
        ),
        (b'{"model":"org/model","prompt":"x","bootstrap_host":"h"}', 400, "invalid-field", "bootstrap_host"),
        (b'{"model":"other","prompt":"x"}', 404, "model-unknown", "model"),
        (b'{"model":"' + b"m" * 5_000 + b'","prompt":"x"}', 404, "model-unknown", "model"),
        (b'{"model":"org/model","prompt":"' + b"x" * 10_000 + b'"}', 413, "body-too-large", None),
    ],
)
async def test_bad_bodies_are_refused_and_never_reach_the_core(
    stage: Any, body: Any, status: Any, reason: Any, param: Any
) -> None:
    answer = await stage.call(body=body, headers=[(b"x-request-id", b"r-1")])
    error = error_of(answer)
    assert (answer.status, error["code"], error["param"]) == (status, reason, param)
    assert answer.header("x-pdcoord-reason") == reason
    assert answer.header("x-request-id") == "r-1"
    assert len(answer.body) < 1_000
    assert stage.coordination.events == []
    assert stage.upstream.asked == []
    assert stage.observer.records[0].outcome is Outcome.CLIENT_ERROR
    assert stage.observer.records[0].reason == reason


async def test_a_body_that_says_it_is_too_long_is_not_waited_for(stage: Any) -> None:
    answer = await stage.call(body=None, headers=[(b"content-length", b"10001")])
    assert (answer.status, error_of(answer)["code"]) == (413, "body-too-large")


async def test_a_body_that_does_not_come_is_refused_in_time(stage: Any) -> None:
    stage.limits = replace(stage.limits, body_timeout_s=0.01)
    answer = await stage.call(body=None)
    assert answer.status == 408
    assert "0.01 s" in error_of(answer)["message"]


async def test_one_call_too_many_is_refused_before_its_body_is_read(stage: Any) -> None:
    stage.limits = replace(stage.limits, live_max=0)
    answer = await stage.call(body=None)
    assert (answer.status, answer.header("retry-after")) == (429, "1")
    assert stage.coordination.events == []


async def test_bodies_of_all_calls_share_a_room(stage: Any) -> None:
    raw = b'{"model":"org/model","prompt":"hi"}'
    stage.limits = replace(stage.limits, bodies_bytes_max=len(raw) - 1)
    answer = await stage.call(body=raw)
    assert (answer.status, error_of(answer)["code"], answer.header("retry-after")) == (429, "saturated", "1")
    assert stage.bodies.held_bytes == 0


@pytest.mark.parametrize("decided", ["10.0.0.2:8000", Refusal(RefuseReason.SATURATED, "x")])
async def test_a_body_gives_its_room_back(stage: Any, decided: str | Refusal) -> None:
    raw = b'{"model":"org/model","prompt":"hi"}'
    stage.limits = replace(stage.limits, bodies_bytes_max=len(raw))
    stage.coordination.script = [decided]
    answer = await stage.call(body=raw)
    assert answer.status == (200 if isinstance(decided, str) else 429)
    assert stage.bodies.held_bytes == 0


async def test_a_client_that_leaves_within_its_body_gets_nothing(stage: Any) -> None:
    stage.gone.set()
    answer = await stage.call(body=None)
    assert answer.status is None
    assert stage.observer.records[0].outcome is Outcome.CLIENT_GONE
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
    assert (answer.status, error_of(answer)["code"]) == (refusal.status, refusal.reason)
    assert answer.header("retry-after") == (
        None if refusal.retry_after_s is None else str(refusal.retry_after_s)
    )
    assert stage.coordination.told() == ["RequestArrived"]
    assert stage.observer.records[0].outcome is outcome


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
    assert (answer.status, error_of(answer)["code"]) == (503, "ladder-exhausted")
    assert stage.coordination.told() == ["RequestArrived", "DecodeFailed"]


async def test_attempts_are_bounded_whatever_the_core_says(stage: Any) -> None:
    stage.limits = replace(stage.limits, attempts_max=3)
    stage.upstream.script = [ConnectError("refused")] * 9
    answer = await stage.call()
    assert (answer.status, len(stage.upstream.asked)) == (503, 3)
    assert stage.coordination.told()[-1] == "RequestEnded"
    assert stage.coordination.told().count("RequestEnded") == 1


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


async def test_an_empty_answer_is_whole(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(chunks=[])]
    answer = await stage.call()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"", True)


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
    assert (answer.status, error_of(answer)["code"]) == (504, "upstream-timeout")
    assert stage.coordination.told() == ["RequestArrived", "RequestEnded"]


async def test_tenant_objective_and_slo_reach_the_core_and_go_on_to_the_engine(stage: Any) -> None:
    headers = [(b"x-llm-d-inference-fairness-id", b"team-a"), (b"x-slo-ttft-ms", b"250")]
    headers += [(b"x-gateway-inference-objective", b"nobody-knows")]
    await stage.call(headers=headers)
    request = stage.coordination.events[0].request
    assert (request.tenant, request.priority, request.slo.ttft_s) == ("team-a", 0, 0.25)
    assert stage.observer.records[0].has_unknown_objective
    assert set(headers) <= set(stage.upstream.asked[0]["headers"])


async def test_a_call_past_its_deadline_is_answered_or_broken_off(stage: Any, reply: Any) -> None:
    stage.limits = replace(stage.limits, request_deadline_s=0.02)
    stage.upstream.script = [None, reply(headers=PACKED, chunks=[b"part", None])]
    early = await stage.call()
    assert (early.status, error_of(early)["code"]) == (504, "upstream-timeout")
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
    assert (answer.status, error_of(answer)["code"]) == (500, "internal")
    assert b"secret" not in answer.body
    assert [str(error) for error in stage.observer.crashes] == ["secret of /srv/pdcoord"]


async def test_a_defect_within_an_answer_breaks_it_off(stage: Any, reply: Any) -> None:
    stage.upstream.script = [reply(headers=PACKED, chunks=[b"part", RuntimeError("secret")])]
    answer = await stage.call()
    assert (answer.body, answer.is_complete) == (b"part", False)
    assert stage.coordination.told()[-1] == "RequestEnded"
    assert len(stage.observer.crashes) == 1


async def test_a_request_that_cannot_be_put_on_the_wire_is_the_clients_fault(stage: Any) -> None:
    stage.upstream.script = [InvalidRequestError("header x-y has a control character")]
    answer = await stage.call()
    assert (answer.status, error_of(answer)["code"]) == (400, "invalid-field")
    assert stage.coordination.told() == ["RequestArrived", "RequestEnded"]


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


class Tokenizing:
    """Knows one prompt's tokens, or none."""

    def __init__(self, ids: list[int] | None) -> None:
        self.ids = ids
        self.asked = 0

    async def tokens(self, call: Any, model: Any) -> list[int] | None:
        self.asked += 1
        await asyncio.sleep(0)
        return self.ids


@pytest.mark.parametrize("ids", [list(range(40)), None])
async def test_tokens_are_asked_for_where_prefixes_are_precise(stage: Any, ids: list[int] | None) -> None:
    stage.tokens = Tokenizing(ids)
    stage.coordination.served = replace(stage.coordination.served, prefix_mode=PrefixMode.PRECISE)
    assert (await stage.call()).status == 200
    await stage.call("/v1/embeddings", b'{"model":"org/model","input":"hi"}')
    assert stage.tokens.asked == 1
    request = stage.coordination.events[0].request
    counted = (40, True, 2) if ids is not None else (1, False, 0)
    assert (request.prompt_tokens, request.is_prompt_counted, len(request.token_keys)) == counted


async def test_tokens_are_not_asked_for_where_prefixes_are_approximate(stage: Any) -> None:
    stage.tokens = Tokenizing([1])
    assert (await stage.call()).status == 200
    assert (stage.tokens.asked, stage.coordination.events[0].request.is_prompt_counted) == (0, False)
