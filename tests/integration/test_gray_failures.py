"""Engines that pass for well and are not, behind a gateway process: real sockets, the real coordinator.

Each engine answers /metrics at once, whatever it does with calls; that is what makes its failure gray.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.core.fleet import EndpointId
from pdcoord.core.trouble import Phase
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings

pytestmark = pytest.mark.timeout(300)

WAIT_S = 40.0
"""Longest wait for a condition; the box may be busy."""
SERVED_S_MAX = 15.0
"""Longest that a call may take while another engine could serve it: far below any timeout of the relay's."""
TOKENS = 12
EVENT = (
    'data: {{"id":"c","object":"text_completion","created":1,"model":"org/model",'
    '"choices":[{{"index":0,"text":"{}","finish_reason":{}}}]}}\n\n'
)
CALL = {"model": "org/model", "prompt": "hi", "stream": True, "max_tokens": 64}


class Way(Enum):
    """How an engine serves."""

    WELL = "well"
    NEVER = "accepts and never answers"
    SLOWLY = "takes long to begin"
    CRAWLS = "one token, and the next in a minute"
    FAILS = "answers 500"


class Engine:
    """Serves as it is told to; `asked` counts the calls."""

    def __init__(self) -> None:
        self.way = Way.WELL
        self.asked = 0
        self.step_s = 0.0
        self.counts: Callable[[], tuple[int, int]] = lambda: (self.running, self.computed)
        self.running = 0
        self.computed = 0
        self.port = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        await until(lambda: not self.writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._serve_one(reader, writer)
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()
        self.writers.discard(writer)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if lines[0].split(" ")[1] == "/metrics":
            running, computed = self.counts()
            text = (
                f"vllm:num_requests_running {running}\nvllm:num_requests_waiting 0\n"
                f"vllm:kv_cache_usage_perc 0.1\n"
                f'vllm:prompt_tokens_by_source_total{{source="local_compute"}} {computed}\n'
            )
            answer(writer, text.encode(), content_type="text/plain")
            return
        self.asked += 1
        self.running += 1
        try:
            await self._answer(reader, writer, json.loads(body)["prompt"])
        finally:
            self.running -= 1

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: str) -> None:
        if self.way is Way.FAILS:
            answer(writer, b'{"error":{"message":"out of order"}}', status=500)
            return
        if self.way is Way.NEVER:
            await reader.read(1)
            raise ConnectionResetError
        if self.way is Way.SLOWLY:
            with suppress(TimeoutError):
                async with asyncio.timeout(3.0):
                    await reader.read(1)
                    raise ConnectionResetError
        self.computed += 2
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        # What is continued here goes on where it was.
        left = TOKENS - prompt.count("x ")
        events = [EVENT.format("x ", "null")] * left + [EVENT.format("", '"stop"'), "data: [DONE]\n\n"]
        for number, event in enumerate(events):
            if number and self.way is Way.CRAWLS:
                await reader.read(1)
                raise ConnectionResetError
            writer.write(b"%x\r\n%b\r\n" % (len(event), event.encode()))
            await writer.drain()
            await asyncio.sleep(self.step_s)
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def answer(
    writer: asyncio.StreamWriter, body: bytes, *, status: int = 200, content_type: str = "application/json"
) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.005)


class Gateway:
    """A gateway process with its engines."""

    def __init__(self, process: Process, engines: list[Engine]) -> None:
        self.process = process
        self.engines = engines
        handle = process.coordinator.handle

        def checked(event: Any, now_s: float) -> Any:
            actions = handle(event, now_s)
            process.coordinator.validate()
            return actions

        process.coordinator.handle = checked  # type: ignore[method-assign]

    async def call(self) -> tuple[int, bytes, float]:
        """Status, body and seconds of one call; the body of a stream that came to its end."""
        began_s = time.monotonic()
        raw = json.dumps(CALL).encode()
        async with connection(self.process.ports[0]) as (reader, writer):
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw))
            writer.write(raw)
            return *(await read_answer(reader)), time.monotonic() - began_s

    async def served(self, count: int = 1) -> None:
        """So many calls at once, each of which gets the whole answer, and soon enough."""
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(self.call()) for _ in range(count)]
        for each in calls:
            status, body, took_s = each.result()
            assert status == 200, body
            assert texts(body) == "x " * TOKENS, body
            assert took_s < SERVED_S_MAX

    async def get(self, path: str, port: int = 1) -> bytes:
        """A page of the admin listener, or of the other."""
        async with connection(self.process.ports[port]) as (reader, writer):
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            return (await read_answer(reader))[1]

    async def seen(self, index: int) -> dict[str, Any]:
        """What GET /fleet says of one engine."""
        endpoints: list[dict[str, Any]] = json.loads(await self.get("/fleet"))["endpoints"]
        return next(each for each in endpoints if each["id"] == f"both/d{index}")

    def phase(self, index: int) -> Phase | None:
        trouble = self.process.coordinator.progress.quarantine.trouble(EndpointId(f"both/d{index}"))
        return trouble.phase if trouble is not None else None

    async def serve_until(self, condition: Callable[[], bool], count: int = 2) -> None:
        """Serve calls until something is so."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self.served(count)


def texts(body: bytes) -> str:
    """The text of a stream's events, which has to end as one does."""
    events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert events[-1] == "[DONE]", events
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
    body = b""
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
    return int(lines[0].split(" ")[1]), body


