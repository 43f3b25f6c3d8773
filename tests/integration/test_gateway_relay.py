"""The gateway process over loopback: real sockets, the real coordinator, small raw engines behind it."""

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.core.events import Event
from pdcoord.core.fleet import SampleTaken
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings

METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.1\n"
EVENTS = [b'data: {"choices":[{"index":0,"text":"%d"}]}\n\n' % i for i in range(4)] + [b"data: [DONE]\n\n"]
CHAT_EVENTS = [
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"org/model",'
    b'"choices":[{"index":0,"delta":{"content":"%d"},"finish_reason":null}]}\n\n' % i
    for i in range(3)
] + [b"data: [DONE]\n\n"]
RESPONSE_EVENT = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":4,'
    b'"item_id":"i","output_index":0,"content_index":0,"delta":"a","logprobs":[]}\n\n'
)
CANCELLED_EVENT = (
    b'event: response.completed\ndata: {"type":"response.completed","sequence_number":5,'
    b'"response":{"id":"r","object":"response","status":"cancelled","output":[]}}\n\n'
)
CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "org/model",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}


class Engine:
    """Answers as a call's `user` field says; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self.aborted = asyncio.Event()
        self.release = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def die(self) -> None:
        """Close the listener and cut every connection, as a killed pod does."""
        if self._server is not None:
            self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()
        await until(lambda: not self.connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            while True:
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self.connections.discard(writer)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        target = lines[0].split(" ")[1]
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if target == "/metrics":
            _answer(writer, METRICS, content_type="text/plain")
            return
        self.asked.append((target, headers, body))
        call = json.loads(body)
        await getattr(self, "do_" + call.get("user", "json").replace("-", "_"))(reader, writer, call)
        await writer.drain()

    async def do_json(self, _reader: Any, writer: asyncio.StreamWriter, call: dict[str, Any]) -> None:
        if "messages" not in call:
            _answer(writer, json.dumps({"ok": True, "model": call.get("model")}).encode())
        elif call.get("stream"):
            _begin_stream(writer)
            for event in CHAT_EVENTS:
                _chunk(writer, event)
            _chunk(writer, b"")
        else:
            _answer(writer, json.dumps(CHAT).encode())

    async def do_sse(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        """Events cut at places that no event boundary knows of."""
        _begin_stream(writer)
        text = b"".join(EVENTS)
        for start, end in itertools.pairwise([0, 1, 7, 60, 61, 100, len(text)]):
            _chunk(writer, text[start:end])
            await writer.drain()
        _chunk(writer, b"")

    async def do_one_then_wait(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _call: Any
    ) -> None:
        """One event; the rest when the test says so. Notices a proxy that goes away."""
        _begin_stream(writer)
        _chunk(writer, EVENTS[0])
        await writer.drain()
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(reader.read(1))
            watch.add_done_callback(lambda task: None if task.cancelled() else self.aborted.set())
            go = group.create_task(self.release.wait())
            await asyncio.wait([watch, go], return_when=asyncio.FIRST_COMPLETED)
            watch.cancel()
            go.cancel()
        for event in EVENTS[1:]:
            _chunk(writer, event)
        _chunk(writer, b"")

    async def do_hang(self, reader: asyncio.StreamReader, _writer: Any, _call: Any) -> None:
        await reader.read(1)
        self.aborted.set()
        raise ConnectionError

    async def do_die_before(self, *_: Any) -> None:
        raise ConnectionError

    async def do_die_after_head(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _begin_stream(writer)
        await writer.drain()
        raise ConnectionError

    async def do_die_after_first(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _begin_stream(writer)
        _chunk(writer, EVENTS[0])
        await writer.drain()
        # Given away before the cut, or the kernel may drop it with the connection.
        await asyncio.sleep(0.05)
        raise ConnectionError

    async def do_die_in_a_response(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _begin_stream(writer)
        _chunk(writer, RESPONSE_EVENT)
        await writer.drain()
        await asyncio.sleep(0.05)  # As above.
        raise ConnectionError

    async def do_give_a_response_up(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _begin_stream(writer)
        for event in (RESPONSE_EVENT, CANCELLED_EVENT, b""):
            _chunk(writer, event)

    async def do_error_500(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _answer(writer, b'{"error":{"message":"engine","type":"x","code":500}}', status=500)

    async def do_error_400(self, _reader: Any, writer: asyncio.StreamWriter, _call: Any) -> None:
        _answer(writer, b'{"error":{"message":"too long"}}', status=400)


def _answer(
    writer: asyncio.StreamWriter, body: bytes, *, status: int = 200, content_type: str = "application/json"
) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _begin_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


class Answer:
    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        self.headers = headers
        self.body = b""
        self.is_complete = False

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


class Gateway:
    """A running gateway process and the engines behind it."""

    def __init__(
        self, process: Process, engines: Sequence[Engine], stop: asyncio.Event, lines: LogCapture
    ) -> None:
        self.process = process
        self.lines = lines
        self.engines = engines
        self.stop = stop
        self.events: list[Event] = []
        handle = process.coordinator.handle

        def recording(event: Event, now_s: float) -> Any:
            self.events.append(event)
            actions = handle(event, now_s)
            process.coordinator.validate()
            return actions

        process.coordinator.handle = recording  # type: ignore[method-assign]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with connection(self.process.ports[0]) as pair:
            yield pair

    async def call(
        self,
        body: bytes | dict[str, Any],
        *,
        path: str = "/v1/completions",
        headers: Sequence[str] = (),
        method: str = "POST",
    ) -> Answer:
        """One request on a connection of its own, read to its end or to where it breaks off."""
        async with self.connect() as (reader, writer):
            writer.write(request(body, path=path, headers=headers, method=method))
            return await read_answer(reader)

    async def admin(self, path: str) -> Any:
        async with connection(self.process.ports[1]) as (reader, writer):
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            return json.loads((await read_answer(reader)).body)

    async def settle(self) -> None:
        """Until nothing is in flight; then every account must be even."""
        await until(lambda: self.process.coordinator.live_count == 0)
        coordinator = self.process.coordinator
        coordinator.validate()
        assert coordinator.ledger.open_count == 0
        kinds = Counter((type(e).__name__, getattr(e, "id", None)) for e in self.events)
        assert all(count == 1 for (kind, _), count in kinds.items() if kind == "RequestEnded")


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request(
    body: bytes | dict[str, Any], *, path: str, headers: Sequence[str] = (), method: str = "POST"
) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "host: gateway", f"content-length: {len(raw)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + raw


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
    answer = Answer(int(lines[0].split(" ")[1]), headers)
    try:
        if "content-length" in headers:
            answer.body = await reader.readexactly(int(headers["content-length"]))
        else:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                answer.body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        answer.is_complete = True
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        answer.body += getattr(error, "partial", b"") if "content-length" in headers else b""
    return answer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.005)


def policy_of(engines: Sequence[Engine]) -> str:
    listed = ", ".join(f'{{name: d{i}, address: "127.0.0.1:{e.port}"}}' for i, e in enumerate(engines))
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: org/model, aliases: [alias]}}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{listed}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}}
    limits: {{context_tokens_max: 1000}}
"""


