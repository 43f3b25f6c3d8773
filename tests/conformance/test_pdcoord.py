"""What pdcoord's picker does beyond the protocol: plans for sidecars, and what it says of itself."""

import json
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

pytestmark = pytest.mark.pdcoord
PLAN = "x-pdcoord-plan"
ROUTING = (
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-pdcoord-plan",
    "x-pdcoord-served",
    "x-pdcoord-decision",
)
WHOLE = [(":status", "200"), ("content-type", "application/json")]


def prompt(target: Any, words: int = 4_000) -> bytes:
    return json.dumps({"model": target.model, "prompt": "word " * words, "max_tokens": 8}).encode()


async def test_a_split_call_carries_its_plan(envoy: Any, target: Any) -> None:
    """Two forms of it: our sidecar's, and the header that a foreign one reads."""
    told = await envoy.ask(prompt(target))
    headers = told.headers(envoy.post_headers())
    plan = json.loads(headers[PLAN])
    prefill = plan["prefills"][0]["address"]
    assert headers["x-prefiller-host-port"] == prefill
    assert prefill not in target.endpoints


async def test_clients_do_not_steer(envoy: Any, target: Any) -> None:
    sent = [*envoy.post_headers(), *((name, "192.0.2.1:1") for name in ROUTING)]
    after = (await envoy.ask(prompt(target), headers=sent)).headers(sent)
    assert [name for name, value in after.items() if "192.0.2.1" in value] == []


async def test_an_answer_says_how_it_was_served(envoy: Any, target: Any) -> None:
    """The sidecar's own report goes to the picker and not on to the client."""
    served = {"mode": "split", "prefill_ms": 12.0, "transfer_ms": 3.0}
    headers = [*WHOLE, ("x-pdcoord-served", json.dumps(served))]
    async with envoy.stream() as stream:
        picked = (await stream.ask(prompt(target))).destinations
        told = await stream.answer([b"{}"], headers=headers, served=picked[0])
        after = told.headers(headers)
        assert "x-pdcoord-served" not in after
        assert after["x-pdcoord-decision"].startswith("split; ")


async def test_a_clients_id_is_on_its_answer(envoy: Any, target: Any) -> None:
    sent = envoy.post_headers(x_request_id="conformance-8")
    async with envoy.stream() as stream:
        await stream.ask(prompt(target), headers=sent)
        told = await stream.answer([b"{}"], headers=WHOLE, served=None)
        assert told.headers(WHOLE)["x-request-id"] == "conformance-8"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/invocations", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("DELETE", "/v1/models/x", 405),
        ("GET", "/metrics", 404),
        ("GET", "/v1/completions", 405),
    ],
)
async def test_engines_own_pages_are_not_for_clients(
    envoy: Any, target: Any, method: str, path: str, status: int
) -> None:
    """The answer comes at the headers, before a body."""
    sent = [(":authority", "example"), (":path", path), (":method", method), (":scheme", "http")]
    told = await envoy.ask(b"{}", headers=sent)
    assert told.status == status
    assert target.model not in told.refusal.body.decode()


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1/%63ompletions"])
async def test_a_call_is_planned_however_its_path_is_written(envoy: Any, target: Any, path: str) -> None:
    """A sidecar and its engine decode the path, so what they take for a call must have an account."""
    sent = envoy.post_headers(path)
    headers = (await envoy.ask(prompt(target), headers=sent)).headers(sent)
    assert json.loads(headers[PLAN])["prefills"]
    assert headers[":path"] == "/v1/completions"


@pytest.mark.parametrize("field", ["kv_transfer_params", "bootstrap_room"])
async def test_where_kv_comes_from_is_not_the_clients_choice(envoy: Any, target: Any, field: str) -> None:
    body = json.loads(prompt(target)) | {field: 7}
    told = await envoy.ask(json.dumps(body).encode())
    assert told.status == 400
    assert field in told.refusal.body.decode()


async def test_without_engines_it_lives_and_serves_nobody(start_own: Any, envoy: Any, target: Any) -> None:
    """NOT_SERVING as a ready picker, so that a proxy uses another one; 503 to whoever comes all the same."""
    lonely = start_own("--no-engines")
    async with grpc.aio.insecure_channel(lonely.health) as channel:
        health = HealthStub(channel)
        states = [
            (await health.Check(health_pb2.HealthCheckRequest(service=service))).status
            for service in ("liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor")
        ]
    assert states == [
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    ]
    async with grpc.aio.insecure_channel(lonely.address) as channel:
        told = await type(envoy)(channel).ask(prompt(target))
    assert told.status == 503
