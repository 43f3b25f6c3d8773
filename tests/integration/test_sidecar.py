"""The sidecar on loopback between a client and small servers that play engines' recorded wire behaviour."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import (
    DialectName,
    Mode,
    PlanHeader,
    PrefillTarget,
    ServedHeader,
    decode_served,
    encode_plan,
)
from pdcoord.protocol.tickets import PREFILL_TICKET
from pdcoord.resume.opening import OPENING_BYTES_MAX
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError
from pdcoord.wire.server import Listener, serve
from sidecar import exchange
from sidecar.guard import Allowlist
from sidecar.handoff import Handoff
from sidecar.health import Health
from sidecar.observe import Metrics
from sidecar.process import make_proxy
from sidecar.proxy import Backstage, Proxy
from sidecar.settings import parse
from sidecar.vocabulary import Order, State

WAIT_S = 10.0
CHAT = "/v1/chat/completions"
TICKET = b'{"do_remote_prefill": true, "remote_block_ids": [[1, 2]],  "remote_host": "10.0.0.42", "x": 1.50}'
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":317}}}\n\n'
LAST = b"data: [DONE]\n\n"
ERROR = (
    b'data: {"error": {"message": "Internal server error", "type": "InternalServerError", "code": 500}}\n\n'
)


# Engines.


@dataclass
class Seen:
    """One request as an engine got it."""

    method: str
    target: str
    headers: dict[str, str]
    raw: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def answer(self, status: int, body: object, *headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(raw)}"]
        self.write("\r\n".join([*lines, *headers, "", ""]).encode() + raw)

    def events(self, *events: bytes) -> None:
        for event in events:
            self.write(b"%x\r\n%b\r\n" % (len(event), event))

    async def until_closed(self) -> None:
        """Until the peer has closed the connection, which is how it aborts a request."""
        async with asyncio.timeout(WAIT_S):
            while await self.reader.read(1024):
                pass


Script = Callable[[Seen], Awaitable[None]]
NOWHERE = HostPort("")


@dataclass
class Engine:
    """Plays one engine: `script` answers each request; a connection is kept alive unless it is closed."""

    script: Script
    requests: list[Seen] = field(default_factory=list)
    connection_count: int = 0
    aborts: int = 0
    address: HostPort = NOWHERE

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                seen = await read_request(reader, writer)
                if seen.target != "/health":
                    self.requests.append(seen)
                    await self.script(seen)
                else:
                    seen.answer(200, b"")
                await writer.drain()
        writer.close()

    async def wait_aborts(self, count: int) -> None:
        await until(lambda: self.aborts >= count)


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    return Seen(method, target, headers, raw, reader, writer)


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # what is waited for has no event of its own
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def engine(script: Script) -> AsyncIterator[Engine]:
    played = Engine(script)
    server = await asyncio.start_server(played.serve, "127.0.0.1", 0)
    played.address = HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield played
    finally:
        server.close()


async def give_ticket(seen: Seen) -> None:
    usage = {"prompt_tokens": 318, "prompt_tokens_details": {"cached_tokens": 64}}
    raw = json.dumps({"id": "x", "usage": usage}).encode()
    seen.answer(200, raw[:-1] + b', "kv_transfer_params": ' + TICKET + b"}")


async def stream(seen: Seen) -> None:
    seen.write(SSE_HEAD)
    seen.events(ROLE, TOKEN, USAGE, LAST, b"")


async def speak(seen: Seen) -> None:
    """Decode as vLLM: a stream if asked for one, else one body."""
    if seen.raw and seen.body.get("stream"):
        await stream(seen)
    else:
        seen.answer(200, {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 317}}})


def always(status: int, body: object = b"{}") -> Script:
    async def script(seen: Seen) -> None:
        seen.answer(status, body)

    return script


async def reset(seen: Seen) -> None:
    seen.writer.transport.abort()


def hanging(played: list[Engine]) -> Script:
    """Never answers; counts on the engine in `played` that the peer gave up."""

    async def script(seen: Seen) -> None:
        await seen.until_closed()
        played[0].aborts += 1
        seen.writer.close()

    return script


async def hang(seen: Seen) -> None:
    await seen.until_closed()
    seen.writer.close()


def in_turn(*scripts: Script) -> Script:
    """One script per request, the last for all that follow."""
    left = list(scripts)

    async def script(seen: Seen) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(seen)

    return script


# The sidecar and its client.


@dataclass
class Answer:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)

    @property
    def served(self) -> ServedHeader:
        served = decode_served(self.header(b"x-pdcoord-served") or b"")
        assert served is not None
        return served

    @property
    def rungs(self) -> list[str]:
        return [f"{taken.rung} {taken.reason} {taken.target}" for taken in self.served.rungs]

    @property
    def reason(self) -> str:
        error = json.loads(self.body)["error"]
        assert (self.header(b"x-pdcoord-reason") or b"").decode() == error["code"]
        return str(error["code"])


@dataclass
class Running:
    """A sidecar that serves, and a client of it."""

    address: HostPort
    backstage: HostPort
    proxy: Proxy
    client: Client

    async def call(
        self,
        body: object,
        *headers: tuple[bytes, bytes],
        path: str = CHAT,
        method: str = "POST",
    ) -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = [(b"content-type", b"application/json"), *headers]
        async with await self.client.request(
            method, self.address, path, headers=sent, body=raw, head_timeout_s=WAIT_S
        ) as response:
            return Answer(response.status, response.headers, await response.read_all(timeout_s=WAIT_S))

    async def metric(self, line: str) -> float:
        """One sample, when every request has been accounted for."""
        await until(lambda: self.proxy.in_flight == 0)
        async with await self.client.request(
            "GET", self.backstage, "/metrics", head_timeout_s=WAIT_S
        ) as response:
            text = (await response.read_all(timeout_s=WAIT_S)).decode()
        found = [row for row in text.splitlines() if row.startswith(f"pdcoord_sidecar_{line} ")]
        return float(found[0].split()[-1]) if found else 0.0


@contextlib.asynccontextmanager
async def sidecar(decode: Engine | HostPort, *prefills: Engine, flags: str = "") -> AsyncIterator[Running]:
    address = decode.address if isinstance(decode, Engine) else decode
    allow = ",".join(prefill.address for prefill in prefills)
    settings = parse([*flags.split(), "--engine", address, "--allow", allow], {})
    allowlist, metrics = Allowlist(settings.allow), Metrics()
    stop, ports = asyncio.Event(), asyncio.Queue[list[int]]()
    async with Client() as client, Client() as own, asyncio.TaskGroup() as group:
        health = Health(own, settings.engine, metrics)
        proxy = make_proxy(settings, allowlist, own, metrics, health)
        listeners = [Listener(proxy), Listener(Backstage(metrics, health))]
        group.create_task(serve(listeners, stop=stop, drain_s=WAIT_S, on_started=ports.put_nowait))
        front, back = await ports.get()
        try:
            yield Running(HostPort(f"127.0.0.1:{front}"), HostPort(f"127.0.0.1:{back}"), proxy, client)
        finally:
            stop.set()


def request(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}], **more}


def plan(*prefills: Engine | HostPort, **more: Any) -> tuple[bytes, bytes]:
    addresses = [p.address if isinstance(p, Engine) else p for p in prefills]
    targets = tuple(PrefillTarget(address=address) for address in addresses)
    return (b"x-pdcoord-plan", encode_plan(PlanHeader(prefills=targets, **more)))


def foreign(*prefills: Engine) -> tuple[bytes, bytes]:
    return (b"x-prefiller-host-port", ",".join(p.address for p in prefills).encode())


async def dead_address() -> HostPort:
    """An address that refuses connections."""
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return HostPort(f"127.0.0.1:{port}")


# nixlv2, the good way.


async def test_a_stream_is_prefilled_there_and_decoded_here() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        body = request(stream=True, stream_options={"include_usage": True}, max_tokens=9)
        raw = json.dumps(body).encode()
        answer = await s.call(
            raw, plan(p), (b"x-request-id", b"r-1"), (b"authorization", b"Bearer k"), foreign(p)
        )
        assert answer.status == 200
        assert answer.body == ROLE + TOKEN + USAGE.replace(b"317", b"64") + LAST
        assert answer.header(b"x-request-id") == b"r-1"
        assert answer.header(b"content-type") == b"text/event-stream"
        served = answer.served
        assert (served.mode, served.prefill, served.cached_tokens) == (Mode.SPLIT, p.address, 64)
        assert served.prefill_ms is not None
        assert served.transfer_ms is not None

        assert p.requests[0].body == {
            **request(),
            "stream": False,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "kv_transfer_params": PREFILL_TICKET,
        }
        assert d.requests[0].raw == b'{"kv_transfer_params":' + TICKET + b"," + raw[1:]
        for seen in (p.requests[0], d.requests[0]):
            assert (seen.target, seen.headers["x-request-id"]) == (CHAT, "r-1")
            assert seen.headers["authorization"] == "Bearer k"
            assert seen.headers["content-length"] == str(len(seen.raw))
        routing = [n for n in d.requests[0].headers if n.startswith(("x-pdcoord", "x-prefiller"))]
        assert routing == []


async def test_an_answer_in_one_piece_has_the_right_length_and_usage() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        answer = await s.call(request(), foreign(p))
        assert json.loads(answer.body)["usage"] == {"prompt_tokens_details": {"cached_tokens": 64}}
        assert answer.header(b"content-length") == str(len(answer.body)).encode()
        assert answer.served.mode is Mode.SPLIT


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages"])
async def test_every_generative_call_is_split(path: str) -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        answer = await s.call({"model": "m", "prompt": "x", "input": "x", "messages": []}, plan(p), path=path)
        assert (answer.status, answer.served.mode) == (200, Mode.SPLIT)
        assert p.requests[0].target == d.requests[0].target == path


async def test_a_request_without_a_plan_is_the_engines_alone() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        raw = json.dumps(request(stream=True)).encode()
        answer = await s.call(raw)
        assert answer.body == ROLE + TOKEN + USAGE + LAST
        assert answer.served == ServedHeader(mode=Mode.COLOCATED)
        assert d.requests[0].raw == raw
        assert p.requests == []
        assert len(answer.header(b"x-request-id") or b"") == 32


async def test_connections_to_engines_are_kept_alive_and_replaced_when_an_engine_closed_them() -> None:
    async def answer_and_close(seen: Seen) -> None:
        await give_ticket(seen)
        await seen.writer.drain()
        seen.writer.close()

    async with engine(in_turn(give_ticket, answer_and_close, give_ticket)) as p, engine(speak) as d:
        async with sidecar(d, p) as s:
            for _ in range(4):
                answer = await s.call(request(), plan(p))
                assert (answer.status, answer.rungs) == (200, [])
        assert (p.connection_count, d.connection_count) == (2, 1)


# nixlv2, the ladder.


async def refuse_ticket(seen: Seen) -> None:
    seen.answer(200, {"id": "x", "kv_transfer_params": None})


async def half_an_answer(seen: Seen) -> None:
    seen.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
    await seen.writer.drain()
    seen.writer.close()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (always(500), "prefill-error"),
        (always(503), "prefill-overloaded"),
        (always(429), "prefill-overloaded"),
        (refuse_ticket, "prefill-no-ticket"),
        (always(200, {"id": "x"}), "prefill-no-ticket"),
        (always(200, {"kv_transfer_params": {}}), "prefill-no-ticket"),
        (always(200, {"kv_transfer_params": "text"}), "prefill-error"),
        (always(200, b"no json"), "prefill-error"),
        (half_an_answer, "prefill-error"),
        (reset, "prefill-error"),
        (hang, "prefill-timeout"),
    ],
)
async def test_a_failed_prefill_goes_to_the_other_target(script: Script, reason: str) -> None:
    async with engine(script) as p1, engine(give_ticket) as p2, engine(speak) as d, sidecar(d, p1, p2) as s:
        deadline_ms = 1_500.0 if script is hang else 60_000.0
        answer = await s.call(request(stream=True), plan(p1, p2, prefill_deadline_ms=deadline_ms))
        assert answer.status == 200
        assert answer.rungs == [f"other-prefill {reason} {p1.address}"]
        assert answer.served.prefill == p2.address
        assert TOKEN in answer.body
        rung = f'rungs_total{{reason="{reason}",rung="other-prefill"}}'
        assert await s.metric(rung) == 1


async def test_an_unreachable_prefill_ends_colocated() -> None:
    dead = await dead_address()
    async with engine(speak) as d, sidecar(d, flags=f"--allow {dead}") as s:
        raw = json.dumps(request(stream=True)).encode()
        answer = await s.call(raw, plan(dead))
        assert (answer.status, answer.served.mode) == (200, Mode.COLOCATED)
        assert answer.rungs == [f"colocated prefill-unreachable {dead}"]
        assert answer.body == ROLE + TOKEN + USAGE + LAST
        assert d.requests[0].raw == raw


@pytest.mark.parametrize("flags", ["", "--fallback-colocated no"])
async def test_the_ladder_ends_in_a_refusal(flags: str) -> None:
    async with engine(always(500)) as p, engine(speak) as d, sidecar(d, p, flags=flags) as s:
        routing = foreign(p) if flags else plan(p, is_colocated_allowed=False)
        answer = await s.call(request(), routing)
        assert (answer.status, answer.reason) == (503, "ladder-exhausted")
        assert answer.rungs == [f"refuse prefill-error {p.address}"]
        assert answer.header(b"retry-after") == b"1"
        assert d.requests == []


async def test_a_prefill_engines_4xx_is_passed_on_as_it_came() -> None:
    async def refuse(seen: Seen) -> None:
        seen.answer(400, b'{"error": "too long" }', "x-engine: p", "x-request-id: other")

    async with engine(refuse) as p, engine(speak) as d, sidecar(d, p) as s:
        answer = await s.call(request(), foreign(p), (b"x-request-id", b"mine"))
        assert (answer.status, answer.body) == (400, b'{"error": "too long" }')
        assert (answer.header(b"x-engine"), answer.header(b"x-request-id")) == (b"p", b"mine")
        assert answer.served.prefill == p.address
        assert d.requests == []


async def error_event(seen: Seen) -> None:
    seen.write(SSE_HEAD)
    seen.events(ERROR, LAST, b"")


async def break_off_before_output(seen: Seen) -> None:
    seen.write(SSE_HEAD)
    seen.events(b": keep-alive\n\n", b"event: response.created\ndata: {}\n\n")
    await seen.writer.drain()
    seen.writer.close()


async def only_comments(seen: Seen) -> None:
    seen.write(SSE_HEAD)
    seen.events(b": keep-alive\n\n")
    await hang(seen)


async def nothing_at_all(seen: Seen) -> None:
    seen.write(SSE_HEAD)
    seen.events(b"")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (always(500), "transfer-failed"),
        (error_event, "transfer-failed"),
        (break_off_before_output, "transfer-failed"),
        (nothing_at_all, "transfer-failed"),
        (only_comments, "transfer-timeout"),
        (hang, "transfer-timeout"),
    ],
)
async def test_a_failed_transfer_goes_to_the_other_target_unseen(script: Script, reason: str) -> None:
    async with (
        engine(give_ticket) as p1,
        engine(give_ticket) as p2,
        engine(in_turn(script, speak)) as d,
        sidecar(d, p1, p2) as s,
    ):
        deadline_ms = 1_500.0 if reason == "transfer-timeout" else 20_000.0
        answer = await s.call(request(stream=True), plan(p1, p2, transfer_deadline_ms=deadline_ms))
        assert answer.rungs == [f"other-prefill {reason} {p1.address}"]
        assert answer.body == ROLE + TOKEN + USAGE.replace(b"317", b"64") + LAST
        assert answer.served.prefill == p2.address
        assert await s.metric("orphaned_leases_total") == 1


# The wire has its one retry after a reset, so that script is met twice.
@pytest.mark.parametrize("scripts", [[always(503)], [reset, reset]])
async def test_a_decode_engine_at_fault_is_asked_once_more_alone(scripts: list[Script]) -> None:
    async with engine(give_ticket) as p1, engine(give_ticket) as p2, engine(in_turn(*scripts, speak)) as d:
        async with sidecar(d, p1, p2) as s:
            answer = await s.call(request(), plan(p1, p2))
        assert (answer.status, answer.served.mode) == (200, Mode.COLOCATED)
        assert answer.rungs == [f"colocated decode-error {d.address}"]
        assert p2.requests == []
        assert "kv_transfer_params" not in d.requests[-1].body


async def test_a_decode_engines_4xx_is_passed_on() -> None:
    async with engine(give_ticket) as p, engine(always(422, b'{"no":1}')) as d, sidecar(d, p) as s:
        answer = await s.call(request(), plan(p))
        assert (answer.status, answer.body, answer.rungs) == (422, b'{"no":1}', [])


async def test_a_colocated_engines_own_error_is_passed_on() -> None:
    async with engine(always(500, b'{"e":1}')) as d, sidecar(d) as s:
        answer = await s.call(request())
        assert (answer.status, answer.body) == (500, b'{"e":1}')
    async with engine(error_event) as d, sidecar(d) as s:
        assert await read_to_break(s, request(stream=True)) == ERROR + LAST
        assert await s.metric('requests_total{mode="colocated",outcome="broken-off"}') == 1


MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ABORTED = (
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":null}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
ENGINES_WORD = b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"x"}}\n\n'
CANCELLED = (
    b'event: response.completed\ndata: {"response":{"status":"cancelled"},"sequence_number":7,'
    b'"type":"response.completed"}\n\n'
)


@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize(
    ("path", "last", "said"),
    [
        (MESSAGES, ABORTED, {"type": "error"}),
        (MESSAGES, ENGINES_WORD, None),
        (RESPONSES, CANCELLED, {"type": "error", "code": "stream-lost", "sequence_number": 8}),
        (CHAT, b'data: {"choices":[{"index":1,"finish_reason":"abort"}]}\n\n' + LAST, {}),
    ],
)
async def test_a_stream_that_its_engine_gave_up_is_not_served(
    path: str, last: bytes, said: dict[str, Any] | None, *, is_split: bool
) -> None:
    async def give_up(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(TOKEN, *[event + b"\n\n" for event in last.split(b"\n\n") if event], b"")

    async with engine(give_ticket) as p, engine(give_up) as d, sidecar(d, p) as s:
        asked = {**request(stream=True), "input": "x", "max_output_tokens": 9}
        got = await read_to_break(s, asked, *([plan(p)] if is_split else []), path=path)
        whole, _, error = got.removeprefix(TOKEN).partition(last)
        assert whole == b""
        if said is None:
            assert error == b""
        else:
            data = json.loads(error.partition(b"data: ")[2])
            assert data["error"]["code"] == "stream-lost"
            assert said.items() <= data.items()
        mode = "split" if is_split else "colocated"
        assert await s.metric(f'requests_total{{mode="{mode}",outcome="broken-off"}}') == 1


@pytest.mark.parametrize(
    ("path", "given_up"),
    [
        (MESSAGES, {"type": "message", "content": [], "usage": {}}),
        (RESPONSES, {"object": "response", "status": "cancelled"}),
        (CHAT, {"choices": [{"finish_reason": "abort"}]}),
    ],
)
async def test_an_answer_in_one_piece_that_was_given_up_is_a_502(path: str, given_up: object) -> None:
    async with engine(always(200, given_up)) as d, sidecar(d) as s:
        answer = await s.call({**request(), "input": "x", "max_output_tokens": 9}, path=path)
        assert (answer.status, answer.reason) == (502, "upstream-failed")
        assert (json.loads(answer.body).get("type") == "error") is (path == MESSAGES)


async def test_an_engine_that_is_not_there_is_a_502() -> None:
    async with sidecar(await dead_address()) as s:
        answer = await s.call(request())
        assert (answer.status, answer.reason) == (502, "upstream-failed")
        assert await s.metric('refusals_total{reason="upstream-failed"}') == 1
        assert (await s.call(b"", method="GET", path="/v1/models")).status == 502


async def test_head_asks_the_engine_as_get_does_and_brings_no_body() -> None:
    async def list_models(seen: Seen) -> None:
        seen.answer(200 if seen.method == "GET" else 405, {"data": []})

    async with engine(list_models) as d, sidecar(d) as s:
        for path in ("/v1/models", "/health", "/readyz"):
            reader, writer = await asyncio.open_connection(*s.address.rsplit(":", 1))
            writer.write(f"HEAD {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert (head[:12], body) == (b"HTTP/1.1 200", b""), path
            assert b"content-length: " in head
        assert [seen.method for seen in d.requests] == ["GET"]


async def test_an_engine_that_does_not_answer_is_a_504() -> None:
    async with engine(hang) as d, sidecar(d, flags="--answer-ms 200") as s:
        answer = await s.call(request())
        assert (answer.status, answer.reason) == (504, "upstream-timeout")


async def test_an_answer_in_one_piece_may_take_longer_than_a_transfer() -> None:
    async def slow(seen: Seen) -> None:
        await asyncio.sleep(0.3)
        await speak(seen)

    async with engine(give_ticket) as p, engine(slow) as d, sidecar(d, p) as s:
        answer = await s.call(request(), plan(p, transfer_deadline_ms=50.0))
        assert (answer.status, answer.rungs) == (200, [])


# After the first byte.


async def read_to_break(s: Running, body: object, *headers: tuple[bytes, bytes], path: str = CHAT) -> bytes:
    """What came until the connection broke; fails if the answer came whole."""
    got = bytearray()

    async def read_all() -> None:
        while chunk := await response.read_chunk(idle_timeout_s=WAIT_S):
            got.extend(chunk)

    async with await s.client.request(
        "POST", s.address, path, headers=list(headers), body=json.dumps(body).encode(), head_timeout_s=WAIT_S
    ) as response:
        assert response.status == 200
        with pytest.raises(StreamError):
            await read_all()
    return bytes(got)


@pytest.mark.parametrize("is_split", [True, False])
async def test_a_stream_that_breaks_ends_with_an_error_event_and_a_closed_connection(
    *, is_split: bool
) -> None:
    async def break_off(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(ROLE, TOKEN)
        await seen.writer.drain()
        seen.writer.close()

    async with engine(give_ticket) as p, engine(break_off) as d, sidecar(d, p) as s:
        got = await read_to_break(s, request(stream=True), *([plan(p)] if is_split else []))
        assert got.startswith(ROLE + TOKEN + b'data: {"error":')
        assert json.loads(got[len(ROLE + TOKEN + b"data: ") :])["error"]["code"] == "stream-lost"
        mode = "split" if is_split else "colocated"
        assert await s.metric(f'requests_total{{mode="{mode}",outcome="broken-off"}}') == 1


async def test_a_stream_that_breaks_inside_an_event_gets_no_event_behind_it() -> None:
    async def break_inside(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(ROLE, TOKEN, TOKEN[:9])
        await seen.writer.drain()
        seen.writer.close()

    async with engine(break_inside) as d, sidecar(d) as s:
        assert await read_to_break(s, request(stream=True)) == ROLE + TOKEN + TOKEN[:9]


async def test_a_stream_that_falls_silent_is_broken_off() -> None:
    played: list[Engine] = []

    async def fall_silent(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(ROLE)
        await hanging(played)(seen)

    async with engine(fall_silent) as d, sidecar(d, flags="--stream-idle-ms 200") as s:
        played.append(d)
        got = await read_to_break(s, request(stream=True))
        assert b"did not answer in time" in got
        assert b"stream-lost" in got
        await d.wait_aborts(1)


async def test_a_stream_that_goes_on_is_not_broken_off() -> None:
    async def slowly(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        for _ in range(14):
            seen.events(TOKEN)
            await seen.writer.drain()
            await asyncio.sleep(0.1)
        seen.events(LAST, b"")

    async with engine(slowly) as d, sidecar(d, flags="--stream-idle-ms 1000") as s:
        assert (await s.call(request(stream=True))).body == TOKEN * 14 + LAST


async def test_an_answer_in_one_piece_that_breaks_off_is_a_502_so_that_it_can_be_asked_elsewhere() -> None:
    async with engine(half_an_answer) as d, sidecar(d) as s:
        answer = await s.call(request())
        assert (answer.status, answer.reason) == (502, "upstream-failed")


async def test_a_very_long_body_that_breaks_off_is_not_made_whole() -> None:
    long = b"x" * OPENING_BYTES_MAX

    async def half_of_it(seen: Seen) -> None:
        seen.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(long)) + long)
        await seen.writer.drain()
        seen.writer.close()

    async with engine(half_of_it) as d, sidecar(d) as s:
        assert await read_to_break(s, request()) == long


async def test_a_body_that_breaks_off_before_it_was_rewritten_is_a_502() -> None:
    async with engine(give_ticket) as p, engine(half_an_answer) as d, sidecar(d, p) as s:
        answer = await s.call(request(), plan(p))
        assert (answer.status, answer.reason) == (502, "upstream-failed")


# A client that leaves.


async def leave_when(
    s: Running, is_time: Callable[[], bool], body: object, *headers: tuple[bytes, bytes]
) -> None:
    host, _, port = s.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps(body).encode()
    lines = [b"POST %b HTTP/1.1" % CHAT.encode(), b"host: x", b"content-length: %d" % len(raw)]
    lines += [b"%b: %b" % pair for pair in headers]
    writer.write(b"\r\n".join([*lines, b"", raw]))
    await until(is_time)
    writer.close()


async def test_a_client_that_leaves_during_the_prefill_ends_it() -> None:
    played: list[Engine] = []
    async with engine(hanging(played)) as p, engine(speak) as d, sidecar(d, p) as s:
        played.append(p)
        await leave_when(s, lambda: len(p.requests) == 1, request(), plan(p))
        await p.wait_aborts(1)
        await until(lambda: s.proxy.in_flight == 0)
        assert d.requests == []
        assert await s.metric('requests_total{mode="split",outcome="client-left"}') == 1


async def test_a_client_that_leaves_during_the_pull_ends_it_and_leaves_an_orphan() -> None:
    played: list[Engine] = []
    async with engine(give_ticket) as p, engine(hanging(played)) as d, sidecar(d, p) as s:
        played.append(d)
        await leave_when(s, lambda: len(d.requests) == 1, request(), plan(p))
        await d.wait_aborts(1)
        await until(lambda: s.proxy.in_flight == 0)
        assert await s.metric("orphaned_leases_total") == 1


async def test_a_client_that_leaves_a_stream_ends_it() -> None:
    played: list[Engine] = []

    async def begin(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(ROLE)
        await hanging(played)(seen)

    async with engine(begin) as d, sidecar(d) as s:
        played.append(d)
        await leave_when(s, lambda: len(d.requests) == 1, request(stream=True))
        await d.wait_aborts(1)


async def test_a_client_that_leaves_ends_both_legs_of_sglang() -> None:
    prefill: list[Engine] = []
    decode: list[Engine] = []
    async with engine(hanging(prefill)) as p, engine(hanging(decode)) as d, sidecar(d, p) as s:
        prefill.append(p)
        decode.append(d)
        both = lambda: len(p.requests) == 1 and len(d.requests) == 1  # noqa: E731  # a name for what it waits for
        await leave_when(s, both, request(), plan(p, dialect=DialectName.SGLANG))
        await p.wait_aborts(1)
        await d.wait_aborts(1)


# sglang.


async def test_sglang_both_legs_meet_in_one_room() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p, flags="--dialect sglang") as s:
        answer = await s.call(request(stream=True, max_tokens=5), foreign(p))
        assert answer.body == ROLE + TOKEN + USAGE.replace(b"317", b"64") + LAST
        assert answer.served.mode is Mode.SPLIT
        prefill, decode = p.requests[0].body, d.requests[0].body
        assert prefill == {**decode, "stream": False}
        assert decode["max_tokens"] == 5
        assert (decode["bootstrap_host"], decode["bootstrap_port"]) == ("127.0.0.1", 8998)
        assert 0 <= decode["bootstrap_room"] < 2**63


async def test_sglang_gives_no_byte_before_the_prefill_is_known_good() -> None:
    is_prefill_free = asyncio.Event()

    async def wait_then_answer(seen: Seen) -> None:
        await is_prefill_free.wait()
        await give_ticket(seen)

    async with engine(wait_then_answer) as p, engine(stream) as d, sidecar(d, p) as s:
        async with asyncio.TaskGroup() as group:
            routing = plan(p, dialect=DialectName.SGLANG)
            call = group.create_task(s.call(request(stream=True), routing))
            await until(lambda: len(d.requests) == 1 and len(p.requests) == 1)
            # The decode leg has answered long before this ends; the client still waits for a head.
            done, _ = await asyncio.wait([call], timeout=0.2)
            assert not done
            is_prefill_free.set()
        assert call.result().status == 200


@pytest.mark.parametrize(("script", "reason"), [(always(500), "prefill-error"), (reset, "prefill-error")])
async def test_sglang_pairs_anew_in_another_room_and_no_byte_of_the_first_shows(
    script: Script, reason: str
) -> None:
    prefill: list[Engine] = []
    wrong = b'data: {"choices":[{"delta":{"content":"of the first pair"}}]}\n\n'

    async def first_pair(seen: Seen) -> None:
        seen.write(SSE_HEAD)
        seen.events(wrong)
        await hanging(prefill)(seen)

    async def fail_late(seen: Seen) -> None:
        await asyncio.sleep(0.1)
        await script(seen)

    async with (
        engine(fail_late) as p1,
        engine(give_ticket) as p2,
        engine(in_turn(first_pair, stream)) as d,
        sidecar(d, p1, p2) as s,
    ):
        prefill.append(d)
        answer = await s.call(request(stream=True), plan(p1, p2, dialect=DialectName.SGLANG))
        assert answer.rungs == [f"other-prefill {reason} {p1.address}"]
        assert answer.body == ROLE + TOKEN + USAGE.replace(b"317", b"64") + LAST
        await d.wait_aborts(1)
        rooms = [seen.body["bootstrap_room"] for seen in (*p1.requests, *p2.requests)]
        assert len(set(rooms)) == 2
        assert {seen.body["bootstrap_room"] for seen in d.requests} == set(rooms)


# pdcoord.


async def test_pdcoord_both_legs_carry_one_transfer_and_the_decode_leg_where_to_fetch_it() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p, flags="--dialect pdcoord") as s:
        answer = await s.call(request(stream=True, max_tokens=5), foreign(p))
        assert answer.body == ROLE + TOKEN + USAGE.replace(b"317", b"64") + LAST
        assert (answer.served.mode, answer.served.prefill) == (Mode.SPLIT, p.address)
        prefill, decode = p.requests[0].body, d.requests[0].body
        asked, told = prefill.pop("kv_transfer_params"), decode.pop("kv_transfer_params")
        pairing = asked.pop("pdcoord")
        assert asked == PREFILL_TICKET
        assert (pairing["version"], len(pairing["transfer"]), len(pairing["nonce"])) == (1, 32, 32)
        assert told == {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_host": "127.0.0.1",
            "remote_port": 14_579,
            "pdcoord": {**pairing, "address": "127.0.0.1:14579"},
        }
        assert (decode["max_tokens"], decode["stream"]) == (5, True)
        assert (prefill["max_tokens"], prefill["stream"]) == (1, False)
        assert p.requests[0].headers["x-pdcoord-leg"] == "prefill"


async def test_pdcoord_the_kv_port_is_the_plans_where_a_list_gives_it() -> None:
    async with (
        engine(give_ticket) as p,
        engine(speak) as d,
        sidecar(d, flags=f"--allow {p.address}/15000") as s,
    ):
        targets = (PrefillTarget(address=p.address, kv_port=15_000),)
        header = encode_plan(PlanHeader(prefills=targets, dialect=DialectName.PDCOORD))
        assert (await s.call(request(), (b"x-pdcoord-plan", header))).status == 200
        assert d.requests[0].body["kv_transfer_params"]["pdcoord"]["address"] == "127.0.0.1:15000"


async def test_pdcoord_gives_no_byte_before_the_prefill_is_known_good() -> None:
    is_prefill_free = asyncio.Event()

    async def wait_then_answer(seen: Seen) -> None:
        await is_prefill_free.wait()
        await give_ticket(seen)

    async with engine(wait_then_answer) as p, engine(stream) as d, sidecar(d, p) as s:
        async with asyncio.TaskGroup() as group:
            routing = plan(p, dialect=DialectName.PDCOORD)
            call = group.create_task(s.call(request(stream=True), routing))
            await until(lambda: len(d.requests) == 1 and len(p.requests) == 1)
            done, _ = await asyncio.wait([call], timeout=0.2)
            assert not done
            is_prefill_free.set()
        assert call.result().served.mode is Mode.SPLIT


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (always(500), "prefill-error"),
        (always(400), "prefill-error"),
        (always(200, {"choices": []}), "prefill-no-ticket"),
        (reset, "prefill-error"),
    ],
)
async def test_pdcoord_output_that_is_there_when_the_prefill_fails_is_the_answer(
    script: Script, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines: list[Handoff] = []

    class Watched(Handoff):
        def __init__(self, order: Order) -> None:
            super().__init__(order)
            machines.append(self)

    monkeypatch.setattr(exchange, "Handoff", Watched)
    has_output = asyncio.Event()

    async def fail_late(seen: Seen) -> None:
        await has_output.wait()
        await script(seen)

    async with engine(fail_late) as p, engine(stream) as d, sidecar(d, p) as s:
        async with asyncio.TaskGroup() as group:
            routing = plan(p, dialect=DialectName.PDCOORD)
            call = group.create_task(s.call(request(stream=True), routing))
            await until(lambda: len(p.requests) == 1 and machines[0].state is State.HELD)
            has_output.set()
        answer = call.result()
        assert answer.rungs == [f"colocated {reason} {p.address}"]
        assert answer.body == ROLE + TOKEN + USAGE + LAST
        assert len(d.requests) == 1


async def test_pdcoord_pairs_anew_under_another_transfer_where_the_decode_leg_still_waits() -> None:
    waiting: list[Engine] = []
    is_decode_there = asyncio.Event()

    async def wait_for_kv(seen: Seen) -> None:
        is_decode_there.set()
        await hanging(waiting)(seen)

    async def refuse_then(seen: Seen) -> None:
        await is_decode_there.wait()
        seen.answer(503, b"{}")

    async with (
        engine(refuse_then) as p1,
        engine(give_ticket) as p2,
        engine(in_turn(wait_for_kv, stream)) as d,
        sidecar(d, p1, p2) as s,
    ):
        waiting.append(d)
        answer = await s.call(request(stream=True), plan(p1, p2, dialect=DialectName.PDCOORD))
        assert answer.rungs == [f"other-prefill prefill-overloaded {p1.address}"]
        assert (answer.served.mode, answer.served.prefill) == (Mode.SPLIT, p2.address)
        prefills = [seen.body["kv_transfer_params"]["pdcoord"] for seen in (*p1.requests, *p2.requests)]
        decodes = [seen.body["kv_transfer_params"]["pdcoord"] for seen in d.requests]
        await d.wait_aborts(1)
        assert [one["transfer"] for one in decodes] == [one["transfer"] for one in prefills]
        assert [one["nonce"] for one in decodes] == [one["nonce"] for one in prefills]
        assert len({one["transfer"] for one in prefills}) == len({one["nonce"] for one in prefills}) == 2


async def test_pdcoord_a_prefill_pod_that_is_not_there_ends_colocated() -> None:
    dead = Engine(reset, address=await dead_address())
    async with engine(speak) as d, sidecar(d, dead) as s:
        answer = await s.call(request(stream=True), plan(dead, dialect=DialectName.PDCOORD))
        assert answer.rungs == [f"colocated prefill-unreachable {dead.address}"]
        assert answer.body == ROLE + TOKEN + USAGE + LAST


async def test_pdcoord_no_secret_is_logged() -> None:
    async with engine(always(500)) as p, engine(stream) as d, sidecar(d, p) as s:
        with capture_logs() as lines:
            await s.call(request(stream=True), plan(p, dialect=DialectName.PDCOORD))
            await until(lambda: s.proxy.in_flight == 0)
        pairing = p.requests[0].body["kv_transfer_params"]["pdcoord"]
        assert lines
        assert pairing["nonce"] not in str(lines)
        assert pairing["transfer"] not in str(lines)


# Guarding.


async def test_a_foreign_target_off_the_allowlist_is_refused() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d) as s:
        answer = await s.call(request(), foreign(p))
        assert (answer.status, answer.reason) == (403, "target-not-allowed")
        assert p.requests == d.requests == []


async def test_a_target_of_our_plan_off_the_allowlist_costs_its_rung() -> None:
    async with engine(give_ticket) as p1, engine(give_ticket) as p2, engine(speak) as d, sidecar(d, p2) as s:
        answer = await s.call(request(), plan(p1, p2))
        assert answer.rungs == [f"other-prefill target-not-allowed {p1.address}"]
        assert (answer.served.prefill, p1.requests) == (p2.address, [])
    async with engine(give_ticket) as p1, engine(speak) as d, sidecar(d) as s:
        assert (await s.call(request(), plan(p1))).rungs == [f"colocated target-not-allowed {p1.address}"]
        answer = await s.call(request(), plan(p1, is_colocated_allowed=False))
        assert (answer.status, answer.reason, p1.requests) == (503, "ladder-exhausted", [])


async def test_with_allow_any_any_target_is_dialled() -> None:
    async with engine(give_ticket) as p, engine(speak) as d:
        settings = parse(["--allow-any"], {})
        assert settings.allow_any
        async with sidecar(d, p) as s:
            assert (await s.call(request(), foreign(p))).status == 200


@pytest.mark.parametrize("path", [CHAT, "/inference/v1/generate", "/v1/anything"])
async def test_a_clients_own_ticket_reaches_no_engine(path: str) -> None:
    body = request(kv_transfer_params={"remote_host": "10.9.9.9"}, bootstrap_host="10.9.9.9")
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        for headers in ([], [foreign(p)], [(b"x-pdcoord-leg", b"prefill")]):
            await s.call(body, *headers, path=path)
        assert len(d.requests) == 3
        assert not [seen for seen in (*p.requests, *d.requests) if b"10.9.9.9" in seen.raw]


async def test_a_sidecar_in_front_of_a_prefill_engine_lets_the_leg_ask() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(p) as front:
        async with sidecar(d, flags=f"--allow {front.address}") as s:
            answer = await s.call(request(), plan(front.address))
        assert (answer.status, answer.rungs, answer.served.prefill) == (200, [], front.address)
        assert p.requests[0].body["kv_transfer_params"] == PREFILL_TICKET
        assert await front.metric('requests_total{mode="prefill-leg",outcome="served"}') == 1


@pytest.mark.parametrize("more", [{"n": 2}, {"echo": True}])
async def test_what_must_not_be_split_is_not_even_for_a_foreign_router(more: dict[str, Any]) -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        answer = await s.call(request(**more), foreign(p))
        assert (answer.status, answer.served.mode, p.requests) == (200, Mode.COLOCATED, [])
        assert await s.metric(f'unsplit_total{{field="{next(iter(more))}"}}') == 1


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [(b"{", 400, "malformed-json"), (b"[]", 400, "invalid-field"), (b"x" * 5000, 413, "body-too-large")],
)
async def test_bad_bodies(body: bytes, status: int, reason: str) -> None:
    async with engine(speak) as d, sidecar(d, flags="--body-bytes-max 4096") as s:
        answer = await s.call(body)
        assert (answer.status, answer.reason, d.requests) == (status, reason, [])
        assert answer.header(b"x-request-id")


async def test_all_bodies_together_are_bounded_and_whoever_is_done_gives_room_back() -> None:
    is_free = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await is_free.wait()
        await speak(seen)

    flags = "--body-bytes-max 4096 --bodies-bytes-max 4096"
    async with engine(wait) as d, sidecar(d, flags=flags) as s, asyncio.TaskGroup() as group:
        for _ in range(3):
            assert (await s.call(b"{" * 3_000)).status == 400
        body = {**request(), "user": "u" * 3_000}
        running = group.create_task(s.call(body))
        await until(lambda: len(d.requests) == 1)
        answer = await s.call(body)
        assert (answer.status, answer.reason, answer.header(b"retry-after")) == (429, "saturated", b"1")
        is_free.set()
        assert (await running).status == 200
        await until(lambda: s.proxy.in_flight == 0)
        assert (await s.call(body)).status == 200
        assert await s.metric('refusals_total{reason="saturated"}') == 1


async def test_more_requests_than_may_be_served_are_refused_and_probes_are_not() -> None:
    is_free = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await is_free.wait()
        await speak(seen)

    async with engine(wait) as d, sidecar(d, flags="--live-max 1") as s, asyncio.TaskGroup() as group:
        running = group.create_task(s.call(request()))
        await until(lambda: len(d.requests) == 1)
        answer = await s.call(request())
        assert (answer.status, answer.reason, answer.header(b"retry-after")) == (429, "saturated", b"1")
        assert (await s.call(b"", method="GET", path="/livez")).status == 200
        is_free.set()
        assert (await running).status == 200
        await until(lambda: s.proxy.in_flight == 0)
        assert (await s.call(request())).status == 200


async def test_a_bad_plan_is_refused() -> None:
    async with engine(speak) as d, sidecar(d) as s:
        answer = await s.call(request(), (b"x-pdcoord-plan", b"{"))
        assert (answer.status, answer.reason) == (400, "invalid-field")


# Passing through.


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PATCH", "HEAD"])
async def test_other_paths_are_the_engines(method: str) -> None:
    async def echo(seen: Seen) -> None:
        if method == "HEAD":
            seen.write(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\nx-engine: 1\r\n\r\n")
        else:
            seen.answer(207, seen.raw, "x-engine: 1")

    async with engine(echo) as d, sidecar(d) as s:
        body = b"" if method in {"GET", "HEAD"} else b"any \xff bytes"
        answer = await s.call(body, method=method, path="/some/%2Fpath?a=1&b=%20")
        assert (answer.body, answer.header(b"x-engine")) == (body, b"1")
        assert (d.requests[0].method, d.requests[0].target) == (method, "/some/%2Fpath?a=1&b=%20")
        assert answer.header(b"x-pdcoord-served") is None
        assert answer.header(b"x-request-id") == d.requests[0].headers["x-request-id"].encode()


async def test_metrics_on_the_front_are_the_engines_and_backstage_ours() -> None:
    async with engine(always(200, b"vllm:x 1")) as d, sidecar(d) as s:
        assert (await s.call(b"", method="GET", path="/metrics")).body == b"vllm:x 1"
        assert await s.metric('requests_total{mode="pass-through",outcome="served"}') == 1
        for path, status in (("/livez", 200), ("/readyz", 200), ("/x", 404)):
            async with await s.client.request("GET", s.backstage, path, head_timeout_s=WAIT_S) as response:
                assert response.status == status


async def test_readiness_asks_the_engine() -> None:
    async with engine(speak) as d, sidecar(d) as s:
        for path in ("/health", "/readyz", "/livez"):
            assert (await s.call(b"", method="GET", path=path)).status == 200
        assert await s.metric("engine_ready") == 1
    async with sidecar(await dead_address()) as s:
        for path, status in (("/health", 503), ("/readyz", 503), ("/livez", 200)):
            assert (await s.call(b"", method="GET", path=path)).status == status


async def test_a_drain_refuses_what_is_new_and_lets_run_what_runs() -> None:
    is_free = asyncio.Event()

    async def wait(seen: Seen) -> None:
        await is_free.wait()
        await speak(seen)

    async with engine(wait) as d, sidecar(d) as s, asyncio.TaskGroup() as group:
        running = group.create_task(s.call(request()))
        await until(lambda: len(d.requests) == 1)
        s.proxy.begin_drain()
        assert (await s.call(b"", method="GET", path="/readyz")).status == 503
        answer = await s.call(request())
        assert (answer.status, answer.reason, answer.header(b"retry-after")) == (503, "draining", b"1")
        # What routers scrape must not say that the pod is there for them.
        assert (await s.call(b"", method="GET", path="/metrics")).status == 503
        assert not await s.proxy.wait_idle(0.05)
        is_free.set()
        assert (await running).status == 200
        assert await s.proxy.wait_idle(WAIT_S)


# What is told.


async def test_one_log_line_per_request_without_prompt_or_ticket() -> None:
    async with engine(give_ticket) as p, engine(speak) as d, sidecar(d, p) as s:
        with capture_logs() as lines:
            await s.call(request(stream=True), plan(p), (b"x-request-id", b"r-7"))
            await until(lambda: s.proxy.in_flight == 0)
        done = [line for line in lines if line["event"] == "request.done"]
        assert len(done) == 1
        assert (done[0]["id"], done[0]["mode"], done[0]["outcome"], done[0]["prefill"]) == (
            "r-7",
            "split",
            "served",
            p.address,
        )
        assert "secret" not in str(lines)
        assert "10.0.0.42" not in str(lines)


async def test_a_bug_of_ours_is_a_500_without_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("detail")

    async with engine(speak) as d, sidecar(d) as s:
        monkeypatch.setattr("sidecar.exchange.Opening.feed", fail)
        with capture_logs() as lines:
            answer = await s.call(request())
        assert (answer.status, answer.reason) == (500, "internal")
        assert b"detail" not in answer.body
        assert [line["log_level"] for line in lines if line["event"] == "request.failed"] == ["error"]
        assert await s.metric('requests_total{mode="colocated",outcome="error"}') == 1
