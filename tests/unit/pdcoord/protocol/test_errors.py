"""Reasons and the answers they become."""

import json

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