@asynccontextmanager
async def gateway(folder: Path, engine_count: int = 1, **settings: Any) -> AsyncIterator[Gateway]:
    engines = [Engine() for _ in range(engine_count)]
    for engine in engines:
        await engine.start()
    path = folder / "policy.yaml"
    path.write_text(policy_of(engines))
    given = {"port": 0, "admin_port": 0, "scrape_interval_s": 0.02, "reload_interval_s": 0.05, "drain_s": 5.0}
    lines = LogCapture()
    log = structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger("info")
    )
    read = load_settings(policy=path, **(given | settings))
    process = Process(read, GatewayFront(read), log)
    process.files.load_first()
    stop, started = asyncio.Event(), asyncio.Event()
    made = Gateway(process, engines, stop, lines)
    async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
        running = group.create_task(process.run(stop, started.set))
        try:
            await started.wait()
            await until(
                lambda: sum(s.is_eligible for s in process.coordinator.fleet.states()) == engine_count
            )
            yield made
        finally:
            stop.set()
            for engine in engines:
                engine.release.set()
            try:
                assert await running == 0
            finally:
                for engine in engines:
                    await engine.die()


CALL = {"model": "org/model", "prompt": "hi"}


async def test_the_bytes_of_a_stream_are_the_engines_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        answer = await made.call(CALL | {"user": "sse", "stream": True})
        assert (answer.status, answer.body, answer.is_complete) == (200, b"".join(EVENTS), True)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-pdcoord-decision"].startswith("colocated; ")
        await made.settle()


async def test_a_part_of_a_stream_is_passed_on_when_it_comes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made, made.connect() as (reader, writer):
        writer.write(request(CALL | {"user": "one-then-wait", "stream": True}, path="/v1/completions"))
        await reader.readuntil(EVENTS[0])  # The engine has sent no more, and will not before:
        made.engines[0].release.set()
        await reader.readuntil(EVENTS[-1])
        await made.settle()


