"""Streams that break off behind a real gateway: raw engines cut them where told, clients read one stream."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.core.events import Event
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client

WAIT_S = 20.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "Count:"
WORDS = [f" w{n}" for n in range(10)]
METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.1\n"
KEEP_ALIVE = b": keep-alive\n\n"
PROMPT_TOKENS = 3


@dataclass
class Script:
    """How the first engine that gets a request breaks its stream off; all engines share it.

    Attributes:
        cut: bytes of the stream's body after which it does; None for a whole stream.
        is_deaf: the chat template ends the answer that it is to continue.
        how: reset; end (the body ends well); hang; breathe (comments and nothing else); error (an event).
        seen: requests by their id, in order: path and body.
        questions: bodies of what /tokenize was asked, in order.
    """

    cut: int | None = None
    how: str = "reset"
    seen: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    questions: list[dict[str, Any]] = field(default_factory=list)
    open_streams: int = 0
    is_deaf: bool = False


class Engine:
    """Says WORDS, one a token, from where the prompt ends."""

    tokenized: ClassVar[Callable[..., bytes]]
    """What /tokenize answers, as of the fixture of that name."""

    def __init__(self, name: str, script: Script) -> None:
        self.name = name
        self.script = script
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await until(lambda: not self._writers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._serve_one(reader, writer)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        target = lines[0].split(" ")[1]
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        if target == "/metrics":
            _answer(writer, METRICS, "text/plain")
        elif target == "/tokenize":
            self.script.questions.append(json.loads(body))
            _answer(writer, self.tokenized(json.loads(body), is_deaf=self.script.is_deaf))
        else:
            seen = self.script.seen.setdefault(headers["x-request-id"], [])
            seen.append((target, json.loads(body)))
            await self._stream(target, json.loads(body), reader, writer, is_first=len(seen) == 1)
        await writer.drain()

    async def _stream(
        self,
        target: str,
        asked: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_first: bool,
    ) -> None:
        script = self.script
        whole = b"".join(events_of(self.name, target, asked))
        cut = script.cut if is_first else None
        script.open_streams += 1
        try:
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for at in range(0, len(whole[:cut]), 150):
                _chunk(writer, whole[:cut][at : at + 150])
                await writer.drain()
            if cut is None or script.how == "end":
                writer.write(b"0\r\n\r\n")
                return
            await self._break(script.how, reader, writer)
        finally:
            script.open_streams -= 1

    async def _break(self, how: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if how == "error":
            _chunk(
                writer, b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\ndata: [DONE]\n\n'
            )
            writer.write(b"0\r\n\r\n")
        elif how in {"hang", "breathe"}:
            while not reader.at_eof():
                if how == "breathe":
                    _chunk(writer, KEEP_ALIVE)
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await reader.read(1)
            raise ConnectionError
        else:
            # What was written reaches the gateway before the end of the connection does: FIN, not RST.
            writer.close()
            raise ConnectionError


def events_of(engine: str, target: str, asked: dict[str, Any]) -> list[bytes]:
    """The stream of an undisturbed engine, whose prompt may have the beginning of the answer."""
    is_chat = target in {CHAT, "/v1/messages"}
    has_ids = bool(asked.get("return_token_ids"))
    done = _done(asked, is_chat=is_chat)
    limit = asked.get("max_tokens") or len(WORDS)
    tokens = list(range(done, min(len(WORDS), done + limit)))
    head: dict[str, Any] = {"id": f"x-{engine}", "created": ord(engine), "model": "org/model"}
    head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    chunks: list[dict[str, Any]] = []
    if is_chat:
        chunks.append({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    for token in tokens:
        finish = None
        if token == tokens[-1]:
            finish = "stop" if token == len(WORDS) - 1 else "length"
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice |= {"delta": {"content": WORDS[token]}} if is_chat else {"text": WORDS[token]}
        chunks.append(choice | ({"token_ids": [100 + token]} if has_ids else {}))
    said = [{**head, "choices": [choice]} for choice in chunks]
    if (asked.get("stream_options") or {}).get("include_usage"):
        prompt = PROMPT_TOKENS + done
        usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens)}
        said.append({**head, "choices": [], "usage": {**usage, "total_tokens": prompt + len(tokens)}})
    return [*(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in said), b"data: [DONE]\n\n"]


@pytest.fixture(autouse=True)
def engines_tokenize(tokenized: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "tokenized", staticmethod(tokenized), raising=False)


def _done(asked: dict[str, Any], *, is_chat: bool) -> int:
    """Words of the answer that are in the prompt already; anything but a beginning of it is a mistake."""
    if is_chat:
        last = asked["messages"][-1]
        text = last["content"] if last["role"] == "assistant" else ""
    elif isinstance(asked["prompt"], list):
        ids = asked["prompt"][PROMPT_TOKENS:]
        assert ids == list(range(100, 100 + len(ids)))
        return len(ids)
    else:
        text = asked["prompt"].removeprefix(PROMPT)
    count = len(text.split())
    assert text == "".join(WORDS[:count]), f"not a beginning of the answer: {text!r}"
    return count


def _answer(writer: asyncio.StreamWriter, body: bytes, kind: str = "application/json") -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@dataclass
class Answer:
    """What a client read of a stream."""

    status: int
    body: bytes = b""
    is_complete: bool = False

    @property
    def chunks(self) -> list[dict[str, Any]]:
        data = [line.removeprefix(b"data: ") for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        assert data[-1] == b"[DONE]", data[-1]
        return [json.loads(each) for each in data[:-1]]

    @property
    def text(self) -> str:
        choices = [chunk["choices"][0] for chunk in self.chunks if chunk["choices"]]
        return "".join(
            each["delta"].get("content") or "" if "delta" in each else each["text"] for each in choices
        )


class Gateway:
    """A running gateway process, and what its core heard."""

    def __init__(self, process: Process, lines: LogCapture) -> None:
        self.process = process
        self.lines = lines
        self.events: list[Event] = []
        handle = process.coordinator.handle

        def recording(event: Event, now_s: float) -> Any:
            self.events.append(event)
            actions = handle(event, now_s)
            process.coordinator.validate()
            return actions

        process.coordinator.handle = recording  # type: ignore[method-assign]

    @asynccontextmanager
    async def asking(
        self, path: str, body: dict[str, Any], request_id: str
    ) -> AsyncIterator[asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.process.ports[0])
        try:
            raw = json.dumps(body).encode()
            head = [f"POST {path} HTTP/1.1", "host: g", f"x-request-id: {request_id}"]
            head.append(f"content-length: {len(raw)}")
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + raw)
            yield reader
        finally:
            writer.transport.abort()

    async def call(self, path: str, body: dict[str, Any], request_id: str = "r") -> Answer:
        async with asyncio.timeout(WAIT_S), self.asking(path, body, request_id) as reader:
            head = await reader.readuntil(b"\r\n\r\n")
            answer = Answer(int(head.split(b" ")[1]))
            with suppress(asyncio.IncompleteReadError):
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    answer.body += (await reader.readexactly(size + 2))[:-2]
                answer.is_complete = True
        return answer

    async def settle(self) -> None:
        """Until nothing is in flight; then every account must be even, and each call has ended once."""
        coordinator = self.process.coordinator
        await until(lambda: coordinator.live_count == 0)
        assert coordinator.ledger.open_count == 0
        ended = Counter(getattr(e, "id", None) for e in self.events if type(e).__name__ == "RequestEnded")
        assert set(ended.values()) <= {1}

    def told(self, request_id: str) -> list[str]:
        """Kinds of events of a request, behind its arrival."""
        return [type(event).__name__ for event in self.events if getattr(event, "id", None) == request_id]

    async def metrics(self) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.process.ports[0])
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.transport.abort()
        return text

    async def decision(self, request_id: str) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.process.ports[1])
        writer.write(f"GET /decisions/{request_id} HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n".encode())
        found: dict[str, Any] = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        writer.transport.abort()
        return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.005)


def policy_of(engines: list[Engine], fallback: str) -> str:
    listed = ", ".join(f'{{name: {e.name}, address: "127.0.0.1:{e.port}"}}' for e in engines)
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: org/model, aliases: [alias], adapters: [sql]}}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{listed}]
    speed: {{prefill_base_ms: 1, prefill_ms_per_token: 0.1, step_base_ms: 1}}
fallback: {{{fallback}}}
"""


