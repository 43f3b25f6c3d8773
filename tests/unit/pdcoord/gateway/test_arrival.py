"""A call as it comes in: its body within bounds, what is refused of it, and what goes on as what it asks."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.events import Outcome
from pdcoord.core.model import PrefixMode
from pdcoord.front.ports import Limits
from pdcoord.gateway.arrival import Body
from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason
from pdcoord.wire.room import ByteRoom

LIMITS = Limits(body_bytes_max=10, body_timeout_s=5.0)


async def receive() -> Any:
    await asyncio.sleep(0)
    return {"type": "http.request", "body": b"12345", "more_body": False}


async def test_a_body_holds_its_room_until_it_is_let_go_of() -> None:
    room = ByteRoom(8)
    body = Body(room)
    await body.read([], receive, LIMITS)
    assert (body.raw, room.held_bytes) == (b"12345", 5)
    body.raw = b"changed to something longer"
    with pytest.raises(RefusedError) as caught:
        await Body(room).read([], receive, LIMITS)
    assert caught.value.refusal.reason is RefuseReason.SATURATED
    for _ in range(2):
        body.let_go()
        assert (body.raw, room.held_bytes) == (b"", 0)


async def test_a_length_that_is_too_much_is_refused_unread() -> None:
    async def never() -> Any:
        raise AssertionError

    with pytest.raises(RefusedError) as caught:
        await Body(ByteRoom(8)).read([(b"content-length", b"11")], never, LIMITS)
    assert caught.value.refusal.reason is RefuseReason.BODY_TOO_LARGE


async def test_the_body_goes_upstream_as_it_came(stage: Any) -> None:
    raw = b' { "prompt" : "h\\u0069", "model":"org/model", "seed": 12345678901234567890, "x": 1.10 } '
    await stage.call(body=raw)
    assert stage.upstream.asked[0]["body"] == raw


async def test_an_alias_goes_upstream_as_the_served_name_and_nothing_else_changes(stage: Any) -> None:
    raw = b'{"prompt":"hi","seed":12345678901234567890,"model":"alias","x":1.10,"u":"\\u00e9"}'
    await stage.call(body=raw)
    sent = stage.upstream.asked[0]["body"]
    assert sent == b'{"prompt":"hi","seed":12345678901234567890,"model":"org/model","x":1.10,"u":"\\u00e9"}'


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
    error = answer.error
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
    assert (answer.status, answer.error["code"]) == (413, "body-too-large")


async def test_a_body_that_does_not_come_is_refused_in_time(stage: Any) -> None:
    stage.limits = replace(stage.limits, body_timeout_s=0.01)
    answer = await stage.call(body=None)
    assert answer.status == 408
    assert "0.01 s" in answer.error["message"]


async def test_bodies_of_all_calls_share_a_room(stage: Any) -> None:
    raw = b'{"model":"org/model","prompt":"hi"}'
    stage.limits = replace(stage.limits, bodies_bytes_max=len(raw) - 1)
    answer = await stage.call(body=raw)
    assert (answer.status, answer.error["code"], answer.header("retry-after")) == (429, "saturated", "1")
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


async def test_tenant_objective_and_slo_reach_the_core_and_go_on_to_the_engine(stage: Any) -> None:
    headers = [(b"x-llm-d-inference-fairness-id", b"team-a"), (b"x-slo-ttft-ms", b"250")]
    headers += [(b"x-gateway-inference-objective", b"nobody-knows")]
    await stage.call(headers=headers)
    request = stage.coordination.events[0].request
    assert (request.tenant, request.priority, request.slo.ttft_s) == ("team-a", 0, 0.25)
    assert stage.observer.records[0].has_unknown_objective
    assert set(headers) <= set(stage.upstream.asked[0]["headers"])


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
