"""What the front door answers beside the relayed calls."""

import json
from typing import Any

import pytest
from fastapi import FastAPI

from pdcoord.protocol.errors import Refusal, RefuseReason
from pdcoord.protocol.openai import APIS


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


@pytest.mark.parametrize("name", ["org/model", "alias"])
async def test_a_model_is_found_by_name_and_alias_slashes_included(stage: Any, name: str) -> None:
    answer = await stage.call(f"/v1/models/{name}", b"", method="GET")
    assert (answer.status, json.loads(answer.body)["id"]) == (200, name)


async def test_an_unknown_model_has_no_page(stage: Any) -> None:
    answer = await stage.call("/v1/models/other", b"", method="GET")
    assert (answer.status, error_of(answer)["code"]) == (404, "model-unknown")
    assert stage.observer.reasons == [RefuseReason.MODEL_UNKNOWN]


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
