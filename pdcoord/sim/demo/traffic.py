"""Traffic of the demo: prompts from a seed, sent as streams, timed by their events."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from pdcoord.protocol import headers
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

ANSWER_S_MAX = 60.0
_EVENT = b"data: "
_DONE = b"data: [DONE]"
_CONTENT = b'"content":"'
_EMPTY = b'"content":""'
_WORDS = (
    "fleet",
    "decode",
    "prefill",
    "vendor",
    "memory",
    "bandwidth",
    "compute",
    "request",
    "token",
    "layout",
    "block",
    "lease",
    "ticket",
    "path",
    "queue",
    "batch",
    "stream",
    "latency",
    "budget",
    "policy",
    "verdict",
    "endpoint",
    "transfer",
    "router",
    "engine",
    "kernel",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request to send.

    Attributes:
        at_s: when, from the start of the run.
        kind: what it shows, as a label.
    """

    at_s: float
    kind: str
    text: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, with its times.

    Attributes:
        decision: `mode; reason` as the gateway said; empty from an engine asked directly.
        ttft_s: to the first token with text.
        tpot_s: mean time between tokens after the first; None for a single token.
        error: empty if the answer is whole.
    """

    prompt: Prompt
    request_id: str
    decision: str
    text: str
    cached_tokens: int
    ttft_s: float
    tpot_s: float | None
    error: str


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"")


_events = msgspec.json.Decoder(_Event)


def text(rng: random.Random, byte_count: int) -> str:
    """Words of about that many bytes."""
    words: list[str] = []
    size = 0
    while size < byte_count:
        word = rng.choice(_WORDS)
        words.append(word)
        size += len(word) + 1
    return " ".join(words)


def mixed(rng: random.Random, *, rate_per_s: float, duration_s: float) -> list[Prompt]:
    """Chat turns with shared system prompts, long documents and short questions, arriving at random."""
    systems = [text(rng, 6_000) for _ in range(4)]
    prompts: list[Prompt] = []
    at_s = 0.0
    while True:
        at_s += rng.expovariate(rate_per_s)
        if at_s >= duration_s:
            return prompts
        draw = rng.random()
        if draw < 0.45:
            shared = rng.choice(systems) + "\n" + text(rng, rng.randrange(300, 1_500))
            prompts.append(Prompt(at_s, "shared prefix", shared, rng.randrange(48, 96)))
        elif draw < 0.75:
            prompts.append(Prompt(at_s, "long document", text(rng, rng.randrange(10_000, 26_000)), 64))
        else:
            prompts.append(Prompt(at_s, "short question", text(rng, rng.randrange(80, 400)), 64))


async def send(client: Client, address: HostPort, model: str, prompt: Prompt, cache_salt: str) -> Answer:
    """Send one prompt and read its stream to the end."""
    body = msgspec.json.encode(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt.text}],
            "max_tokens": prompt.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": cache_salt,
        }
    )
    reader = _Reader(prompt)
    try:
        async with (
            asyncio.timeout(ANSWER_S_MAX),
            await client.request(
                "POST",
                address,
                "/v1/chat/completions",
                headers=[(b"content-type", b"application/json")],
                body=body,
                head_timeout_s=ANSWER_S_MAX,
            ) as response,
        ):
            reader.note_head(response.status, response.header)
            while chunk := await response.read_chunk(idle_timeout_s=ANSWER_S_MAX):
                reader.note_chunk(chunk)
    except (WireError, TimeoutError) as error:
        reader.error = f"{type(error).__name__}: {error}"
    return reader.answer()


class _Reader:
    """Collects one streamed answer."""

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._begun_s = time.perf_counter()
        self._first_s = 0.0
        self._last_s = 0.0
        self._token_count = 0
        self._status = 0
        self._buffer = bytearray()
        self._request_id = ""
        self._decision = ""
        self.error = ""

    def note_head(self, status: int, header: Callable[[bytes], bytes | None]) -> None:
        self._status = status
        self._request_id = (header(headers.REQUEST_ID) or b"").decode("latin-1")
        self._decision = (header(headers.DECISION) or b"").decode("latin-1")

    def note_chunk(self, chunk: bytes) -> None:
        now_s = time.perf_counter()
        self._buffer += chunk
        # Tokens carry a content that is not empty; the role, the usage and the end do not.
        count = chunk.count(_CONTENT) - chunk.count(_EMPTY)
        if count <= 0:
            return
        if not self._token_count:
            self._first_s = now_s
        self._token_count += count
        self._last_s = now_s

    def answer(self) -> Answer:
        text_parts: list[str] = []
        cached_tokens = 0
        is_finished = False
        for line in bytes(self._buffer).split(b"\n\n"):
            if not line.startswith(_EVENT) or line.startswith(_DONE):
                continue
            event = _events.decode(line[len(_EVENT) :])
            if bytes(event.error) not in {b"", b"null"}:
                self.error = self.error or bytes(event.error).decode()
            for choice in event.choices:
                text_parts.append((choice.delta.content if choice.delta else None) or "")
                is_finished = is_finished or choice.finish_reason is not None
            if event.usage is not None and event.usage.prompt_tokens_details is not None:
                cached_tokens = event.usage.prompt_tokens_details.cached_tokens or 0
        if not self.error and self._status != 200:
            self.error = f"HTTP {self._status}: {bytes(self._buffer[:300])!r}"
        if not self.error and not (is_finished and self._buffer.rstrip().endswith(_DONE)):
            self.error = "the stream ended early"
        gaps = self._token_count - 1
        return Answer(
            prompt=self._prompt,
            request_id=self._request_id,
            decision=self._decision,
            text="".join(text_parts),
            cached_tokens=cached_tokens,
            ttft_s=self._first_s - self._begun_s,
            tpot_s=(self._last_s - self._first_s) / gaps if gaps > 0 else None,
            error=self.error,
        )


async def replay(
    prompts: list[Prompt],
    send_one: Callable[[Prompt], Awaitable[Answer]],
    on_answer: Callable[[Answer], None],
) -> list[Answer]:
    """Send each prompt at its time; all answers, in the order of the prompts."""
    begun_s = time.perf_counter()

    async def one(prompt: Prompt) -> Answer:
        await asyncio.sleep(max(0.0, begun_s + prompt.at_s - time.perf_counter()))
        answer = await send_one(prompt)
        on_answer(answer)
        return answer

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(prompt)) for prompt in prompts]
    return [task.result() for task in tasks]
