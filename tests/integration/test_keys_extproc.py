"""The endpoint picker that asks for API keys, over real gRPC: a client plays Envoy."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from grpc import aio

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import Action, Event, ModelsReplaced, RequestArrived
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.model import AdmissionRules, Model
from pdcoord.core.request import Request
from pdcoord.extproc.calls import Picker
from pdcoord.extproc.listener import Address, GrpcListener
from pdcoord.extproc.server import Processor
from pdcoord.front.gate import Gate
from pdcoord.front.keys import KEY_RANDOM_BYTES, ApiKey, KeyRing, digest_of, make_key
from pdcoord.front.ports import CallRecord, Limits
from pdcoord.front.salt import cache_salt, tenant_group
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics
from transfer.verdict import Connector, Side

M = ModelName("org/model")
CHAT = {":method": "POST", ":path": "/v1/chat/completions"}
BODY = json.dumps(
    {"model": M, "messages": [{"role": "user", "content": "h" * 4_000}], "max_tokens": 9}
).encode()
FAIRNESS = "x-llm-d-inference-fairness-id"
KEYS = {name: make_key(name.encode() * KEY_RANDOM_BYTES) for name in "abx"}
SECRET = bytes(range(32))
DUPLEX, BUFFERED, NONE = 4, 2, 0


class Observer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.answers: list[RefuseReason] = []

    def call_began(self) -> None:
        pass

    def call_ended(self, record: CallRecord) -> None:
        self.records.append(record)

    def refused(self, reason: RefuseReason) -> None:
        raise AssertionError(reason)

    def crashed(self, error: Exception, request_id: str) -> None:
        raise error

    def stream_began(self) -> None:
        pass

    def stream_ended(self, request_bytes: int, response_bytes: int) -> None:
        pass

    def answered(self, reason: RefuseReason) -> None:
        self.answers.append(reason)

    def violated(self) -> None:
        raise AssertionError("the protocol was violated")


class Envoy:
    """One stream as Envoy has it."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def head(self, headers: dict[str, str], *, is_end: bool = False, mode: int = DUPLEX) -> None:
        message = pb.ProcessingRequest()
        for name, value in headers.items():
            message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        message.request_headers.end_of_stream = is_end
        message.protocol_config.request_body_mode = mode
        message.protocol_config.response_body_mode = DUPLEX
        await self.call.write(message)

    async def body(self, data: bytes, kind: str = "request_body") -> None:
        message = pb.ProcessingRequest()
        getattr(message, kind).body = data
        getattr(message, kind).end_of_stream = True
        await self.call.write(message)

    async def read(self) -> Any:
        async with asyncio.timeout(20.0):
            return await self.call.read()

    async def refused(self) -> tuple[int, str, dict[str, bytes]]:
        """How the client is answered at once, and that the stream then ends well."""
        immediate = (await self.read()).immediate_response
        headers = {each.header.key: each.header.raw_value for each in immediate.headers.set_headers}
        async with asyncio.timeout(20.0):
            with suppress(aio.AioRpcError):
                assert await self.call.read() is aio.EOF
            assert await self.call.code() is grpc.StatusCode.OK
        return immediate.status.code, json.loads(immediate.body)["error"]["code"], headers

    async def routed(self) -> tuple[dict[str, bytes], set[str], dict[str, Any]]:
        """Headers that are set, those that are removed, and the body that goes to the engine."""
        mutation = (await self.read()).request_headers.response.header_mutation
        headers = {each.header.key: each.header.raw_value for each in mutation.set_headers}
        raw, is_end = b"", False
        while not is_end:
            part = (await self.read()).request_body.response.body_mutation.streamed_response
            raw, is_end = raw + part.body, part.end_of_stream
        assert int(headers.get("content-length", len(raw))) == len(raw)
        return headers, set(mutation.remove_headers), json.loads(raw)


