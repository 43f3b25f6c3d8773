"""The endpoint picker over real gRPC: a client plays Envoy, the core behind it is the real one."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from grpc import aio
from grpc_health.v1 import health_pb2

from pdcoord.core.coordinator import Coordinator
from pdcoord.core.costs import SpeedFigures
from pdcoord.core.events import ModelsReplaced, Outcome
from pdcoord.core.fleet import (
    Endpoint,
    EndpointId,
    EndpointSeen,
    EngineKind,
    ModelName,
    Pool,
    PoolLimits,
    PoolName,
    Role,
    Sample,
    SampleTaken,
)
from pdcoord.core.model import Model, PrefixMode
from pdcoord.extproc.calls import Picker, PickRules
from pdcoord.extproc.health import Health
from pdcoord.extproc.listener import Address, GrpcListener
from pdcoord.extproc.server import Processor
from pdcoord.front.ports import CallRecord, Limits, Tokens
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import Call
from pdcoord.protocol.signing import PLAN_SIGNATURE, PlanKeys, Steering
from pdcoord.runtime.decisions import DecisionLog
from pdcoord.runtime.loop import CoordinatorLoop
from pdcoord.runtime.observe import Metrics
from transfer.verdict import Connector, Side

M = ModelName("org/model")
DESTINATION = "x-gateway-destination-endpoint"
CHAT = {":method": "POST", ":path": "/v1/chat/completions"}
BODY = json.dumps({"model": M, "stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
DUPLEX = 4


class Observer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.open_count = 0
        self.errors: list[Exception] = []
        self.answers: list[RefuseReason] = []
        self.violation_count = 0
        self.bytes = [0, 0]

    def call_began(self) -> None:
        self.open_count += 1

    def call_ended(self, record: CallRecord) -> None:
        self.open_count -= 1
        self.records.append(record)

    def refused(self, reason: RefuseReason) -> None:
        raise AssertionError(reason)

    def crashed(self, error: Exception, request_id: str) -> None:
        self.errors.append(error)

    def stream_began(self) -> None:
        pass

    def stream_ended(self, request_bytes: int, response_bytes: int) -> None:
        self.bytes[0] += request_bytes
        self.bytes[1] += response_bytes

    def answered(self, reason: RefuseReason) -> None:
        self.answers.append(reason)

    def violated(self) -> None:
        self.violation_count += 1


class SlowTokens:
    """Tells nothing until it is let."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.may_tell = asyncio.Event()

    async def tokens(self, call: Call, model: Model) -> Sequence[int] | None:
        self.is_asked.set()
        await self.may_tell.wait()
        return list(range(100))