async def test_one_connection_serves_calls_in_turn(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made, made.connect() as (reader, writer):
        for number in range(5):
            call = CALL | {"user": "sse" if number % 2 else "json", "stream": bool(number % 2)}
            writer.write(request(call, path="/v1/completions", headers=[f"x-request-id: r-{number}"]))
            answer = await read_answer(reader)
            assert (answer.status, answer.headers["x-request-id"]) == (200, f"r-{number}")
        await made.settle()


BAD_INPUT: list[tuple[str, bytes | dict[str, Any], str, int, str]] = [
    ("POST", b"{", "/v1/completions", 400, "malformed-json"),
    ("POST", b'{"model":"org/model","prompt":"\xff"}', "/v1/completions", 400, "malformed-json"),
    ("POST", b"[" * 100_000, "/v1/completions", 400, "malformed-json"),
    ("POST", {"model": "other", "prompt": "x"}, "/v1/completions", 404, "model-unknown"),
    ("POST", {"model": 1, "prompt": "x"}, "/v1/completions", 400, "invalid-field"),
    ("POST", {"model": "org/model", "messages": "x"}, "/v1/chat/completions", 400, "invalid-field"),
    ("POST", {"model": "org/model", "prompt": "x", "n": 2.5}, "/v1/completions", 400, "invalid-field"),
    ("POST", CALL | {"kv_transfer_params": {}}, "/v1/completions", 400, "invalid-field"),
    ("POST", b" " * 200_001, "/v1/completions", 413, "body-too-large"),
    ("POST", CALL | {"prompt": list(range(2_000))}, "/v1/completions", 400, "context-too-long"),
    ("POST", CALL, "/v1/nothing", 404, "path-unknown"),
    ("GET", b"", "/v1/completions", 405, "method-not-allowed"),
]


@pytest.mark.parametrize(("method", "body", "path", "status", "code"), BAD_INPUT)
async def test_bad_input_gets_an_openai_error_and_leaves_nothing(
    tmp_path: Path, method: str, body: Any, path: str, status: int, code: str
) -> None:
    async with gateway(tmp_path, body_bytes_max=200_000) as made:
        answer = await made.call(body, path=path, method=method, headers=["x-request-id: bad-1"])
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-request-id"] == "bad-1"
        assert b"Traceback" not in answer.body
        assert made.engines[0].asked == []
        await made.settle()


async def test_a_chunked_body_past_the_limit_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path, body_bytes_max=10_000) as made, made.connect() as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
        answer = await read_answer(reader)
        assert (answer.status, answer.error["code"]) == (413, "body-too-large")
        assert answer.headers["connection"] == "close"
        assert await reader.read() == b""


@pytest.mark.parametrize(
    "call", [CALL | {"n": 3}, CALL | {"prompt": ""}, CALL | {"prompt": []}, CALL | {"prompt": [1, 2]}]
)
async def test_odd_but_good_calls_are_served_together(tmp_path: Path, call: dict[str, Any]) -> None:
    async with gateway(tmp_path) as made:
        answer = await made.call(call)
        assert answer.status == 200
        assert answer.headers["x-pdcoord-decision"].startswith("colocated; ")
        assert json.loads(made.engines[0].asked[0][2]) == call
        await made.settle()