@asynccontextmanager
async def gateway(
    folder: Path,
    script: Script,
    *,
    engine_count: int = 3,
    fallback: str = "",
    through: Callable[[Engine], Awaitable[int]] | None = None,
) -> AsyncIterator[Gateway]:
    """A gateway before its engines.

    Args:
        through: starts what stands before an engine, and gives its port.
    """
    engines = [Engine(chr(ord("a") + index), script) for index in range(engine_count)]
    for engine in engines:
        await engine.start()
        if through is not None:
            engine.port = await through(engine)
    path = folder / "policy.yaml"
    path.write_text(policy_of(engines, fallback))
    lines = LogCapture()
    log = structlog.wrap_logger(
        None, processors=[lines], wrapper_class=structlog.make_filtering_bound_logger("info")
    )
    # Client, gateway and engines share one loop here: a busy moment must not make engines unreachable.
    settings = load_settings(
        policy=path, port=0, admin_port=0, scrape_interval_s=0.05, scrape_deadline_s=20.0, drain_s=5.0
    )
    process = Process(settings, GatewayFront(settings), log)
    process.files.load_first()
    stop, started = asyncio.Event(), asyncio.Event()
    made = Gateway(process, lines)
    async with asyncio.timeout(90.0), asyncio.TaskGroup() as group:
        running = group.create_task(process.run(stop, started.set))
        try:
            await started.wait()
            fleet = process.coordinator.fleet
            await until(lambda: sum(s.is_eligible for s in fleet.states()) == engine_count)
            yield made
        finally:
            stop.set()
            try:
                assert await running == 0
            finally:
                for engine in engines:
                    await engine.stop()


