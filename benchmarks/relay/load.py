"""The client: raw sockets that read many streams at once, and the CPU that their relays spend meanwhile."""

import argparse
import asyncio
import functools
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import cast

import uvloop

from benchmarks.relay import sse
from benchmarks.relay.machine import cpu_ns

_START_S_MAX = 30.0
_WARM_S = 1.0
_SPREAD_S = 0.3  # Ten intervals, so that the streams' events do not come in step.


@dataclass
class Tally:
    """What all streams of a run have seen together."""

    streams: int
    events: int = 0
    begun: int = 0
    lost: int = 0
    expected: bytes = b""
    is_measuring: bool = False
    ages_ns: list[int] = field(default_factory=list)
    ttfts_ns: list[int] = field(default_factory=list)
    all_begun: asyncio.Event = field(default_factory=asyncio.Event)


class Stream(asyncio.Protocol):
    """One request and its endless answer."""

    def __init__(self, tally: Tally, request: bytes) -> None:
        self._tally = tally
        self._request = request
        self._sent_ns = 0
        self._has_begun = False
        self._has_head = False
        self._head = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._sent_ns = time.monotonic_ns()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        tally = self._tally
        if not self._has_head:
            self._head += data
            self._has_head = b"\r\n\r\n" in self._head
            if self._has_head and tally.expected not in self._head.partition(b"\r\n\r\n")[0]:
                raise ValueError(f"{tally.expected!r} is not in the response's head: {self._head[:500]!r}")
        events = sse.count(data)
        tally.events += events
        if events and tally.is_measuring:
            age_ns = sse.age_ns(data)
            if age_ns is not None:
                tally.ages_ns.append(age_ns)
        elif events and not self._has_begun:
            self._has_begun = True
            tally.ttfts_ns.append(time.monotonic_ns() - self._sent_ns)
            tally.begun += 1
            if tally.begun == tally.streams:
                tally.all_begun.set()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._tally.lost += 1
        self._tally.all_begun.set()  # Whoever waits for it need not wait in vain.


def _request(port: int, index: int, headers: list[str]) -> bytes:
    prompt = f"stream {index}: " + "lorem ipsum dolor sit amet " * 20
    body = json.dumps({"model": sse.MODEL, "prompt": prompt, "max_tokens": 4096, "stream": True}).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        f"host: 127.0.0.1:{port}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Target:
    """A relay to read from.

    Attributes:
        headers: lines to add to each request.
        expected: what the head of each answer must hold.
    """

    name: str
    port: int
    pid: int
    headers: list[str]
    expected: str


async def open_streams(targets: list[Target], tallies: list[Tally], opened: list[Stream]) -> None:
    """All streams of all targets, in turn; returns when each has begun."""
    loop = asyncio.get_running_loop()
    streams = tallies[0].streams
    for index in range(streams):
        for target, tally in zip(targets, tallies, strict=True):
            make = functools.partial(Stream, tally, _request(target.port, index, target.headers))
            _, stream = await loop.create_connection(make, "127.0.0.1", target.port)
            opened.append(stream)
            await asyncio.sleep(_SPREAD_S / streams / len(targets))
    for target, tally in zip(targets, tallies, strict=True):
        await tally.all_begun.wait()
        if tally.lost:
            raise SystemExit(f"{target.name}: {tally.lost} streams were lost before all had begun")


async def measure(targets: list[Target], streams: int, window_s: float) -> dict[str, dict[str, float]]:
    """Run the streams of all targets at once; CPU and events of each are counted over the same window."""
    tallies = [Tally(streams, expected=each.expected.encode()) for each in targets]
    opened: list[Stream] = []
    async with asyncio.timeout(_START_S_MAX):
        await open_streams(targets, tallies, opened)
    await asyncio.sleep(_WARM_S)
    before = []
    for target, tally in zip(targets, tallies, strict=True):
        tally.is_measuring = True
        before.append((tally.events, cpu_ns(target.pid), time.monotonic_ns()))
    await asyncio.sleep(window_s)
    results = {}
    for target, tally, (events_before, cpu_before_ns, began_ns) in zip(targets, tallies, before, strict=True):
        spent_ns, elapsed_s = cpu_ns(target.pid) - cpu_before_ns, (time.monotonic_ns() - began_ns) / 1e9
        results[target.name] = _result(tally, tally.events - events_before, spent_ns, elapsed_s)
    for stream in opened:
        if stream.transport is not None:
            stream.transport.abort()
    return results


def _result(tally: Tally, events: int, spent_ns: int, elapsed_s: float) -> dict[str, float]:
    ages_us = sorted(age / 1e3 for age in tally.ages_ns)
    return {
        "events": events,
        "cpu_us_per_event": spent_ns / 1e3 / max(events, 1),
        "events_per_s": events / elapsed_s,
        "streams_lost": tally.lost,
        "ttft_ms_p50": statistics.median(tally.ttfts_ns) / 1e6,
        "age_us_p50": statistics.median(ages_us) if ages_us else 0.0,
        "age_us_p99": ages_us[int(len(ages_us) * 0.99)] if ages_us else 0.0,
    }


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--targets", required=True, help="JSON list of {name, port, pid, headers, expected}"
    )
    arguments.add_argument("--streams", type=int, required=True)
    arguments.add_argument("--window-s", type=float, required=True)
    options = arguments.parse_args()
    asked = [Target(**each) for each in json.loads(options.targets)]
    print(json.dumps(uvloop.run(measure(asked, options.streams, options.window_s))), flush=True)
