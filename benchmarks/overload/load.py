"""Clients: requests at an offered rate whatever comes back, and those that misbehave."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from benchmarks.overload.fleet import MODEL, OUTPUT_TOKENS, TTFT_S
from pdcoord.protocol.headers import HostPort, parse_host_port
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError

_ANSWER_S_MAX = 60.0
_WORDS = 100
_JSON = [(b"content-type", b"application/json")]


@dataclass(slots=True)
class Tally:
    """What came back in one phase.

    Attributes:
        good: whole answers whose first token came within the objective.
        outcomes: by status, with `late` for a whole answer behind the objective and `broken` for none.
        refusal_s: how long each 429 took.
        no_retry_after: 429s and 503s without Retry-After.
    """

    seconds: float
    offered: int = 0
    good: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    no_retry_after: int = 0

    @property
    def goodput_per_s(self) -> float:
        return self.good / self.seconds


async def offer(
    client: Client, gateway: HostPort, rate_per_s: float, seconds: float, rng: random.Random
) -> Tally:
    """Send requests at that rate, evenly jittered, for so long, and wait for all answers."""
    tally = Tally(seconds)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for index in range(round(rate_per_s * seconds)):
            await asyncio.sleep(max(0.0, began_s + index / rate_per_s - time.monotonic()))
            group.create_task(_ask(client, gateway, rng.randbytes(8).hex(), tally))
    return tally


async def _ask(client: Client, gateway: HostPort, nonce: str, tally: Tally) -> None:
    prompt = f"{nonce} " + "word " * _WORDS
    body = {"model": MODEL, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "min_tokens": OUTPUT_TOKENS}
    tally.offered += 1
    sent_s = time.monotonic()
    try:
        async with await client.request(
            "POST",
            gateway,
            "/v1/completions",
            headers=_JSON,
            body=json.dumps(body | {"stream": True}).encode(),
            head_timeout_s=_ANSWER_S_MAX,
        ) as response:
            if response.status != 200:
                await response.read_all(timeout_s=_ANSWER_S_MAX)
                tally.outcomes[str(response.status)] += 1
                tally.refusal_s.append(time.monotonic() - sent_s)
                tally.no_retry_after += response.header(b"retry-after") is None
                return
            await response.read_chunk(idle_timeout_s=_ANSWER_S_MAX)
            ttft_s = time.monotonic() - sent_s
            last = await response.read_all(timeout_s=_ANSWER_S_MAX)
    except WireError:
        tally.outcomes["broken"] += 1
        return
    if b"data: [DONE]" not in last:
        tally.outcomes["broken"] += 1
    elif ttft_s > TTFT_S:
        tally.outcomes["late"] += 1
    else:
        tally.outcomes["200"] += 1
        tally.good += 1


# Clients that misbehave. Each holds its connections while it is entered.


@asynccontextmanager
async def idle_connections(gateway: HostPort, count: int) -> AsyncIterator[None]:
    """Connections on which nothing is ever sent."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await _connect(gateway, stack)
        yield


@asynccontextmanager
async def slow_writers(gateway: HostPort, count: int) -> AsyncIterator[None]:
    """Requests whose body comes a byte a second."""
    head = _head(gateway, content_length=100_000)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        tasks = []
        for _ in range(count):
            _, writer = await _connect(gateway, stack)
            tasks.append(group.create_task(_drip(writer, head)))
        yield
        for task in tasks:
            task.cancel()


async def _drip(writer: asyncio.StreamWriter, head: bytes) -> None:
    with suppress(OSError):
        writer.write(head)
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(1.0)


@asynccontextmanager
async def slow_readers(gateway: HostPort, count: int) -> AsyncIterator[None]:
    """Streams whose answers nobody reads."""
    body = {"model": MODEL, "prompt": "unread", "max_tokens": 4_000, "min_tokens": 4_000, "stream": True}
    raw = json.dumps(body).encode()
    async with AsyncExitStack() as stack:
        for _ in range(count):
            _, writer = await _connect(gateway, stack)
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport that reads, by now
            writer.write(_head(gateway, content_length=len(raw)) + raw)
        yield


@asynccontextmanager
async def huge_bodies(gateway: HostPort, count: int, mebibytes: int) -> AsyncIterator[None]:
    """Bodies without an announced length that never stop before so many MiB."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        tasks = []
        for _ in range(count):
            _, writer = await _connect(gateway, stack)
            tasks.append(group.create_task(_pour(writer, _head(gateway, content_length=None), mebibytes)))
        yield
        for task in tasks:
            task.cancel()


async def _pour(writer: asyncio.StreamWriter, head: bytes, mebibytes: int) -> None:
    block = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    with suppress(OSError):
        writer.write(head)
        for _ in range(16 * mebibytes):
            writer.write(block)
            await writer.drain()


def _head(gateway: HostPort, *, content_length: int | None) -> bytes:
    length = "transfer-encoding: chunked" if content_length is None else f"content-length: {content_length}"
    lines = ["POST /v1/completions HTTP/1.1", f"host: {gateway}", "content-type: application/json", length]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


async def _connect(
    gateway: HostPort, stack: AsyncExitStack
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = parse_host_port(gateway)
    async with asyncio.timeout(_ANSWER_S_MAX):
        reader, writer = await asyncio.open_connection(host, port)
    stack.callback(_end, reader, writer)
    return reader, writer


def _end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Nobody else holds the reader, and asyncio closes a connection whose reader is collected."""
    writer.transport.abort()