class Envoy:
    """One stream as Envoy has it."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def head(
        self, headers: dict[str, str], *, is_end: bool = False, subset: list[str] | None = None
    ) -> None:
        message = pb.ProcessingRequest()
        for name, value in headers.items():
            message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        message.request_headers.end_of_stream = is_end
        message.protocol_config.request_body_mode = DUPLEX
        message.protocol_config.response_body_mode = DUPLEX
        if subset is not None:
            hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
            hint.update({"x-gateway-destination-endpoint-subset": subset})
        await self.call.write(message)

    async def body(self, data: bytes, *, is_end: bool = True, kind: str = "request_body") -> None:
        message = pb.ProcessingRequest()
        getattr(message, kind).body = data
        getattr(message, kind).end_of_stream = is_end
        await self.call.write(message)

    async def response(self, headers: dict[str, str], served_by: str | None = None) -> None:
        message = pb.ProcessingRequest()
        for name, value in headers.items():
            message.response_headers.headers.headers.add(key=name, raw_value=value.encode())
        if served_by is not None:
            metadata = message.metadata_context.filter_metadata["envoy.lb"]
            metadata.update({"x-gateway-destination-endpoint-served": served_by})
        await self.call.write(message)

    async def read(self) -> Any:
        async with asyncio.timeout(10.0):
            return await self.call.read()

    async def routed(self, headers: dict[str, str] | None = None, subset: list[str] | None = None) -> str:
        """Ask for a call; its destination once head and body were answered."""
        await self.head(CHAT | (headers or {}), subset=subset)
        await self.body(BODY)
        destination = destination_of(await self.read())
        await self.read()
        return destination

    async def ended(self) -> grpc.StatusCode:
        async with asyncio.timeout(10.0):
            with suppress(aio.AioRpcError):  # How the end of a stream is told that was not well.
                assert await self.call.read() is aio.EOF
            code = await self.call.code()
        assert isinstance(code, grpc.StatusCode)
        return code


def destination_of(response: Any) -> str:
    """Of the answer to a head, where header and metadata agree."""
    assert response.WhichOneof("response") == "request_headers", response
    found = headers_of(response.request_headers)[DESTINATION].decode()
    assert response.dynamic_metadata["envoy.lb"][DESTINATION] == found
    return found


def headers_of(part: Any) -> dict[str, bytes]:
    return {each.header.key: each.header.raw_value for each in part.response.header_mutation.set_headers}


def refusal_of(response: Any) -> tuple[int, str]:
    assert response.WhichOneof("response") == "immediate_response", response
    immediate = response.immediate_response
    return immediate.status.code, json.loads(immediate.body)["error"]["code"]


class Stage:
    """A picker with a fleet of `count` endpoints, and clients of it."""

    def __init__(
        self,
        count: int = 3,
        *,
        in_flight_max: int = 64,
        limits: Limits | None = None,
        tokens: Tokens | None = None,
        rules: PickRules | None = None,
    ) -> None:
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
            limits=PoolLimits(in_flight_max=in_flight_max),
        )
        model = Model(name=M, pools=(pool,), aliases=("alias",))
        if tokens is not None:
            model = replace(model, prefix_mode=PrefixMode.PRECISE)
        self.loop.handle(ModelsReplaced((model,)))
        for index in range(count):
            endpoint = Endpoint(EndpointId(f"d/{index}"), pool, HostPort(f"10.0.0.{index + 1}:8000"))
            self.loop.handle(EndpointSeen(endpoint))
            self.loop.handle(SampleTaken(endpoint.id, Sample(0, 0, 0.1, time.monotonic())))
        self.observer = Observer()
        numbers = itertools.count()
        picker = Picker(
            coordination=self.loop,
            observer=self.observer,
            limits=limits if limits is not None else Limits(),
            clock=time.monotonic,
            new_id=lambda: f"id-{next(numbers)}",
            tokens=tokens,
            rules=rules if rules is not None else PickRules(),
        )
        self.picker = picker
        processor = Processor(picker, self.observer)
        self.listener = GrpcListener(
            [processor.handler(), Health(self.loop.unready).handler()],
            Address("127.0.0.1", 0),
            credentials=None,
            body_bytes_max=1 << 20,
            streams_max=64,
            drain_s=0.0,
            end_all=processor.end_all,
        )
        self.channel: aio.Channel | None = None

    def open(self) -> Envoy:
        assert self.channel is not None
        process = self.channel.stream_stream(
            "/envoy.service.ext_proc.v3.ExternalProcessor/Process",
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )
        return Envoy(process())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10.0):
            while not condition():
                await asyncio.sleep(0.002)

    async def quiet(self) -> CallRecord:
        """The only record, once nothing is open any more."""
        await self.until(lambda: self.observer.open_count == 0 and bool(self.observer.records))
        self.coordinator.validate()
        assert self.coordinator.live_count == self.coordinator.ledger.open_count == 0
        (record,) = self.observer.records
        return record


@asynccontextmanager
async def staged(stage: Stage) -> AsyncIterator[Stage]:
    async with asyncio.TaskGroup() as group:
        alarm = group.create_task(stage.loop.alarm.run())
        async with stage.listener, aio.insecure_channel(str(stage.listener.address)) as stage.channel:
            yield stage
        alarm.cancel()
    assert stage.observer.errors == []


async def test_a_call_is_planned_echoed_and_accounted_for() -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        steering = {"x-prefiller-host-port": "evil:1", "x-pdcoord-served": "x", "x-request-id": "mine"}
        asked = {"x-slo-ttft-ms": "60000"}
        await envoy.head(CHAT | steering | asked)
        body = BODY.replace(b"hi", b"h" * 150_000)
        for begin in range(0, len(body), 40_000):
            await envoy.body(body[begin : begin + 40_000], is_end=begin + 40_000 >= len(body))
        response = await envoy.read()
        destination = destination_of(response)
        assert len(set(destination.split(","))) == 3
        found = headers_of(response.request_headers)
        assert found["x-request-id"] == b"mine"
        plan = json.loads(found["x-pdcoord-plan"])
        assert plan["prefill_deadline_ms"] == 60_000
        # Its sidecar continues the stream, at the others.
        assert plan["resumes"] == destination.split(",")[1:]
        assert plan["resume_tries_max"] == 3
        assert "is_resumed_above" not in plan
        removed = set(response.request_headers.response.header_mutation.remove_headers)
        assert removed == {"x-prefiller-host-port", "x-pdcoord-served"}
        assert response.request_headers.response.clear_route_cache
        echoed, is_end = b"", False
        while not is_end:
            part = (await envoy.read()).request_body.response.body_mutation.streamed_response
            assert len(part.body) <= 62_000
            echoed, is_end = echoed + part.body, part.end_of_stream
        assert echoed == body
        assert stage.coordinator.live_count == 1
        await envoy.response({":status": "200", "content-type": "text/event-stream"})
        assert b"colocated" in headers_of((await envoy.read()).response_headers)["x-pdcoord-decision"]
        for data, last in ((b"data: 1\n\n", False), (b'data: {"usage":{"completion_tokens":5}}\n\n', True)):
            await envoy.body(data, is_end=last, kind="response_body")
            part = (await envoy.read()).response_body.response.body_mutation.streamed_response
            assert (part.body, part.end_of_stream) == (data, last)
        assert await envoy.ended() is grpc.StatusCode.OK
        record = await stage.quiet()
        assert (record.outcome, record.status, record.id) == (Outcome.OK, 200, "mine")
        assert (record.is_stream, record.slo.ttft_s, record.output_tokens) == (True, 60.0, 5)
        assert stage.observer.bytes[0] == len(body)


async def test_an_alias_is_replaced_in_the_body_and_its_length_told() -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        await envoy.head(CHAT)
        await envoy.body(BODY.replace(M.encode(), b"alias"))
        head = await envoy.read()
        body = (await envoy.read()).request_body.response.body_mutation.streamed_response.body
        assert json.loads(body)["model"] == M
        assert int(headers_of(head.request_headers)["content-length"]) == len(body)


@pytest.mark.parametrize(
    ("headers", "body", "subset", "expected"),
    [
        ({}, b"{", None, (400, "malformed-json")),
        ({}, BODY.replace(M.encode(), b"other"), None, (404, "model-unknown")),
        (
            {},
            BODY.replace(b'"stream"', b'"kv_transfer_params": {"a": 1}, "stream"'),
            None,
            (400, "invalid-field"),
        ),
        ({"x-slo-ttft-ms": "soon"}, BODY, None, (400, "invalid-field")),
        ({}, BODY, [], (503, "no-endpoints")),
        ({}, BODY, ["10.9.9.9:1"], (503, "no-endpoints")),
        ({"content-length": "99999999"}, BODY, None, (413, "body-too-large")),
    ],
)
async def test_what_cannot_be_served_is_answered_at_once(
    headers: dict[str, str], body: bytes, subset: list[str] | None, expected: tuple[int, str]
) -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        await envoy.head(CHAT | headers, subset=subset)
        with suppress(asyncio.InvalidStateError):  # It may have been answered already.
            await envoy.body(body)
        assert refusal_of(await envoy.read()) == expected
        assert await envoy.ended() is grpc.StatusCode.OK
        record = await stage.quiet()
        assert record.status == expected[0]
        assert [reason.value for reason in stage.observer.answers] == [expected[1]]


async def test_a_subset_bounds_the_pick_and_its_fallbacks() -> None:
    async with staged(Stage(5)) as stage:
        destination = await stage.open().routed(subset=["10.0.0.4:8000", "10.0.0.2"])
        assert set(destination.split(",")) == {"10.0.0.4:8000", "10.0.0.2:8000"}


async def test_a_call_without_a_body_goes_to_any_endpoint() -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        await envoy.head({":method": "GET", ":path": "/v1/models"}, is_end=True, subset=["10.0.0.3"])
        response = await envoy.read()
        assert destination_of(response) == "10.0.0.3:8000"
        await envoy.call.done_writing()
        assert await envoy.ended() is grpc.StatusCode.OK
        await stage.quiet()


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/invocations", (404, "path-unknown")),
        ("POST", "/v1/load_lora_adapter?x=1", (404, "path-unknown")),
        ("POST", "/v1//chat/completions", (404, "path-unknown")),
        ("DELETE", "/v1/responses/resp_1", (404, "path-unknown")),
        ("GET", "/metrics", (404, "path-unknown")),
        ("PUT", "/v1/chat/completions", (405, "method-not-allowed")),
        ("POST", "/health", (405, "method-not-allowed")),
    ],
)
async def test_engines_have_more_than_clients_may_ask_for(
    method: str, path: str, expected: tuple[int, str]
) -> None:
    async with staged(Stage(1)) as stage:
        envoy = stage.open()
        await envoy.head({":method": method, ":path": path})
        assert refusal_of(await envoy.read()) == expected
        assert (await stage.quiet()).status == expected[0]


async def test_under_messages_a_refusal_is_an_error_of_anthropics() -> None:
    async with staged(Stage(1)) as stage:
        envoy = stage.open()
        await envoy.head({":method": "PUT", ":path": "/v1/messages"})
        said = json.loads((await envoy.read()).immediate_response.body)
        assert (said["type"], said["error"]["code"]) == ("error", "method-not-allowed")
        assert said["error"]["type"] == "invalid_request_error"
        await stage.quiet()


async def test_a_path_that_is_let_pass_goes_to_any_endpoint() -> None:
    rules = PickRules(passed=frozenset({"/v1/audio/transcriptions"}))
    async with staged(Stage(1, rules=rules)) as stage:
        envoy = stage.open()
        await envoy.head({":method": "POST", ":path": "/v1/audio/transcriptions?a"})
        assert destination_of(await envoy.read()) == "10.0.0.1:8000"
        assert stage.coordinator.live_count == 0
        other = stage.open()
        await other.head({":method": "POST", ":path": "/v1/audio/transcriptions/more"})
        assert refusal_of(await other.read()) == (404, "path-unknown")


async def test_what_a_picker_with_keys_lets_pass_is_signed() -> None:
    keys = PlanKeys({"a": b"s" * 32})
    rules = PickRules(passed=frozenset({"/v1/audio/transcriptions"}))
    async with staged(Stage(1, rules=rules)) as stage:
        stage.picker.sign = lambda what: [(PLAN_SIGNATURE, keys.sign(what, 1.0))]
        for path, signed in (
            ("/v1/chat/completions?a=1", "/v1/chat/completions?a=1"),
            ("/v1/chat/%63ompletions/?", "/v1/chat/completions"),
            ("/v1/audio/transcriptions?", "/v1/audio/transcriptions"),
            ("/v1/audio/transcriptions?a", "/v1/audio/transcriptions?a"),
        ):
            envoy = stage.open()
            await envoy.head({":method": "POST", ":path": path, "x-pdcoord-plan-signature": "mine"})
            if "audio" not in path:
                await envoy.body(BODY)
            found = headers_of((await envoy.read()).request_headers)
            call = (b"POST", signed.encode(), found["x-request-id"])
            what = Steering(*call, plan=found.get("x-pdcoord-plan", b""))
            assert keys.doubt(what, found["x-pdcoord-plan-signature"], 1.0) is None


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/", "/v1/chat/%63ompletions", "/v1%2fchat/completions/"]
)
async def test_a_call_of_the_api_has_an_account_however_its_path_is_written(path: str) -> None:
    async with staged(Stage(1, in_flight_max=1)) as stage:
        envoy, second = stage.open(), stage.open()
        await envoy.head({":method": "POST", ":path": f"{path}?a=%63"})
        await envoy.body(BODY)
        found = headers_of((await envoy.read()).request_headers)
        assert found[":path"] == b"/v1/chat/completions?a=%63"
        assert "x-pdcoord-plan" in found
        assert stage.coordinator.live_count == 1
        await second.head({":method": "POST", ":path": path})
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)


async def test_a_call_waits_for_its_turn_while_its_stream_is_open() -> None:
    async with staged(Stage(1, in_flight_max=1)) as stage:
        first, second = stage.open(), stage.open()
        await first.routed()
        await second.head(CHAT)
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)
        await first.response({":status": "200"})
        await first.read()
        await first.body(b"{}", kind="response_body")
        await first.read()
        assert destination_of(await second.read()) == "10.0.0.1:8000"
        await second.read()
        second.call.cancel()
        await stage.until(lambda: stage.coordinator.live_count == 0)


@pytest.mark.parametrize("how", ["cancel", "close", "local-reply"])
async def test_whoever_leaves_the_line_is_forgotten(how: str) -> None:
    async with staged(Stage(1, in_flight_max=1)) as stage:
        first, second = stage.open(), stage.open()
        await first.routed()
        await second.head(CHAT)
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)
        if how == "cancel":
            second.call.cancel()
        elif how == "close":
            await second.call.done_writing()
        else:
            await second.response({":status": "504"})
            assert (await second.read()).WhichOneof("response") == "response_headers"
            await second.body(b"late", kind="response_body")
            assert (
                await second.read()
            ).response_body.response.body_mutation.streamed_response.body == b"late"
        await stage.until(lambda: stage.coordinator.admission.count == 0)
        assert stage.coordinator.live_count == 1


async def test_an_unreadable_message_while_a_call_waits_is_envoys_fault() -> None:
    async with staged(Stage(1, in_flight_max=1)) as stage:
        first, second = stage.open(), stage.open()
        await first.routed()
        await second.head(CHAT)
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)
        await second.call.write(pb.ProcessingRequest())
        assert await second.ended() is grpc.StatusCode.INVALID_ARGUMENT
        await stage.until(lambda: stage.coordinator.admission.count == 0)
        assert (stage.observer.violation_count, stage.observer.errors) == (1, [])


async def test_tokens_are_awaited_and_a_client_that_leaves_meanwhile_is_noticed() -> None:
    tokens = SlowTokens()
    async with staged(Stage(tokens=tokens)) as stage:
        gone, kept = stage.open(), stage.open()
        await gone.head(CHAT)
        await gone.body(BODY)
        await tokens.is_asked.wait()
        gone.call.cancel()
        await stage.until(lambda: len(stage.observer.records) == 1)
        tokens.may_tell.set()
        assert await kept.routed()


async def test_the_endpoint_that_answered_is_the_one_that_is_accounted_for() -> None:
    async with staged(Stage(2)) as stage:
        envoy = stage.open()
        primary, fallback = (await envoy.routed()).split(",")
        ids = {
            address: EndpointId(f"d/{int(address.split('.')[3][0]) - 1}") for address in (primary, fallback)
        }
        ledger = stage.coordinator.ledger
        assert ledger.load(ids[primary]).decode_count == 1
        await envoy.response({":status": "200"}, served_by=fallback)
        await envoy.read()
        assert ledger.load(ids[primary]).is_empty
        assert ledger.load(ids[fallback]).decode_count == 1
        envoy.call.cancel()
        record = await stage.quiet()
        assert record.outcome is Outcome.CLIENT_GONE


async def test_an_endpoints_failure_ends_the_call_and_passes() -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        await envoy.routed()
        await envoy.response({":status": "503"})
        assert (await envoy.read()).WhichOneof("response") == "response_headers"
        assert stage.coordinator.live_count == 0
        await envoy.body(b"why", kind="response_body")
        assert (await envoy.read()).response_body.response.body_mutation.streamed_response.body == b"why"
        assert (await stage.quiet()).outcome is Outcome.UPSTREAM_ERROR


async def test_a_body_that_never_ends_is_answered_in_time() -> None:
    async with staged(Stage(limits=Limits(body_timeout_s=0.2))) as stage:
        envoy = stage.open()
        await envoy.head(CHAT)
        await envoy.body(b"{", is_end=False)
        assert refusal_of(await envoy.read()) == (408, "body-too-slow")
        assert await envoy.ended() is grpc.StatusCode.OK


async def test_a_call_that_never_ends_is_given_up() -> None:
    async with staged(Stage(limits=Limits(request_deadline_s=0.2))) as stage:
        envoy = stage.open()
        await envoy.routed()
        assert await envoy.ended() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await stage.quiet()).outcome is Outcome.UPSTREAM_ERROR
        assert stage.observer.violation_count == 1


async def test_at_the_end_of_a_drain_streams_end_well_and_who_waits_is_told() -> None:
    stage = Stage(1, in_flight_max=1)
    async with asyncio.TaskGroup() as group, staged(stage):
        first, second = stage.open(), stage.open()
        await first.routed()
        await second.head(CHAT)
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)
        endings = [group.create_task(each.call.read()) for each in (first, second)]
        codes = [group.create_task(each.call.code()) for each in (first, second)]
        # The channel is closed behind the listener, so the listener is left first here.
        await stage.listener.__aexit__(None, None, None)
        assert await endings[0] is aio.EOF
        assert refusal_of(await endings[1]) == (503, "draining")
        assert [await code for code in codes] == [grpc.StatusCode.OK, grpc.StatusCode.OK]
    assert stage.coordinator.live_count == 0
    assert stage.observer.violation_count == 0


@pytest.mark.parametrize("how", ["routed", "waiting", "reading"])
async def test_all_bodies_together_are_bounded_and_give_their_room_back(how: str) -> None:
    limits = Limits(bodies_bytes_max=3 * len(BODY) - 1)
    async with staged(Stage(1, in_flight_max=1, limits=limits)) as stage:
        first, second, third = stage.open(), stage.open(), stage.open()
        assert await first.routed()
        bodies = stage.picker.bodies
        await stage.until(lambda: bodies.held_bytes == 0)  # Its answer has not even begun.
        await second.head(CHAT)
        await second.body(BODY)
        await stage.until(lambda: stage.coordinator.admission.count == 1)
        assert bodies.held_bytes == len(BODY)
        await third.head(CHAT)
        await third.body(BODY, is_end=False)
        await stage.until(lambda: bodies.held_bytes == 2 * len(BODY))
        fourth = stage.open()
        await fourth.head(CHAT)
        await fourth.body(BODY)
        assert refusal_of(await fourth.read()) == (429, "saturated")
        await stage.until(lambda: bodies.held_bytes == 2 * len(BODY))
        if how == "routed":
            first.call.cancel()
            assert destination_of(await second.read())
            await second.read()
        elif how == "waiting":
            second.call.cancel()
        else:
            third.call.cancel()
        await stage.until(lambda: bodies.held_bytes == len(BODY))
    assert bodies.held_bytes == 0


async def test_more_calls_than_may_be_are_refused() -> None:
    async with staged(Stage(limits=Limits(live_max=1))) as stage:
        first, second = stage.open(), stage.open()
        await first.routed()
        await second.head(CHAT)
        await second.body(BODY)
        assert refusal_of(await second.read()) == (429, "saturated")


@pytest.mark.parametrize("is_routed", [False, True])
async def test_messages_out_of_order_end_the_stream(is_routed: bool) -> None:
    async with staged(Stage()) as stage:
        envoy = stage.open()
        if is_routed:
            await envoy.routed()
            await envoy.body(b"more")
            assert await envoy.ended() is grpc.StatusCode.INVALID_ARGUMENT
            await stage.quiet()
        else:
            await envoy.body(b"first")
            assert refusal_of(await envoy.read()) == (500, "internal")
            assert await envoy.ended() is grpc.StatusCode.OK
        assert stage.observer.violation_count == 1


async def test_two_live_calls_of_one_id_are_two() -> None:
    async with staged(Stage()) as stage:
        first, second = stage.open(), stage.open()
        for envoy in (first, second):
            await envoy.routed({"x-request-id": "same"})
        assert stage.coordinator.live_count == 2


async def test_conformance_tests_name_the_endpoint() -> None:
    async with staged(Stage(rules=PickRules(is_conformance=True))) as stage:
        envoy = stage.open()
        selection = {"test-epp-endpoint-selection": "10.0.0.3,10.0.0.1"}
        assert await envoy.routed(selection) == "10.0.0.3:8000,10.0.0.1:8000"
        await envoy.response({":status": "200"}, served_by="10.0.0.3:8000")
        answer = headers_of((await envoy.read()).response_headers)
        assert answer["x-conformance-test-served-endpoint"] == b"10.0.0.3:8000"
    async with staged(Stage(1)) as stage:
        assert await stage.open().routed({"test-epp-endpoint-selection": "10.0.0.3"}) == "10.0.0.1:8000"


async def test_health_tells_services_apart_and_watches_hear_of_changes() -> None:
    async with staged(Stage()) as stage:
        assert stage.channel is not None
        check = stage.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        serving, not_serving = 1, 2
        names = ("", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension")
        for service in (*names, "liveness"):
            assert (await check(health_pb2.HealthCheckRequest(service=service))).status == serving
        with pytest.raises(aio.AioRpcError) as unknown:
            await check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stage.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(service="readiness"))
        async with asyncio.timeout(10.0):
            assert (await watch.read()).status == serving
            stage.loop.is_draining = True
            assert (await watch.read()).status == not_serving
        watch.cancel()
        assert (await check(health_pb2.HealthCheckRequest(service="liveness"))).status == serving
        assert (await check(health_pb2.HealthCheckRequest(service=""))).status == not_serving