IDS = (COMPLETIONS, {"prompt": [1, 2, 3], "return_token_ids": True})
TEXT = (COMPLETIONS, {"prompt": PROMPT})
TURNS = (CHAT, {"messages": [{"role": "user", "content": PROMPT}]})
ASKED = {"model": "org/model", "stream": True, "max_tokens": len(WORDS), "temperature": 0}


def asked_of(kind: tuple[str, dict[str, Any]], **changes: object) -> tuple[str, dict[str, Any]]:
    return kind[0], {**ASKED, **kind[1], **changes}


@pytest.mark.parametrize("kind", [IDS, TEXT, TURNS], ids=["ids", "text", "chat"])
async def test_wherever_a_stream_is_cut_the_client_reads_one(
    tmp_path: Path, kind: tuple[str, dict[str, Any]]
) -> None:
    """A token lost, doubled or out of place, a second id, another usage: any would show."""
    path, asked = asked_of(kind, stream_options={"include_usage": True})
    script = Script()
    async with gateway(tmp_path, script) as made:
        undisturbed = await made.call(path, asked, "whole")
        length = len(undisturbed.body)
        cuts = sorted({*range(1, length, 67), length - 20, length - 14, length - 1})
        for cut in cuts:
            script.cut = cut
            answer = await made.call(path, asked, f"cut-{cut}")
            assert answer.is_complete, (cut, answer.body[-400:])
            assert answer.text == undisturbed.text == "".join(WORDS), cut
            assert len({chunk["id"] for chunk in answer.chunks}) == 1, cut
            assert len({chunk["created"] for chunk in answer.chunks}) == 1, cut
            assert answer.body.count(b"[DONE]") == 1
            finishes = [c["finish_reason"] for chunk in answer.chunks for c in chunk["choices"]]
            assert [each for each in finishes if each] == ["stop"], cut
            usage = answer.chunks[-1].get("usage")
            # Where an engine dies between its last token and its usage, a text's prompt was never counted.
            is_untold = kind is not IDS and cut >= undisturbed.body.index(b'"choices": []') - 200
            assert usage == undisturbed.chunks[-1]["usage"] or (is_untold and usage is None), cut
        await made.settle()
        outputs = {e.output_tokens for e in made.events if type(e).__name__ == "RequestEnded"}  # type: ignore[union-attr]
        assert outputs == {len(WORDS)}
    assert script.open_streams == 0


@pytest.mark.parametrize("kind", [TEXT, TURNS], ids=["text", "chat"])
@pytest.mark.parametrize(("name", "sent"), [("sql", "sql"), ("alias", "org/model")])
async def test_a_continued_stream_is_asked_of_the_same_adapter(
    tmp_path: Path, kind: tuple[str, dict[str, Any]], name: str, sent: str
) -> None:
    """And so is what its tokens are: a chat template or added tokens may be the adapter's own."""
    path, asked = asked_of(kind, model=name)
    script = Script(cut=len(b"".join(events_of("a", path, asked)[:5])))
    async with gateway(tmp_path, script) as made:
        answer = await made.call(path, asked)
        assert answer.text == "".join(WORDS)
        await made.settle()
    bodies = [body for _, body in script.seen["r"]]
    assert [body["model"] for body in bodies] == [sent, sent]
    assert bodies[0] != bodies[1]
    assert {question["model"] for question in script.questions} == {sent}