class Stage:
    """A picker that asks for keys, and clients of it."""

    def __init__(self) -> None:
        self.coordinator = Coordinator()
        self.loop = CoordinatorLoop(
            self.coordinator, clock=time.monotonic, decisions=DecisionLog(64), metrics=Metrics()
        )
        pool = Pool(
            name=PoolName("d"),
            model=M,
            role=Role.BOTH,
            vendor="v",
            engine=EngineKind.VLLM,
            side=Side(Connector.NIXL, None),
            speed=SpeedFigures(0.008, 0.0001, 0.008),
            kv_bytes_per_token=1_024,
            link_bytes_per_s=1e10,
        )
        rules = AdmissionRules(objectives={"critical": 9})
        self.loop.handle(ModelsReplaced((Model(name=M, pools=(pool,), aliases=("alias",), admission=rules),)))
        endpoint = Endpoint(EndpointId("d/0"), pool, HostPort("10.0.0.1:8000"))
        self.loop.handle(EndpointSeen(endpoint))
        self.loop.handle(SampleTaken(endpoint.id, Sample(0, 0, 0.1, time.monotonic())))
        self.observer = Observer()
        numbers = itertools.count()
        self.picker = Picker(
            coordination=self.loop,
            observer=self.observer,
            limits=Limits(),
            clock=time.monotonic,
            new_id=lambda: f"id-{next(numbers)}",
        )
        self.gate = self.picker.gate = Gate(clock=time.monotonic, wall=lambda: 0.0)
        self.use(a={}, b={"requests_per_minute": 1, "models": frozenset({"other"})})
        processor = Processor(self.picker, self.observer)
        self.listener = GrpcListener(
            [processor.handler()],
            Address("127.0.0.1", 0),
            credentials=None,
            body_bytes_max=1 << 20,
            streams_max=64,
            drain_s=0.0,
            end_all=processor.end_all,
        )
        self.channel: aio.Channel | None = None
        self.requests: list[Request] = []
        handle = self.coordinator.handle

        def recording(event: Event, now_s: float) -> list[Action]:
            if isinstance(event, RequestArrived):
                self.requests.append(event.request)
            return handle(event, now_s)

        self.coordinator.handle = recording  # type: ignore[method-assign]

    def use(self, **keys: Any) -> None:
        made = [
            ApiKey(
                name, digest_of(KEYS[name].encode()), f"team-{name}", tenant_group(f"team-{name}"), **fields
            )
            for name, fields in keys.items()
        ]
        self.gate.use(KeyRing(made, SECRET))

    def open(self) -> Envoy:
        assert self.channel is not None
        process = self.channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        return Envoy(process())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20.0):
            while not condition():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    stage = Stage()
    async with stage.listener, aio.insecure_channel(str(stage.listener.address)) as stage.channel:
        yield stage


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer x"}, bearer("x")])
async def test_nobody_without_a_key_gets_as_far_as_a_body(headers: dict[str, str], mode: int) -> None:
    async with staged() as stage:
        envoy = stage.open()
        await envoy.head(CHAT | headers, mode=mode)
        status, code, answer = await envoy.refused()
        assert (status, code, answer["www-authenticate"]) == (401, "unauthorized", b"Bearer")
        assert stage.observer.answers == [RefuseReason.UNAUTHORIZED]
        assert not stage.requests


@pytest.mark.parametrize("path", ["/v1/models", "/health"])
async def test_pages_of_engines_need_a_key_too(path: str) -> None:
    async with staged() as stage:
        envoy = stage.open()
        await envoy.head({":method": "GET", ":path": path}, is_end=True)
        assert (await envoy.refused())[0] == 401
        envoy = stage.open()
        await envoy.head({":method": "GET", ":path": path} | bearer("a"), is_end=True)
        removed = (await envoy.read()).request_headers.response.header_mutation.remove_headers
        assert set(removed) == {"authorization"}


async def test_a_call_whose_body_is_not_shown_is_not_let_past_its_key() -> None:
    async with staged() as stage:
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a"), mode=NONE)
        assert (await envoy.refused())[:2] == (500, "internal")


async def test_the_engine_gets_the_tenants_salt_and_neither_key_nor_claim() -> None:
    async with staged() as stage:
        stage.gate.engine_key = b"engine"
        envoy = stage.open()
        claims = {FAIRNESS: "team-b", "x-gateway-inference-fairness-id": "team-b", "x-api-key": KEYS["a"]}
        await envoy.head(CHAT | bearer("a") | claims)
        await envoy.body(BODY.replace(M.encode(), b"alias"))
        headers, removed, body = await envoy.routed()
        assert headers["authorization"] == b"Bearer engine"
        assert headers[FAIRNESS] == b"team-a"
        assert removed == {"x-api-key", "x-gateway-inference-fairness-id"}
        salt = cache_salt(SECRET, tenant_group("team-a"), "")
        assert body == json.loads(BODY) | {"cache_salt": salt}
        assert stage.requests[0].tenant == "team-a"
        assert not [value for value in headers.values() if KEYS["a"].encode() in value]


async def test_equal_prompts_of_tenants_have_no_block_in_common() -> None:
    async with staged() as stage:
        stage.use(a={}, b={})
        for name in "aab":
            envoy = stage.open()
            await envoy.head(CHAT | bearer(name))
            await envoy.body(BODY)
            await envoy.routed()
        one, same, other = (request.block_keys for request in stage.requests)
        assert len(one) > 4
        assert one == same
        assert not set(one) & set(other)


