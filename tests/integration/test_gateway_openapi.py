"""The gateway against its own OpenAPI document: no 5xx, and no answer that is not documented."""

import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Self

import schemathesis
import structlog
from hypothesis import settings

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.events import ModelsReplaced
from pdcoord.core.fleet import EndpointSeen, Sample, SampleTaken
from pdcoord.front.gate import Gate
from pdcoord.front.ports import Limits
from pdcoord.gateway.app import GatewayApp
from pdcoord.gateway.arrival import Door
from pdcoord.gateway.relay import Relay
from pdcoord.policy.compile import compile_policy
from pdcoord.policy.load import parse_policies
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics, Telemetry

EXAMPLES_MAX = 40
MODEL = "org/model"
POLICY = b"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: m}
model: {name: org/model}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{name: a, address: "10.0.0.1:8000"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}
"""


class Reply:
    """An engine that always answers: JSON, or a short stream to whoever asks for one."""

    status = 200
    last = b""
    part_count = 0

    def __init__(self, *, is_stream: bool) -> None:
        kind = b"text/event-stream; charset=utf-8" if is_stream else b"application/json"
        self.headers = [(b"content-type", kind)]
        self._parts = [b"data: {}\n\n", b"data: [DONE]\n\n"] if is_stream else [b"{}"]

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def read_chunk(self, *, idle_timeout_s: float) -> bytes:
        return self._parts.pop(0) if self._parts else b""

    async def pump(
        self, sink: Callable[[bytes], Awaitable[None] | None], *, idle_timeout_s: float, watch: object = None
    ) -> None:
        while part := await self.read_chunk(idle_timeout_s=idle_timeout_s):
            pause = sink(part)
            if pause is not None:
                await pause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class Upstream:
    async def request(self, _method: str, _address: str, target: str, *, body: bytes, **_: Any) -> Reply:
        is_generative = target.startswith(("/v1/chat", "/v1/completions", "/v1/responses", "/v1/messages"))
        return Reply(is_stream=is_generative and b'"stream": true' in body)


class Running:
    """A gateway whose every part but the wire is the real one."""

    def __init__(self) -> None:
        ticks = itertools.count()

        def clock() -> float:
            return next(ticks) * 1e-3

        self.coordinator = Coordinator()
        metrics = Metrics()
        self.loop = CoordinatorLoop(self.coordinator, clock=clock, decisions=DecisionLog(16), metrics=metrics)
        policy = compile_policy(parse_policies(POLICY, "policy"))
        self.loop.handle(ModelsReplaced(policy.models))
        (endpoint,) = policy.bindings[0].endpoints
        self.loop.handle(EndpointSeen(endpoint))
        self.loop.handle(SampleTaken(endpoint.id, Sample(running=0, waiting=0, kv_usage=0.0, at_s=0.0)))
        self.lines = structlog.testing.LogCapture()
        log = structlog.wrap_logger(
            None, processors=[self.lines], wrapper_class=structlog.make_filtering_bound_logger("info")
        )
        relay = Relay(
            door=Door(self.loop, Gate(clock=clock, wall=clock), Limits()),
            upstream=Upstream(),
            observer=Telemetry(metrics, log),
            clock=clock,
            new_id=lambda: f"made-{next(ticks)}",
        )
        self.app = GatewayApp(relay, metrics=metrics.render, created_unix_s=0)


RUNNING = Running()


def document() -> Any:
    config = schemathesis.Config()
    config.projects.default.generation.update(max_examples=EXAMPLES_MAX, deterministic=True, database="none")
    return schemathesis.openapi.from_asgi("/openapi.json", RUNNING.app, config=config)


api = document()


def whole(value: Any) -> Any:
    """JSON Schema takes 2.0 for a whole number, the code that reads calls does not."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list():
            return [whole(item) for item in value]
        case dict():
            return {name: whole(item) for name, item in value.items()}
        case _:
            return value


@api.parametrize()
@settings(max_examples=EXAMPLES_MAX, deadline=None, derandomize=True, database=None)
def test_every_answer_is_documented_and_none_is_a_5xx(case: schemathesis.Case) -> None:
    case.body = whole(case.body)
    # A name that is well-formed is the model's, or hardly a call would get past the look-up.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and case.body["model"]:
        case.body["model"] = MODEL
    case.call_and_validate()
    RUNNING.coordinator.validate()
    assert RUNNING.coordinator.ledger.open_count == 0
    assert [line for line in RUNNING.lines.entries if line["event"] == "request.crashed"] == []
    RUNNING.lines.entries.clear()