async def test_a_clean_end_in_the_middle_is_told_of_where_nobody_can_go_on(tmp_path: Path) -> None:
    path, asked = asked_of(TEXT, guided_regex="( w[0-9])+")
    script = Script(how="end", cut=len(b"".join(events_of("a", path, asked)[:4])))
    async with gateway(tmp_path, script) as made:
        answer = await made.call(path, asked)
        assert not answer.is_complete
        assert b"stream-lost" in answer.body
        await made.settle()


@pytest.mark.parametrize("how", ["end", "error"])
async def test_an_engine_that_ends_its_stream_itself_is_replaced_too(tmp_path: Path, how: str) -> None:
    path, asked = asked_of(TEXT)
    script = Script(how=how)
    events = events_of("a", path, asked)
    async with gateway(tmp_path, script) as made:
        for whole_events in (1, 4, 9):
            script.cut = len(b"".join(events[:whole_events]))
            answer = await made.call(path, asked, f"{how}-{whole_events}")
            assert (answer.text, answer.is_complete) == ("".join(WORDS), True)
        await made.settle()


@pytest.mark.parametrize("how", ["hang", "breathe"])
async def test_a_stream_that_stands_still_moves_though_its_engine_gives_signs_of_life(
    tmp_path: Path, how: str
) -> None:
    path, asked = asked_of(IDS)
    script = Script(how=how, cut=len(b"".join(events_of("a", path, asked)[:4])))
    async with gateway(tmp_path, script, fallback="resume: {stall_ms_min: 300}") as made:
        answer = await made.call(path, asked)
        assert answer.body.replace(KEEP_ALIVE, b"").count(b"data: ") == len(WORDS) + 1
        assert (answer.text, answer.is_complete) == ("".join(WORDS), True)
        await made.settle()
        (broke,) = [event for event in made.events if type(event).__name__ == "StreamBroke"]
        assert (broke.reason, broke.output_tokens) == ("decode-stalled", 4)  # type: ignore[union-attr]
    assert script.open_streams == 0, "the engine that hung was not let go of"


async def test_an_engine_that_only_gives_signs_of_life_is_outrun(tmp_path: Path) -> None:
    path, asked = asked_of(IDS)
    script = Script(how="breathe", cut=0)
    script.seen["r-hedge"] = [("", {})]  # What comes second under an id is answered well.
    async with gateway(tmp_path, script) as made:
        answer = await made.call(path, asked)
        assert (answer.text, answer.is_complete) == ("".join(WORDS), True)
        assert KEEP_ALIVE not in answer.body
        await made.settle()
        assert made.told("r") == ["HedgeAsked", "HedgeOver", "ResponseBegan", "RequestEnded"]
    assert script.open_streams == 0, "the engine that hung was not let go of"


async def test_a_stream_that_cannot_move_is_waited_for(tmp_path: Path) -> None:
    """Neither a lone endpoint's nor one that asks for what cannot be continued."""
    path, asked = asked_of(TEXT, guided_regex="( w[0-9])+")
    script = Script(how="breathe", cut=len(b"".join(events_of("a", path, asked)[:4])))
    async with gateway(tmp_path, script, fallback="resume: {stall_ms_min: 100}") as made:
        async with made.asking(path, asked, "r") as reader:
            for _ in range(40):  # More than a stall's time of nothing but comments.
                await asyncio.wait_for(reader.readuntil(KEEP_ALIVE), WAIT_S)
        await made.settle()
        assert "StreamBroke" not in made.told("r")
        assert "StreamStalled" in made.told("r"), "its endpoint is held to account all the same"


async def test_what_cannot_be_continued_ends_with_its_reason(tmp_path: Path) -> None:
    path, asked = asked_of(TEXT, guided_regex="( w[0-9])+")
    events = events_of("a", path, asked)
    script = Script(cut=len(b"".join(events[:4])) + 9)
    async with gateway(tmp_path, script) as made:
        answer = await made.call(path, asked)
        assert not answer.is_complete
        shown, _, said = answer.body.rpartition(b"data: ")
        assert shown.count(b"\n\n") == 4, "whole events and nothing else"
        error = json.loads(said)["error"]
        assert (error["code"], "guided-decoding" in error["message"]) == ("stream-lost", True)
        await made.settle()
        metrics = await made.metrics()
        assert 'pdcoord_gateway_unresumable_total{why="guided-decoding"} 1.0' in metrics
        assert 'resumes_total{outcome="unresumable",reason="decode-error"} 1.0' in metrics