async def test_models_and_rates_are_the_keys() -> None:
    async with staged() as stage:
        envoy = stage.open()
        await envoy.head(CHAT | bearer("b"))
        await envoy.body(BODY)
        assert (await envoy.refused())[:2] == (403, "model-forbidden")
        envoy = stage.open()
        await envoy.head(CHAT | bearer("b"))
        status, code, answer = await envoy.refused()
        assert (status, code) == (429, "rate-limited")
        assert 50 <= int(answer["retry-after"]) <= 60
        await stage.until(lambda: len(stage.observer.records) == 2)
        assert [record.key_name for record in stage.observer.records] == ["b", "b"]


async def test_a_key_may_be_for_one_adapter_alone() -> None:
    async with staged() as stage:
        (model,) = stage.loop.models()
        stage.loop.handle(ModelsReplaced((replace(model, adapters=("sql", "law")),)))
        stage.use(a={"models": frozenset({"sql"})}, b={"models": frozenset({"alias"})})
        sent: dict[tuple[str, str], str] = {}
        for key, name in itertools.product("ab", (M, "alias", "sql", "law")):
            envoy = stage.open()
            await envoy.head(CHAT | bearer(key))
            await envoy.body(BODY.replace(M.encode(), name.encode()))
            if key == "a" and name != "sql":
                assert (await envoy.refused())[:2] == (403, "model-forbidden")
                continue
            _, _, body = await envoy.routed()
            sent[key, name] = body["model"]
        assert sent == {
            ("a", "sql"): "sql",
            ("b", M): M,
            ("b", "alias"): M,
            ("b", "sql"): "sql",
            ("b", "law"): "law",
        }
        assert [request.adapter for request in stage.requests] == ["sql", "", "", "sql", "law"]
        assert {request.model for request in stage.requests} == {M}


async def test_what_a_key_may_not_use_is_dropped_or_refused() -> None:
    async with staged() as stage:
        objective = {"x-llm-d-inference-objective": "critical"}
        for own in ((), ("critical",)):
            stage.use(a={"objectives": frozenset(own)})
            envoy = stage.open()
            await envoy.head(CHAT | bearer("a") | objective | {"x-session-id": "s"})
            await envoy.body(json.dumps(json.loads(BODY) | {"priority": -9, "session_id": "s"}).encode())
            _, removed, body = await envoy.routed()
            assert "x-session-id" in removed
            assert body.keys() == json.loads(BODY).keys() | {"cache_salt"}
        assert [request.priority for request in stage.requests] == [0, 9]
        for name in ("lora_path", "session_params", "previous_response_id"):
            envoy = stage.open()
            await envoy.head(CHAT | bearer("a"))
            await envoy.body(json.dumps(json.loads(BODY) | {name: "x"}).encode())
            assert (await envoy.refused())[:2] == (400, "invalid-field")
        assert len(stage.requests) == 2


async def test_a_key_is_never_shown_as_a_request_id() -> None:
    async with staged() as stage:
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a") | {"x-request-id": KEYS["a"]})
        await envoy.body(BODY)
        headers, *_ = await envoy.routed()
        assert headers["x-request-id"].startswith(b"id-")
        assert stage.requests[0].id.startswith("id-")


async def test_who_leaves_before_an_answer_pays_for_what_was_made_of_it() -> None:
    async with staged() as stage:
        stage.use(a={"tokens_per_minute": 2_000})
        clock = stage.picker.clock
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a"))
        await envoy.body(json.dumps(json.loads(BODY) | {"max_tokens": 5_000}).encode())
        await envoy.routed()
        # A minute has passed, which 2,000 tokens a minute are given back in and 7,500 are made in.
        stage.gate.clock = lambda: clock() + 60.0
        envoy.call.cancel()
        await stage.until(lambda: bool(stage.observer.records))
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a"))
        await envoy.body(BODY)
        status, code, _ = await envoy.refused()
        assert (status, code) == (429, "rate-limited")


async def test_tokens_of_an_answer_count_once_it_has_ended() -> None:
    async with staged() as stage:
        stage.use(a={"tokens_per_minute": 2_000})
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a"))
        await envoy.body(BODY)
        await envoy.routed()
        message = pb.ProcessingRequest()
        for name, value in ((":status", "200"), ("content-type", "application/json")):
            message.response_headers.headers.headers.add(key=name, raw_value=value.encode())
        await envoy.call.write(message)
        await envoy.read()
        await envoy.body(b'{"usage":{"completion_tokens":5000}}', kind="response_body")
        await envoy.read()
        await stage.until(lambda: bool(stage.observer.records))
        envoy = stage.open()
        await envoy.head(CHAT | bearer("a"))
        await envoy.body(BODY)
        status, code, answer = await envoy.refused()
        assert (status, code) == (429, "rate-limited")
        # About 1,000 of the prompt, 5,000 of the answer and 1,000 of this prompt, 2,000 of them in a bucket.
        assert 120 <= int(answer["retry-after"]) <= 180
