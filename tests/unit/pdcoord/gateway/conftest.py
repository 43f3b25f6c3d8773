"""A relay on a stage: a scripted coordinator and upstream, an ASGI client without a server."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pytest

from pdcoord.core.events import (
    Action,
    DecodeFailed,
    Dispatch,
    Event,
    Refuse,
    RequestArrived,
    StreamBroke,
    Wait,
)
from pdcoord.core.model import Model
from pdcoord.core.plan import Plan
from pdcoord.core.request import RequestId
from pdcoord.front.gate import Gate
from pdcoord.front.ports import CallRecord, Decided, Limits, Tokens
from pdcoord.gateway.app import GatewayApp
from pdcoord.gateway.arrival import Door
from pdcoord.gateway.relay import Relay
from pdcoord.protocol.errors import Refusal, RefuseReason, RungReason
from pdcoord.resume.tape import Shelf
from pdcoord.wire.room import ByteRoom

WAIT = "wait"


@dataclass
class ScriptedCoordination:
    """Answers each arrival and failure with the next of `script`: an address, WAIT, a Refusal or an error."""

    make_plan: Callable[..., Plan]
    served: Model
    script: list[str | Refusal | Exception] = field(default_factory=lambda: ["10.0.0.2:8000"])
    is_split: bool = False
    unready_refusal: Refusal | None = None
    silence_s: float | None = None
    is_draining: bool = False
    events: list[Event] = field(default_factory=list)
    expected: dict[RequestId, Decided] = field(default_factory=dict)

    def handle(self, event: Event) -> list[Action]:
        self.events.append(event)
        match event:
            case RequestArrived(request):
                return [self._next(request.id)]
            case DecodeFailed(request_id) | StreamBroke(request_id):
                return [self._next(request_id)]
            case _:
                return []

    def _next(self, request_id: RequestId) -> Action:
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, Exception):
            raise step
        if isinstance(step, Refusal):
            return Refuse(request_id, step)
        if step == WAIT:
            return Wait(request_id)
        return Dispatch(self.make_plan(request_id, decode=step, is_split=self.is_split))

    def expect(self, request_id: RequestId, decided: Decided) -> None:
        assert request_id not in self.expected, "expected twice"
        self.expected[request_id] = decided

    def decide(self, request_id: str) -> None:
        """Tell a call that waits the next of `script`."""
        action = self._next(RequestId(request_id))
        assert not isinstance(action, Wait)
        self.expected.pop(RequestId(request_id))(action)

    def model(self, name: str) -> Model | None:
        return self.served if name in self.served.names else None

    def models(self) -> tuple[Model, ...]:
        return (self.served,)

    def blamed(self, _request_id: RequestId, reason: RungReason) -> RungReason:
        return RungReason.DECODE_DRAINING if self.is_draining else reason

    def silence_s_max(self, _request_id: RequestId) -> float | None:
        return self.silence_s

    def unready(self) -> Refusal | None:
        return self.unready_refusal

    def told(self) -> list[str]:
        """The kinds of events in order."""
        return [type(event).__name__ for event in self.events]


class Reply:
    """An upstream's answer; a chunk may be an error to raise, or None to fall silent."""

    def __init__(
        self,
        status: int = 200,
        headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),),
        chunks: Sequence[bytes | Exception | None] = (b'{"ok":true}',),
    ) -> None:
        self.status = status
        self.headers = list(headers)
        self.chunks = list(chunks)
        self.last = b""
        self.part_count = 0
        self.is_closed = False
        self.reading = asyncio.Event()

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def read_chunk(self, *, idle_timeout_s: float) -> bytes:
        await asyncio.sleep(0)
        if not self.chunks:
            return b""
        chunk = self.chunks.pop(0)
        if chunk is None:
            self.reading.set()
            await asyncio.Event().wait()
        if isinstance(chunk, Exception):
            raise chunk
        assert chunk is not None
        return chunk

    async def pump(
        self, sink: Callable[[bytes], Awaitable[None] | None], *, idle_timeout_s: float, watch: object = None
    ) -> None:
        while part := await self.read_chunk(idle_timeout_s=idle_timeout_s):
            self.last = part
            self.part_count += 1
            pause = sink(part)
            if pause is not None:
                await pause

    async def read_all(self, *, timeout_s: float, bytes_max: int = 0) -> bytes:
        parts = []
        while part := await self.read_chunk(idle_timeout_s=timeout_s):
            parts.append(part)
        return b"".join(parts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        self.is_closed = True


@dataclass
class ScriptedUpstream:
    """Gives each request the next of `script`: an answer, an error, or None for silence."""

    script: list[Reply | Exception | None] = field(default_factory=lambda: [Reply()])
    asked: list[dict[str, Any]] = field(default_factory=list)

    async def request(self, method: str, address: str, target: str, **options: Any) -> Reply:
        self.asked.append({"method": method, "address": address, "target": target, **options})
        await asyncio.sleep(0)
        step = self.script.pop(0)
        if step is None:
            await asyncio.Event().wait()
        if isinstance(step, Exception):
            raise step
        assert step is not None
        return step


@dataclass
class RecordingObserver:
    began_count: int = 0
    records: list[CallRecord] = field(default_factory=list)
    reasons: list[RefuseReason] = field(default_factory=list)
    crashes: list[Exception] = field(default_factory=list)

    def call_began(self) -> None:
        self.began_count += 1

    def call_ended(self, record: CallRecord) -> None:
        self.records.append(record)

    def refused(self, reason: RefuseReason) -> None:
        self.reasons.append(reason)

    def crashed(self, error: Exception, request_id: str) -> None:
        self.crashes.append(error)


@dataclass
class Answer:
    """What a client got. `is_complete` is False where the server must break the connection."""

    status: int | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    is_complete: bool = False

    def header(self, name: str) -> str | None:
        return next((v.decode() for k, v in self.headers if k == name.encode()), None)

    @property
    def error(self) -> dict[str, Any]:
        """Of an answer that is one, in JSON."""
        assert self.header("content-type") == "application/json"
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Stage:
    """A gateway app with everything around it scripted."""

    def __init__(self, make_plan: Callable[..., Plan], model: Model) -> None:
        self.coordination = ScriptedCoordination(make_plan, model)
        self.upstream = ScriptedUpstream()
        self.observer = RecordingObserver()
        self.limits = Limits(body_bytes_max=10_000, body_timeout_s=2.0, request_deadline_s=5.0)
        self.metrics: Callable[[], bytes] = lambda: b"metric 1\n"
        self.tokens: Tokens | None = None
        self.gone = asyncio.Event()
        self._ids = itertools.count(1)
        self._app: GatewayApp | None = None
        self._relay: Relay | None = None

    @property
    def shelf(self) -> Shelf:
        """What the relay keeps of streams."""
        assert self._relay is not None
        return self._relay.shelf

    @property
    def bodies(self) -> ByteRoom:
        """What the relay holds of bodies."""
        assert self._relay is not None
        return self._relay.door.bodies

    @property
    def app(self) -> GatewayApp:
        if self._app is None:
            clock = asyncio.get_running_loop().time
            relay = self._relay = Relay(
                door=Door(self.coordination, Gate(clock=clock, wall=clock), self.limits, self.tokens),
                upstream=self.upstream,
                observer=self.observer,
                clock=clock,
                new_id=lambda: f"made-{next(self._ids)}",
            )
            self._app = GatewayApp(relay, metrics=self.metrics, created_unix_s=1_700_000_000)
        return self._app

    async def call(
        self,
        path: str = "/v1/completions",
        body: bytes | None = b'{"model":"org/model","prompt":"hi"}',
        *,
        method: str = "POST",
        headers: Sequence[tuple[bytes, bytes]] = (),
        query: bytes = b"",
        read: Callable[[bytes], object] = len,
    ) -> Answer:
        """One request; `body` None sends no end of a body. Setting `gone` disconnects the client.

        `read` sees each part of the body as it comes, even of an answer that is never returned.
        """
        answer = Answer()
        messages = [] if body is None else [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            if message["type"] == "http.response.start":
                assert answer.status is None, "two heads"
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                assert answer.status is not None, "a body without a head"
                assert not answer.is_complete, "more after the end"
                read(message.get("body", b""))
                answer.body += message.get("body", b"")
                answer.is_complete = not message.get("more_body", False)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": list(headers),
            "server": ("127.0.0.1", 8080),
            "client": ("127.0.0.1", 1),
        }
        async with asyncio.timeout(10.0):
            await self.app(scope, receive, send)
        return answer


@pytest.fixture
async def stage(plan: Callable[..., Plan], model: Model) -> Stage:
    return Stage(plan, model)


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5.0):
            while not condition():  # What the code under test does sets no event.
                await asyncio.sleep(0.001)

    return wait
