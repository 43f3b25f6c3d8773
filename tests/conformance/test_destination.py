"""Where a call goes: protocol 004 v1.0.0, "Destination Endpoint" and "Destination Endpoint Served"."""

import json
from typing import Any

import pytest

DESTINATION = "x-gateway-destination-endpoint"


def prompt(target: Any, words: int = 400, **more: Any) -> bytes:
    return json.dumps({"model": target.model, "prompt": "word " * words, "max_tokens": 8, **more}).encode()


async def test_header_and_metadata_name_the_same_endpoints(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target))
    assert told.refusal is None
    header = told.headers([])[DESTINATION]
    assert told.metadata["envoy.lb"][DESTINATION] == header


async def test_every_endpoint_is_one_that_may_be_picked(envoy: Any, target: Any) -> None:
    picked = (await envoy.ask(prompt(target))).destinations
    assert set(picked) <= target.endpoints
    assert len(picked) == len(set(picked)), "a fallback that was tried already is none"


@pytest.mark.optional
async def test_fallbacks_follow_the_first(envoy: Any, target: Any) -> None:
    picked = (await envoy.ask(prompt(target))).destinations
    assert len(picked) > 1 or len(target.endpoints) == 1


async def test_the_destination_comes_with_the_answer_to_the_headers(envoy: Any, target: Any) -> None:
    async with envoy.stream() as stream:
        told = await stream.ask(prompt(target))
        assert told.kinds[0] == "request_headers"
        assert len(told.heads) == 1
        names = [each.header.key for each in told.heads[0].header_mutation.set_headers]
        assert names.count(DESTINATION) == 1


async def test_routes_are_chosen_again_with_the_new_header(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target))
    assert told.heads[0].clear_route_cache


async def test_what_a_client_sent_under_its_name_is_replaced(envoy: Any, target: Any) -> None:
    sent = envoy.post_headers(**{DESTINATION: "192.0.2.1:1"})
    told = await envoy.ask(prompt(target), headers=sent)
    after = told.headers(sent)[DESTINATION]
    assert "192.0.2.1" not in after
    assert after == told.metadata["envoy.lb"][DESTINATION]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x"])
async def test_a_call_without_a_body_is_picked_for_at_once(envoy: Any, target: Any, path: str) -> None:
    sent = [(":authority", "example"), (":path", path), (":method", "GET"), (":scheme", "http")]
    told = await envoy.ask(None, headers=sent)
    if told.refusal is None:
        assert set(told.destinations) <= target.endpoints or target.model_full
        assert told.metadata["envoy.lb"][DESTINATION] == told.headers(sent)[DESTINATION]
        assert told.kinds == ["request_headers"]
    else:
        # A picker may know its models itself.
        assert told.status == (200 if path == "/v1/models" else 404)


@pytest.mark.parametrize("which", ["first", "fallback", "unknown", "absent", "nonsense"])
async def test_what_served_is_taken_whatever_it_is(envoy: Any, target: Any, which: str) -> None:
    """The data plane says who served, which need not be the first of the list."""
    async with envoy.stream() as stream:
        picked = (await stream.ask(prompt(target))).destinations
        served = {
            "first": picked[0],
            "fallback": picked[-1],
            "unknown": "192.0.2.1:1",
            "absent": None,
            "nonsense": "\u20ac,:,",
        }[which]
        headers = [(":status", "200"), ("content-type", "application/json")]
        told = await stream.answer([b'{"id": "x"}'], headers=headers, served=served)
        assert told.refusal is None
        assert told.body == b'{"id": "x"}'
        assert (await stream.end()).name == "OK"


@pytest.mark.optional
async def test_a_request_without_an_id_is_given_one(envoy: Any, target: Any) -> None:
    told = await envoy.ask(prompt(target))
    assert told.headers([]).get("x-request-id")


async def test_a_requests_own_id_is_kept(envoy: Any, target: Any) -> None:
    sent = envoy.post_headers(x_request_id="conformance-7")
    told = await envoy.ask(prompt(target), headers=sent)
    assert told.headers(sent)["x-request-id"] == "conformance-7"