async def test_a_chat_whose_template_ends_the_partial_answer_is_not_continued_from_text(
    tmp_path: Path,
) -> None:
    path, asked = asked_of(TURNS)
    script = Script(cut=len(b"".join(events_of("a", path, asked)[:4])), is_deaf=True)
    async with gateway(tmp_path, script) as made:
        answer = await made.call(path, asked)
        assert not answer.is_complete
        assert b"stream-lost" in answer.body
        assert b"template" in answer.body
        await made.settle()
        assert 'pdcoord_gateway_unresumable_total{why="template"} 1.0' in await made.metrics()


@asynccontextmanager
async def sidecars(folder: Path) -> AsyncIterator[Callable[[Engine], Awaitable[int]]]:
    """Starts sidecars before engines, each a process."""
    async with Processes(folder) as processes, Client() as client:

        async def start(engine: Engine) -> int:
            front, back = free_ports(2)
            flags = f"--host 127.0.0.1 --port {front} --metrics-port {back} --engine 127.0.0.1:{engine.port}"
            name = f"sidecar-{engine.name}"
            await processes.start(name, ["pdcoord-sidecar", *flags.split(), "--allow-any"])
            await processes.wait_ready(name, HostPort(f"127.0.0.1:{front}"), "/livez", client)
            return front

        yield start


GUIDED = (COMPLETIONS, {"prompt": PROMPT, "guided_regex": "( w[0-9])+"})
MESSAGES = ("/v1/messages", {"messages": [{"role": "user", "content": PROMPT}]})


async def test_behind_a_sidecar_the_client_hears_why_its_stream_is_lost_and_that_alone(
    tmp_path: Path,
) -> None:
    kinds = {"many-choices": (TEXT, {"n": 2}), "guided-decoding": (GUIDED, {}), "api": (MESSAGES, {})}
    script = Script()
    async with sidecars(tmp_path) as through, gateway(tmp_path, script, through=through) as made:
        for why, (kind, changes) in kinds.items():
            path, asked = asked_of(kind, **changes)
            script.cut = len(b"".join(events_of("a", path, asked)[:4]))
            answer = await made.call(path, asked, why)
            assert not answer.is_complete
            errors = [part for part in answer.body.split(b"\n\n") if b'"error"' in part]
            (error,) = [json.loads(part.partition(b"data: ")[2])["error"] for part in errors]
            assert (error["code"], why in error["message"]) == ("stream-lost", True), error
        await made.settle()
        metrics = await made.metrics()
        for why in kinds:
            assert f'pdcoord_gateway_unresumable_total{{why="{why}"}} 1.0' in metrics


async def test_with_nobody_left_the_stream_is_lost_and_accounted_once(tmp_path: Path) -> None:
    path, asked = asked_of(IDS)
    script = Script(cut=len(b"".join(events_of("a", path, asked)[:4])))
    async with gateway(tmp_path, script, engine_count=1) as made:
        answer = await made.call(path, asked)
        assert b"stream-lost" in answer.body
        assert not answer.is_complete
        await made.settle()


async def test_a_break_is_told_of_everywhere(tmp_path: Path) -> None:
    path, asked = asked_of(IDS)
    script = Script(cut=len(b"".join(events_of("a", path, asked)[:4])))
    async with gateway(tmp_path, script) as made:
        await made.call(path, asked)
        await made.settle()
        (line,) = [line for line in made.lines.entries if line["event"] == "request.done"]
        assert (line["resumes"], line["break_outcome"], line["attempts"]) == (1, "continued", 2)
        assert line["resume_gap_ms"] > 0
        assert line["outcome"] == "ok"
        metrics = await made.metrics()
        assert 'resumes_total{outcome="continued",reason="decode-error"} 1.0' in metrics
        assert "pdcoord_gateway_resume_gap_seconds_count 1.0" in metrics
        assert 'rungs_total{reason="decode-error",rung="resume"} 1.0' in metrics
        first, second = (await made.decision("r"))["attempts"]
        assert (first["failure"], first["broke_after_tokens"]) == ("decode-error", 4)
        assert (second["failure"], second["broke_after_tokens"]) == (None, None)
        assert first["chosen"]["decode"] != second["chosen"]["decode"]
        assert made.told("r") == ["ResponseBegan", "StreamBroke", "ResponseBegan", "RequestEnded"]


async def test_many_streams_that_break_at_once_all_go_on(tmp_path: Path) -> None:
    path, asked = asked_of(TEXT)
    script = Script(cut=len(b"".join(events_of("a", path, asked)[:5])) + 31)
    async with gateway(tmp_path, script) as made:
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(made.call(path, asked, f"r{index}")) for index in range(40)]
        assert {call.result().text for call in calls} == {"".join(WORDS)}
        await made.settle()
    assert all(len(seen) == 2 for seen in script.seen.values())
