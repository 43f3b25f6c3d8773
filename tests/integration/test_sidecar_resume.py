"""Streams that go on: sidecars on loopback between a client and servers that break off where told."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from structlog.testing import capture_logs

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PlanHeader, PlannedLoad, PrefillTarget, decode_plan, encode_plan
from pdcoord.resume.continuation import continue_stream
from pdcoord.wire import reading
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError
from pdcoord.wire.server import Listener, serve
from sidecar.guard import Allowlist
from sidecar.health import Health
from sidecar.observe import Metrics
from sidecar.process import make_proxy
from sidecar.proxy import Backstage, Proxy
from sidecar.settings import parse

WAIT_S = 10.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "Count:"
WORDS = [f" w{n}" for n in range(12)]
ANSWER = "".join(WORDS)
NOWHERE = HostPort("")
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STALL_MS = 400.0
KEEP_ALIVE = b": keep-alive\n\n"


# Engines.


@dataclass
class Seen:
    """One request as an engine got it."""

    target: str
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


@dataclass
class Engine:
    """Says ANSWER, a word a token, from where the prompt ends.

    Attributes:
        cut: bytes of its first stream's body after which it does as `how` says; None for a whole stream.
        how: reset, hang, error (an error event), abort (finish_reason abort), wait (until `gate` is set), end
            (the body ends there as a whole one does) or breathe (comments, until `gate` is set).
        pad: of each event.
        is_deaf: its chat template ends the answer that it is to continue.
        reasons: before it goes on with a chat.
    """

    tokenized: ClassVar[Callable[..., bytes]]
    """What /tokenize answers, as of the fixture of that name."""

    name: str
    cut: int | None = None
    how: str = "reset"
    pad: str = ""
    is_dead: bool = False
    is_deaf: bool = False
    reasons: bool = False
    address: HostPort = NOWHERE
    seen: list[Seen] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while not writer.is_closing():
                    await self.answer(await read_request(reader), reader, writer)
                    await writer.drain()
        finally:
            writer.close()

    async def answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_dead:
            writer.transport.abort()
        elif seen.target == "/health":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        elif seen.target == "/tokenize":
            count = self.tokenized(seen.body, is_deaf=self.is_deaf)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(count), count))
        elif not seen.body.get("stream"):
            self.seen.append(seen)
            await self.gate.wait()
            reason = "abort" if self.how == "abort" else "stop"
            raw = json.dumps({"choices": [{"text": 'a "finish_reason": "abort"', "finish_reason": reason}]})
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(raw) + raw[:9].encode())
            await asyncio.sleep(0)
            writer.write(raw[9:].encode())
        else:
            self.seen.append(seen)
            await self.stream(seen, reader, writer)

    async def stream(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = b"".join(events(self.name, seen, self.pad))
        if self.reasons:
            whole = whole.replace(b'{"content":', b'{"reasoning": "hm", "content":', 1)
        cut = self.cut if len(self.seen) == 1 else None
        if cut is not None and self.how not in {"reset", "hang", "end", "breathe"}:
            cut = whole.rfind(b"\n\n", 0, cut) + 2  # Behind a whole event.
        sent = whole[:cut]
        writer.write(SSE_HEAD + (b"%x\r\n%b\r\n" % (len(sent), sent) if sent else b""))
        await writer.drain()
        if cut is None:
            writer.write(b"0\r\n\r\n")
            return
        match self.how:
            case "reset":
                pass
            case "hang":
                await reader.read()
            case "end":
                writer.write(b"0\r\n\r\n")
                return
            case "wait" | "breathe":
                while self.how == "breathe" and not self.gate.is_set():
                    writer.write(b"%x\r\n%b\r\n" % (len(KEEP_ALIVE), KEEP_ALIVE))
                    await asyncio.sleep(STALL_MS / 1e4)
                    await writer.drain()
                await self.gate.wait()
                rest = whole[cut:]
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
                return
            case "error" | "abort":
                said: dict[str, object] = {"error": {"message": "EngineCore died", "code": 500}}
                if self.how == "abort":
                    said = {"id": "x", "choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}
                event = b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(said).encode()
                writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
                return
            case how:
                raise AssertionError(how)
        writer.transport.abort()


@pytest.fixture(autouse=True)
def engines_tokenize(tokenized: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "tokenized", staticmethod(tokenized), raising=False)


def events(name: str, seen: Seen, pad: str = "") -> list[bytes]:
    """The answer to one call, as vLLM words it."""
    body, is_chat = seen.body, seen.target == CHAT
    if is_chat:
        last = body["messages"][-1]
        said = last["content"] if last["role"] == "assistant" else ""
    else:
        said = body["prompt"].removeprefix(PROMPT)
    done = len(said.split())
    limit = body.get("max_tokens")
    words = WORDS[done:][:limit]
    told: list[dict[str, Any]] = []
    if is_chat:
        told += [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        told += [{"delta": {"content": word}, "finish_reason": None} for word in words]
        told += [{"delta": {}, "finish_reason": "stop"}]
    else:
        told += [{"text": word, "finish_reason": None} for word in words]
        told[-1]["finish_reason"] = "length" if limit is not None and len(words) == limit else "stop"
    head = {"id": f"{name}-{len(seen.raw)}", "created": 1, "model": "m"} | ({"pad": pad} if pad else {})
    chunks = [head | {"choices": [{"index": 0, **choice}]} for choice in told]
    if body.get("stream_options", {}).get("include_usage"):
        prompt = 1 + done
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": len(words),
            "total_tokens": prompt + len(words),
        }
        chunks.append(head | {"choices": [], "usage": usage})
    return [b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks] + [b"data: [DONE]\n\n"]


async def read_request(reader: asyncio.StreamReader) -> Seen:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    _, target, _ = head[0].split(" ")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    return Seen(target, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


@contextlib.asynccontextmanager
async def playing(engine: Engine) -> AsyncIterator[Engine]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    engine.address = HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield engine
    finally:
        server.close()


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_true():  # what is waited for has no event of its own
            await asyncio.sleep(0.005)


# Sidecars and their client.


@dataclass
class Answer:
    """What a client got.

    Attributes:
        is_whole: the response came to its end.
    """

    status: int
    body: bytes
    is_whole: bool

    @property
    def chunks(self) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n")]
        return [json.loads(line) for line in lines if line and line[0] != ":" and line != "[DONE]"]

    @property
    def text(self) -> str:
        said = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in said)

    @property
    def finish_reasons(self) -> list[str]:
        said = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return [choice["finish_reason"] for choice in said if choice.get("finish_reason")]

    @property
    def error(self) -> Any:
        """Of the error event that ends it."""
        return self.chunks[-1]["error"]


@dataclass
class Running:
    """A sidecar that serves, and a client of it."""

    address: HostPort
    backstage: HostPort
    proxy: Proxy
    client: Client

    async def call(
        self, body: object, plan: PlanHeader, path: str = COMPLETIONS, began: asyncio.Event | None = None
    ) -> Answer:
        """The whole answer to `body`; `began` is set when its first bytes are there."""
        headers = [(b"content-type", b"application/json"), (b"x-pdcoord-plan", encode_plan(plan))]
        raw = json.dumps(body).encode()
        parts: list[bytes] = []
        async with await self.client.request(
            "POST", self.address, path, headers=headers, body=raw, head_timeout_s=WAIT_S
        ) as response:
            try:
                while part := await response.read_chunk(idle_timeout_s=WAIT_S):
                    parts.append(part)
                    if began is not None:
                        began.set()
            except StreamError:
                return Answer(response.status, b"".join(parts), is_whole=False)
            return Answer(response.status, b"".join(parts), is_whole=True)

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
async def sidecar(engine: Engine, allow: str = "", flags: str = "") -> AsyncIterator[Running]:
    settings = parse([*flags.split(), "--engine", engine.address, "--allow", allow], {})
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


@dataclass
class Pair:
    """A sidecar whose engine fails, and one beside a good engine at which its streams may go on."""

    here: Running
    there: Running
    bad: Engine
    good: Engine

    def plan(self, **more: Any) -> PlanHeader:
        given = {"resumes": (self.there.address,), "resume_tries_max": 2, "resume_stall_ms": STALL_MS}
        return PlanHeader(**{**given, **more})


@contextlib.asynccontextmanager
async def pair(bad: Engine | None = None, flags: str = "") -> AsyncIterator[Pair]:
    async with (
        playing(bad or Engine("bad", cut=150)) as first,
        playing(Engine("good")) as second,
        sidecar(second) as there,
        sidecar(first, f"{there.address}/decode", flags) as here,
    ):
        yield Pair(here, there, first, second)


def asked(**more: object) -> dict[str, object]:
    return {"model": "m", "prompt": PROMPT, "stream": True, **more}


def chat(**more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "stream": True, **more}


def whole_length(body: dict[str, object], path: str) -> int:
    return len(b"".join(events("bad", Seen(path, {}, json.dumps(body).encode()))))


def has_finished(body: dict[str, object], path: str, cut: int) -> bool:
    """Whether a stream that is cut there has told why it ended."""
    whole = b"".join(events("bad", Seen(path, {}, json.dumps(body).encode())))
    told = whole[: whole.rfind(b"\n\n", 0, cut) + 2]
    return b'"stop"' in told or b'"length"' in told


def check_one_stream(answer: Answer, text: str = ANSWER) -> None:
    """One stream with one id, every word once, one end."""
    assert (answer.status, answer.is_whole) == (200, True)
    assert answer.text == text
    assert len({chunk["id"] for chunk in answer.chunks}) == 1
    assert len(answer.finish_reasons) == 1
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.body.count(b"[DONE]") == 1


# Wherever it breaks off.


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, asked()),
        (COMPLETIONS, asked(max_tokens=9, stream_options={"include_usage": True})),
        (CHAT, chat(stream_options={"include_usage": True})),
    ],
)
async def test_whatever_byte_a_stream_breaks_off_at_the_client_sees_one_stream(
    path: str, body: dict[str, object]
) -> None:
    length = whole_length(body, path)
    async with pair() as p:
        for cut in range(1, length, 7):
            p.bad.seen.clear()
            p.bad.cut = cut
            answer = await p.here.call(body, p.plan(), path)
            assert answer.is_whole, (cut, answer.body[-300:])
            check_one_stream(answer, "".join(WORDS[: 9 if "max_tokens" in body else 12]))
            usages = [chunk["usage"] for chunk in answer.chunks if chunk.get("usage")]
            # If the engine said why it ended but not its usage, the prompt's tokens are nowhere to be had.
            if "stream_options" in body and (usages or not has_finished(body, path, cut)):
                tokens = len(answer.text.split())
                assert usages == [
                    {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
                ], cut
            if path == CHAT:
                assert answer.body.count(b'"role"') == 1, cut


@pytest.mark.parametrize("how", ["reset", "hang", "error", "abort", "end"])
async def test_however_an_engine_gives_up_the_stream_goes_on(how: str) -> None:
    async with pair(Engine("bad", cut=400, how=how)) as p:
        with capture_logs() as logs:
            check_one_stream(await p.here.call(asked(), p.plan()))
            reason = "decode-stalled" if how == "hang" else "decode-error"
            assert await p.here.metric(f'resumes_total{{outcome="ok",reason="{reason}"}}') == 1
        assert await p.here.metric(f'rungs_total{{reason="{reason}",rung="resume"}}') == 1
        assert await p.here.metric("resume_gap_seconds_count") == 1
        assert await p.here.metric('requests_total{mode="colocated",outcome="served"}') == 1
        assert await p.here.metric("resume_bytes") == 0
        (line,) = [each for each in logs if each["event"] == "request.done" and "resumes" in each]
        assert (line["resumes"], len(line["resume_gaps_ms"])) == ([f"{reason} ok"], 1)
        (sent,) = p.good.seen
        assert "x-pdcoord-plan" not in sent.headers


async def test_an_engine_that_only_breathes_is_left_when_a_prompt_would_have_been_computed() -> None:
    async with pair(Engine("bad", cut=0, how="breathe")) as p:
        answer = await p.here.call(asked(), p.plan(prefill_deadline_ms=STALL_MS))
        check_one_stream(answer)
        assert answer.body.startswith(KEEP_ALIVE)
        assert await p.here.metric('resumes_total{outcome="ok",reason="decode-stalled"}') == 1


async def test_a_prompt_that_takes_longer_than_a_stall_is_waited_for() -> None:
    async with pair(Engine("bad", cut=0, how="breathe")) as p, asyncio.TaskGroup() as group:
        call = group.create_task(p.here.call(asked(), p.plan()))
        await until(lambda: bool(p.bad.seen))
        end_s = time.monotonic() + 3 * STALL_MS / 1e3
        await until(lambda: time.monotonic() > end_s)
        p.bad.gate.set()
        check_one_stream(await call)
        assert p.good.seen == []


async def test_a_client_that_does_not_read_is_no_engine_that_stalls() -> None:
    async with pair(Engine("bad", pad="p" * 600_000)) as p:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.setblocking(False)
        host, port = p.here.address.split(":")
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=client, limit=1 << 16)
        raw = json.dumps(asked()).encode()
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % COMPLETIONS.encode())
        writer.write(b"x-pdcoord-plan: %b\r\ncontent-length: %d\r\n\r\n" % (encode_plan(p.plan()), len(raw)))
        writer.write(raw)
        await until(lambda: bool(p.here.proxy._live))
        (exchange,) = p.here.proxy._live  # it has no other face
        await until(lambda: exchange._out.is_held_up and not exchange.handoff.is_output_due)
        first_s = exchange.handoff.deadline_s
        assert first_s is not None
        await until(lambda: (exchange.handoff.deadline_s or 0.0) > first_s + 2 * STALL_MS / 1e3)
        body = b""
        async with asyncio.timeout(WAIT_S):
            while part := await reader.read(1 << 20):
                body += part
        writer.close()
        assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert [body.count(b'" w%d"' % n) for n in range(len(WORDS))] == [1] * len(WORDS)
        assert (len(p.bad.seen), p.good.seen) == (1, [])
        assert exchange.handoff.rungs == []


async def test_what_goes_on_elsewhere_names_the_kv_s_prefill_pod_and_is_resumed_here() -> None:
    load = PlannedLoad(replica="r1", model="m", prompt_tokens=9)
    async with pair() as p, playing(Engine("seen")) as bare:
        allowed = f"{bare.address}/decode"
        async with sidecar(p.bad, allowed) as here:
            given = p.plan(resumes=(bare.address,), load=load)
            check_one_stream(await here.call(asked(), given))
        plan = decode_plan(bare.seen[0].headers["x-pdcoord-plan"].encode())
        assert plan.is_resumed_above
        assert (plan.resume_tries_max, plan.prefills, plan.is_colocated_allowed) == (0, (), True)
        assert plan.load == PlannedLoad(model="m", prompt_tokens=9)
        assert bare.seen[0].body["prompt"].startswith(PROMPT + WORDS[0])


async def test_a_second_break_goes_on_from_all_that_the_client_has() -> None:
    async with pair() as p, playing(Engine("worse", cut=300)) as worse, sidecar(worse) as second:
        allowed = f"{second.address}/decode,{p.there.address}/decode"
        async with sidecar(p.bad, allowed) as here:
            given = p.plan(resumes=(second.address, p.there.address))
            check_one_stream(await here.call(asked(), given))
            assert await here.metric('resumes_total{outcome="decode-error",reason="decode-error"}') == 1
            assert await here.metric('resumes_total{outcome="ok",reason="decode-error"}') == 1
        assert await second.metric('requests_total{mode="colocated",outcome="handed-back"}') == 1


async def test_an_engine_that_is_back_goes_on_with_its_own_stream() -> None:
    async with playing(Engine("bad", cut=400)) as bad, sidecar(bad) as here:
        answer = await here.call(asked(), PlanHeader(resume_tries_max=1))
        check_one_stream(answer)
        assert len(bad.seen) == 2


async def test_a_continuation_that_diverges_is_left_for_the_next_and_called_so() -> None:
    async with pair(Engine("bad", cut=450)) as p:
        p.good.reasons = True
        check_one_stream(await p.here.call(chat(), p.plan(), CHAT))
        assert await p.here.metric('resumes_total{outcome="decode-diverged",reason="decode-error"}') == 1
        assert await p.here.metric('resumes_total{outcome="ok",reason="decode-diverged"}') == 1
        assert len(p.bad.seen) == 2


async def test_streams_are_read_one_at_a_time_and_not_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[int] = []

    def noted(*given: Any, **more: Any) -> Any:
        threads.append(threading.get_ident())
        return continue_stream(*given, **more)

    monkeypatch.setattr(reading, "continue_stream", noted)
    async with pair() as p:
        check_one_stream(await p.here.call(asked(max_tokens=12), p.plan()))
    assert len(threads) == 2, "once more when its tokens have been counted"
    assert threading.get_ident() not in threads


# What is not continued.


async def test_a_chat_whose_template_ends_the_partial_answer_is_not_continued_from_text() -> None:
    async with pair(Engine("bad", cut=450)) as p:
        p.good.is_deaf = True
        answer = await p.here.call(chat(), p.plan(), CHAT)
        assert "template" in answer.error["message"]
        assert await p.here.metric('unresumed_total{why="template"}') == 1
        assert p.good.seen == []


async def test_without_leave_nobody_is_dialled() -> None:
    async with playing(Engine("bad", cut=400)) as bad, pair() as p, sidecar(bad) as here:
        bad.how = "reset"
        given = PlanHeader(resumes=(p.there.address,), resume_tries_max=1)
        check_one_stream(await here.call(asked(), given))  # The own engine has gone on.
        assert await here.metric('rungs_total{reason="target-not-allowed",rung="resume"}') == 1
        assert p.good.seen == []


async def test_what_cannot_be_continued_ends_with_an_error_event_that_says_why() -> None:
    async with pair() as p:
        answer = await p.here.call(asked(presence_penalty=0.5), p.plan())
        assert not answer.is_whole
        assert answer.error["code"] == "stream-lost"
        assert "penalties" in answer.error["message"]
        assert ANSWER.startswith("".join(chunk["choices"][0]["text"] for chunk in answer.chunks[:-1]))
        assert await p.here.metric('unresumed_total{why="penalties"}') == 1
        assert await p.here.metric('requests_total{mode="colocated",outcome="broken-off"}') == 1
        assert p.good.seen == []


async def test_a_stream_that_ends_in_its_middle_and_cannot_be_continued_is_not_passed_for_whole() -> None:
    async with pair(Engine("bad", cut=400, how="end")) as p:
        answer = await p.here.call(asked(presence_penalty=0.5), p.plan())
        assert not answer.is_whole
        assert answer.error["code"] == "stream-lost"
        assert "penalties" in answer.error["message"]


async def test_a_stream_that_found_no_room_is_passed_on_and_cannot_be_continued() -> None:
    async with pair(flags="--resume-bytes-max 100") as p:
        p.bad.cut = None
        check_one_stream(await p.here.call(asked(), p.plan()))
        p.bad.seen.clear()
        p.bad.cut = len(events("bad", Seen(COMPLETIONS, {}, json.dumps(asked()).encode()))[0]) * 2
        answer = await p.here.call(asked(), p.plan())
        assert "tape-full" in answer.error["message"]


async def test_whoever_resumes_above_gets_no_word_and_nothing_is_kept() -> None:
    async with pair(Engine("bad", cut=400, how="wait")) as p:
        given = PlanHeader(is_resumed_above=True, resumes=(p.there.address,), resume_tries_max=2)
        async with asyncio.TaskGroup() as group:
            began = asyncio.Event()
            call = group.create_task(p.here.call(asked(), given, began=began))
            await until(began.is_set)
            assert await shelf_bytes(p.here) == 0
            p.bad.gate.set()
        check_one_stream(call.result())
        p.bad.seen.clear()
        p.bad.how = "reset"
        answer = await p.here.call(asked(), given)
        assert not answer.is_whole
        assert b"error" not in answer.body
        assert await p.here.metric('requests_total{mode="colocated",outcome="handed-back"}') == 1
        assert p.good.seen == []


async def shelf_bytes(running: Running) -> int:
    return running.proxy._tools.shelf.bytes_held  # what is held has no other face


async def test_a_client_that_leaves_ends_the_continuation_too() -> None:
    async with pair() as p:
        p.good.cut, p.good.how = 200, "hang"
        headers = [(b"x-pdcoord-plan", encode_plan(p.plan(resume_stall_ms=60_000.0)))]
        response = await p.here.client.request(
            "POST",
            p.here.address,
            COMPLETIONS,
            headers=headers,
            body=json.dumps(asked()).encode(),
            head_timeout_s=WAIT_S,
        )
        async with response:
            await until(lambda: bool(p.good.seen))
        assert await p.here.metric('requests_total{mode="colocated",outcome="client-left"}') == 1
        assert await p.there.metric('requests_total{mode="colocated",outcome="client-left"}') == 1
        assert await shelf_bytes(p.here) == 0


# The process ends.


async def test_what_has_not_begun_is_refused_and_what_is_resumed_above_ends_without_a_word() -> None:
    async with pair(Engine("bad", cut=400, how="wait")) as p, asyncio.TaskGroup() as group:
        began = asyncio.Event()
        above = group.create_task(p.here.call(asked(), PlanHeader(is_resumed_above=True), began=began))
        await until(began.is_set)
        waiting = group.create_task(p.here.call({**asked(), "stream": False}, PlanHeader()))
        await until(lambda: len(p.bad.seen) == 2)
        p.here.proxy.begin_drain()
        p.here.proxy.end_grace(is_over=False)
        refused = await waiting
        assert (refused.status, json.loads(refused.body)["error"]["code"]) == (503, "draining")
        answer = await above
        assert not answer.is_whole
        assert b"error" not in answer.body


async def test_what_nobody_goes_on_with_runs_to_the_last_moment_and_ends_with_a_word() -> None:
    async with pair(Engine("bad", cut=400, how="wait")) as p, asyncio.TaskGroup() as group:
        began = asyncio.Event()
        call = group.create_task(p.here.call(asked(), PlanHeader(), began=began))
        await until(began.is_set)
        p.here.proxy.begin_drain()
        p.here.proxy.end_grace(is_over=False)
        p.here.proxy.end_grace(is_over=True)
        answer = await call
        assert not answer.is_whole
        assert answer.error["code"] == "draining"


@pytest.mark.parametrize(("how", "status"), [("abort", 502), ("reset", 200)])
async def test_an_answer_that_its_engine_gave_up_is_no_answer(how: str, status: int) -> None:
    """An engine that shuts down answers 200 with what there was; whoever asked is to ask elsewhere."""
    async with playing(Engine("bad", how=how)) as bad, sidecar(bad) as here:
        bad.gate.set()
        answer = await here.call({**asked(), "stream": False}, PlanHeader())
        assert (answer.status, answer.is_whole) == (status, True)
        if status != 200:
            assert json.loads(answer.body)["error"]["code"] == "upstream-failed"


# With a prefill pod.


async def test_a_split_stream_goes_on_with_the_prefill_pod_that_it_began_with() -> None:
    async def prefill(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                await read_request(reader)
                raw = b'{"id": "x", "kv_transfer_params": {"do_remote_prefill": true}}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(raw), raw))
        writer.close()

    server = await asyncio.start_server(prefill, "127.0.0.1", 0)
    target = PrefillTarget(address=HostPort(f"127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        async with (
            playing(Engine("bad", cut=400)) as bad,
            playing(Engine("good")) as good,
            sidecar(good, target.address) as there,
            sidecar(bad, f"{target.address},{there.address}/decode") as here,
        ):
            given = PlanHeader(prefills=(target,), resumes=(there.address,), resume_tries_max=1)
            check_one_stream(await here.call(asked(), given))
            assert await there.metric('requests_total{mode="split",outcome="served"}') == 1
            assert "kv_transfer_params" in good.seen[0].body
    finally:
        server.close()
