"""Ten times what the fleet can serve: does goodput stay, is memory bounded, are refusals cheap.

`python -m benchmarks.overload [--seconds N] [--json FILE]`: a gateway, two sidecars and three emulated
engines as processes. First the plateau: the best goodput at 1, 1.5 and 2 times the capacity. Then 10 times;
then clients that misbehave beside a lower load: idle connections, bodies that come a byte a second, bodies
without end, streams that nobody reads. Each row gives goodput as a share of the plateau (or of the load where
that is less), every outcome, how long a refusal took, and the largest resident memory of each process.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path

import uvloop

from benchmarks.overload import load
from benchmarks.overload.fleet import Fleet, capacity_per_s, open_files, start_fleet
from benchmarks.overload.load import Tally
from pdcoord.sim.demo.processes import Processes
from pdcoord.wire.client import Client

GOODPUT_MIN = 0.95
RSS_BYTES_MAX = {"gateway": 512 << 20, "sidecar": 256 << 20, "engines": 512 << 20}
"""By the first word of a process's name."""
_RAMP = (1.0, 1.5, 2.0)
_SAMPLE_S = 0.2


class Watch:
    """The largest memory and most open files of each process while it is entered."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.rss_bytes_max: dict[str, int] = {}
        self.gateway_files_max = 0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run())
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        gateway = self._fleet.processes["gateway"].pid
        while True:
            for name, rss_bytes in self._fleet.rss_bytes().items():
                self.rss_bytes_max[name] = max(rss_bytes, self.rss_bytes_max.get(name, 0))
            self.gateway_files_max = max(self.gateway_files_max, open_files(gateway))
            await asyncio.sleep(_SAMPLE_S)


def bound_of(process: str) -> int:
    """The bound on resident memory of a process, in bytes."""
    return RSS_BYTES_MAX[process.partition("-")[0]]


def row(name: str, tally: Tally, reference_per_s: float, watch: Watch) -> dict[str, object]:
    """One phase as printed and kept."""
    refused = sorted(tally.refusal_s)
    return {
        "phase": name,
        "offered_per_s": round(tally.offered / tally.seconds, 1),
        "goodput_per_s": round(tally.goodput_per_s, 2),
        "share": round(tally.goodput_per_s / reference_per_s, 3),
        "outcomes": dict(tally.outcomes),
        "refusal_ms_p50": round(statistics.median(refused) * 1e3, 1) if refused else None,
        "refusal_ms_p99": round(refused[int(len(refused) * 0.99)] * 1e3, 1) if refused else None,
        "no_retry_after": tally.no_retry_after,
        "rss_mib_max": {each: round(rss / 2**20) for each, rss in watch.rss_bytes_max.items()},
        "gateway_files_max": watch.gateway_files_max,
    }


async def measure(seconds: float, seed: int) -> list[dict[str, object]]:
    """All phases in turn."""
    rng = random.Random(seed)
    capacity = capacity_per_s()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        async with Client() as client, Processes(Path(folder)) as processes:
            fleet = await start_fleet(Path(folder), processes, client)
            gateway = fleet.gateway

            async def phase(
                name: str,
                times: float,
                plateau_per_s: float | None,
                trouble: AbstractAsyncContextManager[None],
            ) -> Tally:
                watch = Watch(fleet)
                async with watch.watching(), trouble:
                    tally = await load.offer(client, gateway, times * capacity, seconds, rng)
                reference = (
                    tally.goodput_per_s
                    if plateau_per_s is None
                    else min(plateau_per_s, tally.offered / tally.seconds)
                )
                rows.append(row(name, tally, reference, watch))
                print(json.dumps(rows[-1]), flush=True)
                return tally

            await load.offer(client, gateway, capacity / 2, 5.0, rng)  # Connections and caches, warm.
            ramp = [await phase(f"{times:g}x", times, None, nullcontext()) for times in _RAMP]
            plateau = max(each.goodput_per_s for each in ramp)
            await phase("10x", 10.0, plateau, nullcontext())
            await phase("idle connections", 0.8, plateau, load.idle_connections(gateway, 10_000))
            await phase("slow writers", 0.8, plateau, load.slow_writers(gateway, 500))
            await phase("huge bodies", 0.8, plateau, load.huge_bodies(gateway, 16, 256))
            await phase("slow readers", 0.6, plateau, load.slow_readers(gateway, 2))
            await phase("after", 0.8, plateau, nullcontext())
    return rows


def misses(rows: list[dict[str, object]]) -> list[str]:
    """What is not as promised, in words."""
    found = []
    for each in rows:
        share, rss = each["share"], each["rss_mib_max"]
        assert isinstance(share, float)
        assert isinstance(rss, dict)
        if share < GOODPUT_MIN:
            found.append(f"{each['phase']}: goodput is {share} of its reference, below {GOODPUT_MIN}")
        if each["no_retry_after"]:
            found.append(f"{each['phase']}: {each['no_retry_after']} refusals without Retry-After")
        found += [
            f"{each['phase']}: {name} took {mib} MiB, more than {bound_of(name) >> 20}"
            for name, mib in rss.items()
            if mib << 20 > bound_of(name)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each phase (30)")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (1)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows = uvloop.run(measure(options.seconds, options.seed))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = misses(rows)
    print("\n".join(missed) or "all as promised")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