@asynccontextmanager
async def gateway(folder: Path, count: int = 2, fallback: str = "{}") -> AsyncIterator[Gateway]:
    engines = [Engine() for _ in range(count)]
    for engine in engines:
        await engine.start()
    listed = ", ".join(f'{{name: d{i}, address: "127.0.0.1:{e.port}"}}' for i, e in enumerate(engines))
    path = folder / "policy.yaml"
    path.write_text(f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: org/model}}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{listed}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}}
slo: {{ttft_ms: 1000}}
fallback: {fallback}
""")
    lines = LogCapture()
    log = structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger("info")
    )
    settings = {"port": 0, "admin_port": 0, "scrape_interval_s": 0.05, "drain_s": 5.0}
    read = load_settings(policy=path, **settings)
    process = Process(read, GatewayFront(read), log)
    process.files.load_first()
    stop, started = asyncio.Event(), asyncio.Event()
    made = Gateway(process, engines)
    async with asyncio.timeout(4 * WAIT_S), asyncio.TaskGroup() as group:
        running = group.create_task(process.run(stop, started.set))
        try:
            await started.wait()
            fleet = process.coordinator.fleet
            await until(lambda: sum(state.is_eligible for state in fleet.states()) == count)
            yield made
            await until(lambda: process.coordinator.live_count == 0)
            assert process.coordinator.ledger.open_count == 0
        finally:
            stop.set()
            try:
                assert await running == 0
            finally:
                for engine in engines:
                    await engine.stop()


GRAY = [
    (Way.NEVER, "{}"),
    (Way.SLOWLY, "{}"),
    (Way.FAILS, "{}"),
    (Way.CRAWLS, "{resume: {stall_ms_min: 500}}"),
]


@pytest.mark.parametrize(("way", "fallback"), GRAY, ids=[way.name.lower() for way, _ in GRAY])
async def test_calls_are_served_by_others_and_the_engine_comes_back_when_it_is_mended(
    tmp_path: Path, way: Way, fallback: str
) -> None:
    async with gateway(tmp_path, fallback=fallback) as made:
        await made.served(2)
        bad = made.engines[0]
        bad.way = way
        await made.serve_until(lambda: made.phase(0) is Phase.OUT)
        seen = await made.seen(0)
        assert seen["health"] == "ready"
        assert seen["quarantine"]["phase"] in {Phase.OUT, Phase.READMITTING}
        assert made.phase(1) is not Phase.OUT
        await made.served(4)
        bad.way = Way.WELL
        await made.serve_until(lambda: made.phase(0) is Phase.READMITTING)
        await made.serve_until(lambda: made.phase(0) in {Phase.SUSPECTED, None}, count=8)
        asked = bad.asked
        # As many as make the other one the slower of the two, whatever was learned of this one meanwhile.
        await made.serve_until(lambda: bad.asked > asked, count=8)


async def test_the_only_engine_is_used_however_badly_it_serves(tmp_path: Path) -> None:
    async with gateway(tmp_path, count=1) as made:
        made.engines[0].way = Way.FAILS
        for _ in range(6):
            assert (await made.call())[0] == 500
        made.engines[0].way = Way.WELL
        await made.served()


async def test_where_all_others_are_gone_the_one_that_is_out_serves(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        made.engines[0].way = Way.FAILS
        await made.serve_until(lambda: made.phase(0) is Phase.OUT)
        made.engines[0].way = Way.WELL
        await made.engines[1].stop()
        await made.served()


async def test_without_a_share_for_it_there_is_no_second_attempt(tmp_path: Path) -> None:
    async with gateway(tmp_path, fallback="{hedge: {share_max: 0}}") as made:
        made.engines[0].way = Way.NEVER
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(made.call()) for _ in range(2)]
            await until(lambda: sum(engine.asked for engine in made.engines) == 2)
            await until(lambda: sum(each.done() for each in calls) == 1)
            # It is late by then, which is when a second attempt would have been made at last.
            await until(lambda: made.phase(0) is Phase.SUSPECTED)
            assert made.engines[1].asked == 1
            made.engines[0].way = Way.FAILS
            for writer in list(made.engines[0].writers):
                writer.transport.abort()
        assert [each.result()[0] for each in calls] == [200, 200]


@pytest.mark.parametrize(("doubt", "counts"), [("denies", (0, 0)), ("stale", (3, 77))])
async def test_metrics_that_the_account_contradicts_are_not_believed(
    tmp_path: Path, doubt: str, counts: tuple[int, int]
) -> None:
    async with gateway(tmp_path) as made:
        liar = made.engines[0]
        for engine in made.engines:
            engine.step_s = 0.1
        liar.counts = lambda: counts
        await made.serve_until(
            lambda: made.process.coordinator.doubt(EndpointId("both/d0")) == doubt, count=8
        )
        assert (await made.seen(0))["doubt"] == doubt
        assert (await made.seen(1))["doubt"] is None
        row = f'pdcoord_gateway_doubted_endpoints{{pool="both",reason="{doubt}"}} 1.0'
        assert row in (await made.get("/metrics", 0)).decode()
        liar.counts = lambda: (liar.running, liar.computed)
        await made.serve_until(lambda: made.process.coordinator.doubt(EndpointId("both/d0")) is None, count=8)