async def test_an_engines_own_400_is_the_answer(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        answer = await made.call(CALL | {"user": "error-400"})
        assert (answer.status, answer.body) == (400, b'{"error":{"message":"too long"}}')
        await made.settle()


async def test_foreign_routing_headers_do_not_pass_and_an_alias_is_rewritten(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        headers = ["x-prefiller-host-port: 6.6.6.6:1", "X-Pdcoord-Plan: {}", "authorization: Bearer k"]
        answer = await made.call({"model": "alias", "prompt": "hi"}, headers=headers)
        assert json.loads(answer.body) == {"ok": True, "model": "org/model"}
        (_, sent, _) = made.engines[0].asked[0]
        assert "x-prefiller-host-port" not in sent
        assert sent["x-pdcoord-plan"] != "{}"
        assert sent["authorization"] == "Bearer k"
        assert sent["x-request-id"] == answer.headers["x-request-id"]


async def test_head_is_answered_without_a_body_on_both_listeners(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        for port, path in ((0, "/readyz"), (0, "/v1/models"), (1, "/fleet"), (1, "/paths")):
            async with connection(made.process.ports[port]) as (reader, writer):
                writer.write(f"HEAD {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200")
                assert b"content-length: 0" not in head
                writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                assert (await reader.read()).startswith(b"HTTP/1.1 ")


async def test_a_client_that_leaves_closes_the_engines_connection(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        for user in ("one-then-wait", "hang"):
            async with made.connect() as (reader, writer):
                writer.write(request(CALL | {"user": user, "stream": True}, path="/v1/completions"))
                if user == "one-then-wait":
                    await reader.readuntil(EVENTS[0])
                await until(lambda: made.process.coordinator.live_count == 1)
            async with asyncio.timeout(5.0):
                await made.engines[0].aborted.wait()
            made.engines[0].aborted.clear()
            await made.settle()


@pytest.mark.parametrize("user", ["die-before", "die-after-head", "error-500"])
async def test_an_engine_that_fails_before_a_byte_is_replaced(tmp_path: Path, user: str) -> None:
    async with gateway(tmp_path, 2) as made:
        # The first engine that is asked fails in this way, the second answers.
        taken: list[Engine] = []
        for engine in made.engines:
            fail = getattr(engine, "do_" + user.replace("-", "_"))

            async def once(
                reader: Any, writer: Any, call: Any, engine: Engine = engine, fail: Any = fail
            ) -> None:
                if not taken or taken == [engine]:
                    taken[:] = [engine]
                    await fail(reader, writer, call)
                else:
                    await engine.do_json(reader, writer, call)

            engine.do_json_once = once  # type: ignore[attr-defined]
        answer = await made.call(CALL | {"user": "json-once"})
        assert (answer.status, json.loads(answer.body)["ok"]) == (200, True)
        await made.settle()
        told = [type(event).__name__ for event in made.events if not isinstance(event, SampleTaken)]
        assert told == ["RequestArrived", "DecodeFailed", "ResponseBegan", "RequestEnded"]


async def test_the_engines_last_error_is_told_when_all_fail(tmp_path: Path) -> None:
    async with gateway(tmp_path, 2) as made:
        answer = await made.call(CALL | {"user": "error-500"})
        assert (answer.status, answer.body) == (500, b'{"error":{"message":"engine","type":"x","code":500}}')
        assert [len(engine.asked) for engine in made.engines] == [1, 1]
        await made.settle()


async def test_no_engine_left_is_an_error_of_ours(tmp_path: Path) -> None:
    async with gateway(tmp_path, 2) as made:
        answer = await made.call(CALL | {"user": "die-before"})
        assert (answer.status, answer.error["code"]) == (503, "ladder-exhausted")
        assert "retry-after" in answer.headers
        await made.settle()


async def test_a_stream_that_breaks_off_does_not_look_whole(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        answer = await made.call(CALL | {"user": "die-after-first", "stream": True})
        assert answer.status == 200
        assert not answer.is_complete
        assert answer.body.startswith(EVENTS[0])
        event = json.loads(answer.body.removeprefix(EVENTS[0]).removeprefix(b"data: "))
        assert event["error"]["code"] == "stream-lost"
        await made.settle()


async def test_readiness_follows_the_engines(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        assert (await made.call(b"", path="/readyz", method="GET")).status == 200
        port = made.engines[0].port
        await made.engines[0].die()
        await until(lambda: made.process.loop.unready() is not None)
        answer = await made.call(b"", path="/readyz", method="GET")
        assert (answer.status, answer.error["code"]) == (503, "no-endpoints")
        assert (await made.call(CALL)).status == 503
        await made.engines[0].start(port)
        await until(lambda: made.process.loop.unready() is None)
        assert (await made.call(CALL)).status == 200


async def test_draining_lets_calls_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with gateway(tmp_path, drain_notice_s=0.2) as made, made.connect() as (reader, writer):
        writer.write(request(CALL | {"user": "one-then-wait", "stream": True}, path="/v1/completions"))
        await reader.readuntil(EVENTS[0])
        made.stop.set()
        await until(lambda: made.process.loop.is_draining)
        answer = await made.call(b"", path="/readyz", method="GET")
        assert (answer.status, answer.error["code"]) == (503, "draining")

        async def is_refused() -> bool:
            try:
                async with made.connect():
                    return False
            except ConnectionRefusedError:
                return True

        async with asyncio.timeout(5.0):
            while not await is_refused():  # The kernel tells nobody.
                await asyncio.sleep(0.01)
        made.engines[0].release.set()
        await reader.readuntil(EVENTS[-1])


async def test_a_decision_can_be_asked_for(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        await made.call(CALL, headers=["x-request-id: a/b?c"])
        shown = await made.admin("/decisions/a%2Fb%3Fc")
        assert (shown["outcome"], shown["attempts"][0]["mode"]) == ("ok", "colocated")
        assert (await made.admin("/decisions?limit=1"))["decisions"][0]["id"] == "a/b?c"
        assert (await made.admin("/decisions/other"))["error"]["code"] == "path-unknown"
        for given, remedy in (("0", "greater than or equal to 1"), ("many", "a valid integer")):
            for page in ("/decisions", "/paths"):
                error = (await made.admin(f"{page}?limit={given}"))["error"]
                assert error["code"] == "invalid-field"
                assert error["message"].startswith(f"limit is '{given}'; give one that is {remedy}")
        assert [e["health"] for e in (await made.admin("/fleet"))["endpoints"]] == ["ready"]
        assert (await made.admin("/paths"))["total"] == 0
        assert (await made.admin("/policy"))["models"][0]["name"] == "org/model"
        assert (await made.admin("/nothing"))["error"]["code"] == "path-unknown"


async def test_a_new_policy_is_followed_and_a_bad_one_is_not(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        path = tmp_path / "policy.yaml"
        good = policy_of(made.engines)
        path.write_text(good.replace("aliases: [alias]", "aliases: [other-name]"))
        await until(lambda: made.process.loop.model("other-name") is not None)
        assert (await made.call({"model": "alias", "prompt": "x"})).status == 404
        path.write_text(good.replace("role: both", "role: never"))
        await until(lambda: bool(made.process.files.problems))
        assert (await made.call({"model": "other-name", "prompt": "x"})).status == 200
        metrics = (await made.call(b"", path="/metrics", method="GET")).body.decode()
        assert 'pdcoord_gateway_policy_stale{source="policy"} 1.0' in metrics
        assert 'pdcoord_gateway_policy_reloads_total{outcome="refused",source="policy"} 1.0' in metrics


async def test_the_openai_client_is_at_home(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        url = f"http://127.0.0.1:{made.process.ports[0]}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            assert [model.id async for model in client.models.list()] == ["org/model", "alias"]
            whole = await client.chat.completions.create(model="alias", messages=messages)
            assert whole.choices[0].message.content == "hello"
            stream = await client.chat.completions.create(model="alias", messages=messages, stream=True)
            assert "".join([part.choices[0].delta.content or "" async for part in stream]) == "012"
            with pytest.raises(openai.NotFoundError) as caught:
                await client.chat.completions.create(model="nope", messages=messages)
            assert caught.value.code == "model-unknown"
        await made.settle()


@pytest.mark.parametrize(("user", "seen"), [("die-in-a-response", 1), ("give-a-response-up", 2)])
async def test_the_openai_client_raises_what_a_lost_response_ends_in(
    tmp_path: Path, user: str, seen: int
) -> None:
    async with gateway(tmp_path) as made:
        url = f"http://127.0.0.1:{made.process.ports[0]}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
            stream = await client.responses.create(model="alias", input="hi", stream=True, user=user)
            kinds = []
            with pytest.raises(openai.APIError, match="The stream broke off") as caught:
                async for event in stream:
                    kinds.append(event.type)  # noqa: PERF401  # What came before the error counts.
            assert caught.value.code == "stream-lost"
            assert len(kinds) == seen
        await made.settle()
        (done,) = [line for line in made.lines.entries if line["event"] == "request.done"]
        assert (done["outcome"], done["reason"]) == ("upstream-error", "stream-lost")


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_engines_do_every_call_ends_once_and_the_ledger_is_even(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    users = [
        "json",
        "sse",
        "die-before",
        "die-after-head",
        "die-after-first",
        "error-500",
        "error-400",
        "hang",
    ]
    async with gateway(tmp_path, 3, head_timeout_s=0.5, answer_timeout_s=0.5) as made:

        async def one(number: int) -> None:
            user = rng.choice(users)
            raw = request(CALL | {"user": user, "stream": "sse" in user}, path="/v1/completions")
            raw = raw[: rng.choice([len(raw), len(raw), len(raw), len(raw) - 3])]
            leaves_after_s = rng.random() * 0.05 if number % 5 == 0 else 2.0
            async with made.connect() as (reader, writer):
                writer.write(raw)
                with suppress(TimeoutError):  # It left, or its body was never sent whole.
                    async with asyncio.timeout(leaves_after_s):
                        answer = await read_answer(reader)
                        assert answer.status in {200, 400, 500, 503, 504}

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(one(number))
        await made.settle()
        metrics = (await made.call(b"", path="/metrics", method="GET")).body.decode()
        assert "pdcoord_gateway_in_flight 0.0" in metrics
        assert sum(line["event"] == "request.done" for line in made.lines.entries) <= 40
        assert not [line for line in made.lines.entries if line["event"] == "request.crashed"]
        arrived = sum(type(event).__name__ == "RequestArrived" for event in made.events)
        assert len((await made.admin("/decisions?limit=1000"))["decisions"]) == arrived
