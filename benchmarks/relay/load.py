"""The client side: raw sockets that read many streams at once, and the CPU their proxy spends meanwhile."""

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
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._sent_ns = time.monotonic_ns()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        tally = self._tally
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


async def measure(port: int, pid: int, streams: int, window_s: float, headers: list[str]) -> dict[str, float]:
    """Run the streams; CPU and events are counted over one window in which all of them flow."""
    loop = asyncio.get_running_loop()
    tally = Tally(streams)
    opened: list[Stream] = []
    async with asyncio.timeout(_START_S_MAX):
        for index in range(streams):
            make = functools.partial(Stream, tally, _request(port, index, headers))
            _, stream = await loop.create_connection(make, "127.0.0.1", port)
            opened.append(stream)
            await asyncio.sleep(_SPREAD_S / streams)
        await tally.all_begun.wait()
    await asyncio.sleep(_WARM_S)
    tally.is_measuring = True
    events, cpu, began_ns = tally.events, cpu_ns(pid), time.monotonic_ns()
    await asyncio.sleep(window_s)
    events, cpu = tally.events - events, cpu_ns(pid) - cpu
    elapsed_s = (time.monotonic_ns() - began_ns) / 1e9
    lost = tally.lost
    for stream in opened:
        if stream.transport is not None:
            stream.transport.abort()
    ages_us = sorted(age / 1e3 for age in tally.ages_ns)
    return {
        "events": events,
        "cpu_us_per_event": cpu / 1e3 / max(events, 1),
        "events_per_s": events / elapsed_s,
        "streams_lost": lost,
        "ttft_ms_p50": statistics.median(tally.ttfts_ns) / 1e6,
        "age_us_p50": statistics.median(ages_us) if ages_us else 0.0,
        "age_us_p99": ages_us[int(len(ages_us) * 0.99)] if ages_us else 0.0,
    }


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("--pid", type=int, required=True)
    arguments.add_argument("--streams", type=int, required=True)
    arguments.add_argument("--window-s", type=float, required=True)
    arguments.add_argument("--header", action="append", default=[])
    options = arguments.parse_args()
    result = uvloop.run(measure(options.port, options.pid, options.streams, options.window_s, options.header))
    print(json.dumps(result), flush=True)
