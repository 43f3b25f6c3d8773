"""What the front door answers beside the relayed calls."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI

from pdcoord.core.events import Outcome, RequestArrived
from pdcoord.core.model import AdmissionRules
from pdcoord.front.keys import KEY_RANDOM_BYTES, ApiKey, KeyRing, digest_of, make_key
from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.openai import APIS
from pdcoord.wire.errors import ConnectError

KEY = make_key(bytes(KEY_RANDOM_BYTES))
BEARER = (b"authorization", b"Bearer " + KEY.encode())


def ask_for_keys(stage: Any, **fields: Any) -> None:
    key = ApiKey("a", digest_of(KEY.encode()), "team", "group", **fields)
    stage.app._relay.door.gate.use(KeyRing([key], bytes(32)))


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.header("content-type") == "application/json"
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


async def test_models_and_aliases_are_listed(stage: Any) -> None:
    answer = await stage.call("/v1/models", b"", method="GET")
    cards = json.loads(answer.body)
    assert cards["object"] == "list"
    assert [(card["id"], card["root"]) for card in cards["data"]] == [
        ("org/model", "org/model"),
        ("alias", "org/model"),
    ]
    assert {card["created"] for card in cards["data"]} == {1_700_000_000}
    assert answer.header("x-request-id") == "made-1"


async def test_an_adapter_is_listed_under_its_model_and_asked_by_its_name(stage: Any) -> None:
    stage.coordination.served = replace(stage.coordination.served, adapters=("sql",))
    cards = json.loads((await stage.call("/v1/models", b"", method="GET")).body)["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("org/model", "org/model", None),
        ("alias", "org/model", None),
        ("sql", "sql", "org/model"),
    ]
    await stage.call(body=b'{"model":"sql","prompt":"hi"}')
    ask_for_keys(stage, models=frozenset({"sql"}))
    answer = await stage.call("/v1/models", b"", method="GET", headers=[BEARER])
    assert [card["id"] for card in json.loads(answer.body)["data"]] == ["sql"]
    await stage.call(body=b'{"model":"sql","prompt":"hi"}', headers=[BEARER])
    refused = await stage.call(body=b'{"model":"alias","prompt":"hi"}', headers=[BEARER])
    assert (refused.status, error_of(refused)["code"]) == (403, "model-forbidden")
    assert [json.loads(asked["body"])["model"] for asked in stage.upstream.asked] == ["sql", "sql"]
    assert [record.adapter for record in stage.observer.records] == ["sql", "sql", None]


@pytest.mark.parametrize("name", ["org/model", "alias"])
async def test_a_model_is_found_by_name_and_alias_slashes_included(stage: Any, name: str) -> None:
    answer = await stage.call(f"/v1/models/{name}", b"", method="GET")
    assert (answer.status, json.loads(answer.body)["id"]) == (200, name)


async def test_an_unknown_model_has_no_page(stage: Any) -> None:
    answer = await stage.call("/v1/models/other", b"", method="GET")
    assert (answer.status, error_of(answer)["code"]) == (404, "model-unknown")
    assert stage.observer.reasons == [RefuseReason.MODEL_UNKNOWN]


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/messages", "invalid_request_error"), ("/v1/messages/batches", "not_found_error")],
)
async def test_under_messages_what_is_not_there_is_an_error_of_anthropics(
    stage: Any, path: str, kind: str
) -> None:
    answer = json.loads((await stage.call(path, b"", method="GET")).body)
    assert (answer["type"], answer["error"]["type"]) == ("error", kind)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "path-unknown"),
        ("POST", "/v1/chat/completions/", 404, "path-unknown"),
        ("POST", "/v1/chat", 404, "path-unknown"),
        ("GET", "/docs", 404, "path-unknown"),
        ("GET", "/v1/chat/completions", 405, "method-not-allowed"),
        ("DELETE", "/v1/completions", 405, "method-not-allowed"),
        ("BREW", "/v1/completions", 405, "method-not-allowed"),
        ("POST", "/v1/models", 405, "method-not-allowed"),
        ("PUT", "/metrics", 405, "method-not-allowed"),
    ],
)
async def test_other_paths_and_methods_get_an_openai_error(
    stage: Any, method: str, path: str, status: int, code: str
) -> None:
    answer = await stage.call(path, b"", method=method, headers=[(b"x-request-id", b"r-1")])
    assert (answer.status, error_of(answer)["code"]) == (status, code)
    assert answer.header("x-request-id") == "r-1"
    assert (answer.header("allow") is not None) == (status == 405)
    assert stage.observer.reasons == [code]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/v1/models", "/v1/models/org/model"])
async def test_head_is_answered_as_get_is_but_for_the_body(stage: Any, path: str) -> None:
    whole, head = [await stage.call(path, b"", method=method) for method in ("GET", "HEAD")]
    assert (head.status, head.body) == (200, b"")
    for name in ("content-type", "content-length"):
        assert head.header(name) == whole.header(name) is not None


async def test_head_is_not_for_what_only_post_is(stage: Any) -> None:
    answer = await stage.call("/v1/completions", b"", method="HEAD")
    assert (answer.status, answer.body) == (405, b"")
    assert stage.upstream.asked == []


async def test_livez_is_always_ok(stage: Any) -> None:
    stage.coordination.unready_refusal = Refusal(RefuseReason.DRAINING, "bye")
    assert (await stage.call("/livez", b"", method="GET")).status == 200


async def test_readyz_asks_and_says_why_not(stage: Any) -> None:
    assert (await stage.call("/readyz", b"", method="GET")).status == 200
    stage.coordination.unready_refusal = Refusal(RefuseReason.DRAINING, "bye")
    answer = await stage.call("/readyz", b"", method="GET")
    assert (answer.status, error_of(answer)["message"]) == (503, "bye")


async def test_metrics_are_prometheus_text(stage: Any) -> None:
    answer = await stage.call("/metrics", b"", method="GET")
    assert answer.body == b"metric 1\n"
    assert answer.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_defect_of_a_page_is_a_500_without_a_trace(stage: Any) -> None:
    def broken() -> bytes:
        raise RuntimeError("secret")

    stage.metrics = broken
    answer = await stage.call("/metrics", b"", method="GET")
    assert (answer.status, error_of(answer)["code"]) == (500, "internal")
    assert b"secret" not in answer.body
    assert [str(error) for error in stage.observer.crashes] == ["secret"]


@pytest.mark.parametrize("path", list(APIS))
async def test_every_call_of_the_api_is_served_and_documented(stage: Any, path: str) -> None:
    fields = {
        "model": "alias",
        "messages": [{}],
        "prompt": "x",
        "input": "x",
        "query": "x",
        "documents": ["x"],
    }
    answer = await stage.call(path, json.dumps(fields | {"tokens": [1]}).encode())
    assert (answer.status, answer.is_complete) == (200, True)
    operation = stage.app.openapi()["paths"][path]["post"]
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    assert operation["requestBody"]["required"]


async def test_calls_are_served_where_the_app_is_mounted_in_another(stage: Any) -> None:
    outer = FastAPI()
    outer.mount("/llm", stage.app)
    stage._app = outer
    answer = await stage.call("/llm/v1/completions")
    assert (answer.status, answer.body) == (200, b'{"ok":true}')


async def test_the_document_names_every_schema_that_it_refers_to(stage: Any) -> None:
    document = json.loads((await stage.call("/openapi.json", b"", method="GET")).body)
    assert "Error" in document["components"]["schemas"]
    assert "HTTPValidationError" not in json.dumps(document)


async def test_models_are_those_of_the_key(stage: Any) -> None:
    ask_for_keys(stage, models=frozenset({"other"}))
    for path in ("/v1/models", "/v1/models/org/model", "/v1/models/none"):
        answer = await stage.call(path, b"", method="GET")
        assert (answer.status, answer.header("www-authenticate")) == (401, "Bearer")
    assert stage.observer.reasons == [RefuseReason.UNAUTHORIZED] * 3
    answer = await stage.call("/v1/models", b"", method="GET", headers=[BEARER])
    assert (answer.status, json.loads(answer.body)["data"]) == (200, [])
    answer = await stage.call("/v1/models/alias", b"", method="GET", headers=[BEARER])
    assert (answer.status, error_of(answer)["code"]) == (403, "model-forbidden")
    answer = await stage.call("/v1/models/none", b"", method="GET", headers=[BEARER])
    assert (answer.status, error_of(answer)["code"]) == (404, "model-unknown")
    ask_for_keys(stage, models=frozenset({"alias"}))
    assert (await stage.call("/v1/models/org/model", b"", method="GET", headers=[BEARER])).status == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/openapi.json"])
async def test_pages_for_operators_need_no_key(stage: Any, path: str) -> None:
    ask_for_keys(stage)
    assert (await stage.call(path, b"", method="GET")).status == 200


async def test_a_call_without_a_key_is_answered_before_its_body(stage: Any) -> None:
    ask_for_keys(stage)
    answer = await stage.call(body=None)
    assert (answer.status, error_of(answer)["code"]) == (401, "unauthorized")
    assert (stage.upstream.asked, stage.coordination.events) == ([], [])
    assert stage.observer.records[0].key_name is None


async def test_what_goes_upstream_has_the_tenants_salt_and_no_key(stage: Any) -> None:
    ask_for_keys(stage)
    claim = (b"x-llm-d-inference-fairness-id", b"another")
    await stage.call(headers=[BEARER, claim, (b"x-api-key", KEY.encode()), (b"accept", b"a/b")])
    (asked,) = stage.upstream.asked
    names = [name for name, _ in asked["headers"]]
    assert (b"accept", b"a/b") in asked["headers"]
    assert (claim[0], b"team") in asked["headers"]
    assert names.count(claim[0]) == 1
    assert {b"authorization", b"x-api-key"}.isdisjoint(names)
    assert len(json.loads(asked["body"])["cache_salt"]) == 43
    assert stage.coordination.events[0].request.tenant == "team"
    assert stage.observer.records[0].key_name == "a"


async def test_a_model_that_the_key_is_not_for_is_not_asked(stage: Any) -> None:
    ask_for_keys(stage, models=frozenset({"other"}))
    answer = await stage.call(headers=[BEARER])
    assert (answer.status, error_of(answer)["code"]) == (403, "model-forbidden")
    assert stage.upstream.asked == []


def model_with(stage: Any, **priorities: int) -> None:
    rules = AdmissionRules(objectives=priorities)
    stage.coordination.served = replace(stage.coordination.served, admission=rules)


async def test_a_key_buys_no_rank_by_an_objective_that_is_not_its_own(stage: Any) -> None:
    model_with(stage, critical=9, batch=-1)
    names = (b"x-llm-d-inference-objective", b"x-gateway-inference-objective")
    await stage.call(headers=[(names[0], b"critical")])
    ask_for_keys(stage)
    for each in ((names[0], b"critical"), (names[1], b"critical"), (names[0], b"batch")):
        await stage.call(headers=[BEARER, each])
    ask_for_keys(stage, objectives=frozenset({"critical"}))
    await stage.call(headers=[BEARER, (names[0], b"critical")])
    arrived = [event.request for event in stage.coordination.events if isinstance(event, RequestArrived)]
    assert [request.priority for request in arrived] == [9, 0, 0, -1, 9]
    told = [record.has_unknown_objective for record in stage.observer.records]
    assert told == [False, True, True, False, False]


async def test_a_call_that_names_an_adapter_goes_nowhere(stage: Any) -> None:
    ask_for_keys(stage, models=frozenset({"org/model"}))
    body = b'{"model":"org/model","prompt":"hi","lora_path":"private"}'
    answer = await stage.call(body=body, headers=[BEARER])
    assert (answer.status, error_of(answer)["param"]) == (400, "lora_path")
    assert stage.upstream.asked == []


@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_leaves_before_an_answer_pays_for_what_was_made_of_it(stage: Any, is_stream: bool) -> None:
    ask_for_keys(stage, tokens_per_minute=60)
    stage.coordination.make_plan = quick(stage.coordination.make_plan)
    asked = stage.upstream.asked

    async def request(*_: Any, **__: Any) -> None:
        asked.append({})
        began_s = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began_s + 0.05:
            await asyncio.sleep(0.01)
        stage.gone.set()
        await asyncio.Event().wait()

    usual, stage.upstream.request = stage.upstream.request, request
    body = json.dumps({"model": "org/model", "prompt": "hi", "max_tokens": 500, "stream": is_stream})
    assert (await stage.call(body=body.encode(), headers=[BEARER])).status is None
    assert stage.observer.records[0].outcome is Outcome.CLIENT_GONE
    stage.upstream.request = usual
    answer = await stage.call(headers=[BEARER])
    assert (answer.status, error_of(answer)["code"]) == (429, "rate-limited")
    assert len(asked) == 1


def quick(make_plan: Any) -> Any:
    """Plans on an engine that makes 10,000 tokens a second, from the first moment on."""
    figures = {"queue_s": 0.0, "prefill_s": 0.0, "transfer_s": 0.0, "step_s": 1e-4}

    def make(*args: Any, **more: Any) -> Any:
        plan = make_plan(*args, **more)
        chosen = replace(plan.chosen, figures=replace(plan.chosen.figures, **figures))
        return replace(plan, chosen=chosen)

    return make


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
async def test_a_key_is_never_shown_as_a_request_id(stage: Any, path: str) -> None:
    for is_open in (True, False):
        for shown in (KEY, f"id:{KEY}", "sk-0123456789abcdef0123"):
            answer = await stage.call(path, headers=[BEARER, (b"x-request-id", shown.encode())])
            assert str(answer.header("x-request-id")).startswith("made-")
        if is_open:
            ask_for_keys(stage)
    assert not [record for record in stage.observer.records if KEY in record.id or "sk-" in record.id]
    seen = [dict(asked["headers"])[b"x-request-id"] for asked in stage.upstream.asked]
    assert not [each for each in seen if not each.startswith(b"made-")]


async def test_a_request_counts_once_however_often_it_is_tried(stage: Any) -> None:
    ask_for_keys(stage, requests_per_minute=2)
    stage.coordination.script = ["10.0.0.2:8000", "10.0.0.4:8000"]
    stage.upstream.script = [ConnectError("no"), *stage.upstream.script * 2]
    assert (await stage.call(headers=[BEARER])).status == 200
    assert len(stage.upstream.asked) == 2
    assert (await stage.call(headers=[BEARER])).status == 200
    answer = await stage.call(headers=[BEARER])
    assert (answer.status, error_of(answer)["code"]) == (429, "rate-limited")
    assert int(answer.header("retry-after") or 0) in range(1, 31)
