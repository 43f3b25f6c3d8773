"""KV between two processes with unlike layouts: GB/s from staged to usable, beside bare NIXL and a copy.

Run by the engines' interpreter (torch, NIXL). `fetch` is the time from asking for KV that is staged to its
last token in the consumer's blocks: read, digest, unpack. `hand-over` begins with computed KV and a waiting
consumer, as with both legs at once: pack, read, digest and unpack overlap. Bytes are the producer's.
"""

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.relay.machine import facts
from benchmarks.transfer.engines import SHAPE, BareNixl, Hand, Side
from transfer.layout import KvDtype, KvLayout, KvSplit, Order
from transfer.repack.tilings import CPU_VEC

FREED_S_MAX = 5.0
NATIVE_MIN, REGROUP_MIN, CONVERT_MIN = 0.9, 0.5, 0.3
"""Own targets for `fetch`, in bare NIXL's speed on the same bytes in the same run."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layouts and what is asked of them."""

    name: str
    kind: str
    producer: KvLayout
    consumer: KvLayout
    ratio_min: float


_HND_16 = KvLayout(16, Order.HND)
PAIRS = (
    Pair("nvidia 16 -> nvidia 16", "native", _HND_16, _HND_16, NATIVE_MIN),
    Pair("nvidia 16 -> amd 64", "regroup", _HND_16, KvLayout(64, Order.HND), REGROUP_MIN),
    Pair("gaudi 128 -> nvidia 16", "regroup", KvLayout(128, split=KvSplit.SEPARATE), _HND_16, REGROUP_MIN),
    Pair(
        "cpu-vec 128 -> nvidia 16",
        "regroup",
        KvLayout(128, Order.HND, split=KvSplit.HALVED, tiling=CPU_VEC),
        _HND_16,
        REGROUP_MIN,
    ),
    Pair(
        "nvidia bf16 -> amd fp16",
        "convert",
        _HND_16,
        KvLayout(64, Order.HND, KvDtype.FLOAT16),
        CONVERT_MIN,
    ),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians in GB/s; lowest and highest of `fetch`."""

    pair: str
    kind: str
    backend: str
    tokens: int
    megabytes: float
    copy: float
    bare_nixl: float
    pack: float
    fetch: float
    fetch_low: float
    fetch_high: float
    handover: float
    ratio: float
    ratio_min: float


class Producer:
    """The other process."""

    def __init__(self, pair: Pair, backend: str, token_count: int, staging_bytes: int) -> None:
        settings = {
            "layout": asdict(pair.producer),
            "backend": backend,
            "token_count": token_count,
            "staging_bytes": staging_bytes,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transfer.producer", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._heard()

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the producer's process has ended")
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--backends", default="nixl,tcp", help="nixl, tcp or both (default nixl,tcp)")
    parser.add_argument("--tokens", default="1024,4096", help="prompt lengths (default 1024,4096)")
    parser.add_argument("--rounds", type=int, default=7, help="of each row (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options = parser.parse_args()
    options.backends = options.backends.split(",")
    options.tokens = [int(word) for word in options.tokens.split(",")]
    if options.rounds < 1 or not set(options.backends) <= {"nixl", "tcp"}:
        parser.error("backends are nixl and tcp, and at least one round is needed")
    return options


def measure(pair: Pair, backend: str, token_count: int, round_count: int) -> Row:
    """One row; its references are measured in turn with it."""
    length_bytes = SHAPE.layer_count * SHAPE.kv_heads * SHAPE.row_elements * token_count
    length_bytes *= pair.producer.dtype.item_bytes
    staging_bytes = 2 * length_bytes + (16 << 20)
    producer = Producer(pair, backend, token_count, staging_bytes)
    side = Side(pair.consumer, backend, token_count, staging_bytes)
    try:
        bare = BareNixl("bare-consumer", length_bytes)
        told = producer.ask(do="bare", length_bytes=length_bytes)
        metadata = base64.b64decode(told["metadata"])
        source, target = np.ones(length_bytes, np.uint8), np.ones(length_bytes, np.uint8)
        times: dict[str, list[float]] = {name: [] for name in ("copy", "bare", "pack", "fetch", "handover")}
        for index in range(round_count + 1):
            found = {
                "copy": _timed(lambda: np.copyto(target, source)),
                "bare": bare.read(metadata, told["address"], length_bytes),
                **_fetch(producer, side, token_count),
                "handover": _handover(producer, side, token_count),
            }
            if index:  # The first one touches what nobody has touched.
                for name, took_s in found.items():
                    times[name].append(took_s)
        _check_freed(producer, side)
    finally:
        side.close()
        producer.close()
    return _row(pair, backend, token_count, length_bytes, times)


def _check_freed(producer: Producer, side: Side) -> None:
    """The last words of a transfer may still be on their way; after them no staging memory is held."""
    deadline_s = time.perf_counter() + FREED_S_MAX
    while producer.ask(do="stats")["used_bytes"] or side.agent.stats().staging_used_bytes:
        if time.perf_counter() > deadline_s:
            raise RuntimeError(f"staging memory is still held after {FREED_S_MAX:g} s")
        time.sleep(0.01)


def _timed(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _fetch(producer: Producer, side: Side, token_count: int) -> dict[str, float]:
    """Sequential: staged first, then fetched."""
    hand = producer.ask(do="open", token_count=token_count)
    packed = producer.ask(do="stage", hand=hand)
    began_s = time.perf_counter()
    side.load(Hand(**hand))
    side.loaded()
    return {"pack": packed["took_s"], "fetch": time.perf_counter() - began_s}


def _handover(producer: Producer, side: Side, token_count: int) -> float:
    """Concurrent: the consumer waits already when the KV is computed."""
    hand = producer.ask(do="open", token_count=token_count)
    side.load(Hand(**hand))
    time.sleep(0.02)  # The fetch is at the producer by then; it does not matter if it is not.
    began_s = time.perf_counter()
    producer.ask(do="stage", hand=hand)
    side.loaded()
    return time.perf_counter() - began_s


def _row(pair: Pair, backend: str, token_count: int, length_bytes: int, times: dict[str, list[float]]) -> Row:
    speeds = {name: [length_bytes / took_s / 1e9 for took_s in own] for name, own in times.items()}
    middle = {name: statistics.median(own) for name, own in speeds.items()}
    return Row(
        pair=pair.name,
        kind=pair.kind,
        backend=backend,
        tokens=token_count,
        megabytes=length_bytes / 1e6,
        copy=middle["copy"],
        bare_nixl=middle["bare"],
        pack=middle["pack"],
        fetch=middle["fetch"],
        fetch_low=min(speeds["fetch"]),
        fetch_high=max(speeds["fetch"]),
        handover=middle["handover"],
        ratio=middle["fetch"] / middle["bare"],
        ratio_min=pair.ratio_min,
    )


HEAD = ("pair", "kind", "backend", "tokens", "MB", "copy", "bare NIXL", "pack", "fetch", "low..high")
HEAD_REST = ("hand-over", "fetch/NIXL", "target")


def table(rows: list[Row]) -> str:
    lines = [(*HEAD, *HEAD_REST)]
    for r in rows:
        speeds = (f"{speed:.2f}" for speed in (r.copy, r.bare_nixl, r.pack, r.fetch))
        spread = f"{r.fetch_low:.2f}..{r.fetch_high:.2f}"
        name = (r.pair, r.kind, r.backend, str(r.tokens), f"{r.megabytes:.0f}")
        # The targets are of the same transport as the reference.
        target = f"{r.ratio_min:g}" if r.backend == "nixl" else "-"
        lines.append((*name, *speeds, spread, f"{r.handover:.2f}", f"{r.ratio:.2f}", target))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    rows: list[Row] = []
    for backend in options.backends:
        for pair in PAIRS:
            for token_count in options.tokens:
                print(f"{backend}: {pair.name}, {token_count} tokens", file=sys.stderr, flush=True)
                rows.append(measure(pair, backend, token_count, options.rounds))
    print(table(rows))
    missed = [r for r in rows if r.backend == "nixl" and r.ratio < r.ratio_min]
    for r in missed:
        print(f"{r.pair}, {r.tokens} tokens: {r.ratio:.2f} of bare NIXL, past the target of {r.ratio_min:g}")
    if options.json is not None:
        record = {"machine": facts(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
