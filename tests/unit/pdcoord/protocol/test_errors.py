"""Reasons and the answers they become."""

import json
from typing import Any

import pytest

from pdcoord.protocol.errors import Refusal, RefusedError, RefuseReason, RungReason

STATUSES = {
    "malformed-http": 400,
    "head-too-large": 431,
    "malformed-json": 400,
    "invalid-field": 400,
    "body-too-large": 413,
    "context-too-long": 400,
    "model-unknown": 404,
    "path-unknown": 404,
    "not-served": 404,
    "body-too-slow": 408,
    "method-not-allowed": 405,
    "target-not-allowed": 403,
    "no-endpoints": 503,
    "saturated": 429,
    "queue-full": 429,
    "waited-too-long": 429,
    "deadline": 429,
    "shed": 429,
    "draining": 503,
    "ladder-exhausted": 503,
    "upstream-timeout": 504,
    "upstream-failed": 502,
    "stream-lost": 502,
    "unauthorized": 401,
    "model-forbidden": 403,
    "rate-limited": 429,
    "plan-unsigned": 403,
    "internal": 500,
}


def test_every_reason_has_a_status_and_no_status_is_without_a_reason() -> None:
    assert {str(reason): Refusal(reason, "x").status for reason in RefuseReason} == STATUSES


@pytest.mark.parametrize("reason", list(RefuseReason))
def test_a_refusal_is_an_openai_error(reason: RefuseReason) -> None:
    refusal = Refusal(reason, 'a "quoted"\nmessage', param="n", retry_after_s=2)
    error = json.loads(refusal.body())["error"]
    assert error == {
        "message": 'a "quoted"\nmessage',
        "type": error["type"],
        "param": "n",
        "code": str(reason),
    }
    assert error["type"]
    assert dict(refusal.headers()) == {
        b"content-type": b"application/json",
        b"x-pdcoord-reason": str(reason).encode(),
        b"retry-after": b"2",
    } | ({b"www-authenticate": b"Bearer"} if refusal.status == 401 else {})
    assert refusal.is_servers_fault == (refusal.status >= 500)


def test_an_event_is_one_line_of_data_whatever_the_message() -> None:
    event = Refusal(RefuseReason.INTERNAL, "two\nlines\r\nand more").event()
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event


def data_of(event: bytes) -> tuple[bytes, dict[str, Any]]:
    name, _, data = event.partition(b"\ndata: ")
    assert data.endswith(b"}\n\n")
    return name, json.loads(data)


@pytest.mark.parametrize("reason", list(RefuseReason))
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_under_messages_an_error_is_anthropics_with_our_reason(reason: RefuseReason, path: str) -> None:
    refusal = Refusal(reason, "why", param="n")
    said = json.loads(refusal.body(path))
    kind = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "invalid_request_error",
        413: "request_too_large",
        429: "rate_limit_error",
        431: "invalid_request_error",
        500: "api_error",
        502: "api_error",
        503: "overloaded_error",
        504: "timeout_error",
    }[refusal.status]
    error = {"type": kind, "message": "why", "param": "n", "code": str(reason)}
    assert said == {"type": "error", "error": error}
    assert data_of(refusal.event(path)) == (b"event: error", said)


def test_on_responses_an_event_is_numbered_and_has_an_error_that_clients_raise() -> None:
    refusal = Refusal(RefuseReason.STREAM_LOST, "why")
    name, said = data_of(refusal.event("/v1/responses", sequence_number=7))
    assert name == b"event: error"
    assert said == {
        "type": "error",
        "code": "stream-lost",
        "message": "why",
        "param": None,
        "sequence_number": 7,
        "error": json.loads(refusal.body())["error"],
    }
    assert refusal.body("/v1/responses") == refusal.body()


def test_no_retry_is_named_where_none_helps() -> None:
    assert b"retry-after" not in dict(Refusal(RefuseReason.INVALID_FIELD, "x").headers())


def test_the_error_carries_the_refusal() -> None:
    refusal = Refusal(RefuseReason.SATURATED, "full")
    error = RefusedError(refusal)
    assert error.refusal is refusal
    assert str(error) == "full"


def test_values_are_fit_for_headers_and_labels() -> None:
    for value in [*RefuseReason, *RungReason]:
        assert value.replace("-", "").isalpha()
        assert value.islower()
