"""Steady load with a kill now and then: does anything grow. `python -m benchmarks.chaos.soak --minutes N`.

Prints the fleet's memory, sockets, threads, tasks, requests and leases as it goes, and draws those of every
process over time into a PNG. A figure is flat if, after a warm-up of a quarter of its life, the line through
its samples rises over the rest by no more than twice their spread about it, or by a floor for its kind
(memory: 8 MiB or 3 % of its mean). A process that was killed begins anew, warm-up included; one that lived
too short to tell is left out. Leases are those of engines, which in turn do not tell their tasks.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.leftovers import counts_of, gauge
from benchmarks.chaos.processes import Site, report, resumed_ids, start
from benchmarks.chaos.programs import Part, Programs, use_of
from benchmarks.chaos.trouble import Fault

MINUTES = 15.0
CLIENTS = 8
_PAUSE_S = 0.2
_SAMPLE_S = 2.0
_KILLS_PER_MINUTE = 1.0
_WARM_SHARE = 0.25
_LEVEL_S_MIN = 60.0
_PROGRESS_S = 30.0
COLOURS = 256
"""Of the picture: lines keep theirs, and with all shades it is nearly three times as large."""
_FLOORS = {
    "rss_bytes": 8 << 20,
    "sockets": 8.0,
    "threads": 2.0,
    "tasks": 16.0,
    "requests": 8.0,
    "leases": 8.0,
}
_RSS_SHARE = 0.03
_STEADY = ("gateway-1", "decode-2", "decode-2-sidecar", "prefill-1")
"""Never killed, so that some of each kind live through the whole run."""


@dataclass
class Series:
    """One figure of one life of a process.

    Attributes:
        points: seconds since the start of the run, and the value.
    """

    figure: str
    points: list[tuple[float, float]] = field(default_factory=list)

    def rise(self) -> tuple[float, float] | None:
        """How much it rises after its warm-up, and how much it may; None if it is too short to tell."""
        begin_s, end_s = self.points[0][0], self.points[-1][0]
        after = [point for point in self.points if point[0] >= begin_s + _WARM_SHARE * (end_s - begin_s)]
        if not after or after[-1][0] - after[0][0] < _LEVEL_S_MIN:
            return None
        times, values = zip(*after, strict=True)
        slope, intercept = statistics.linear_regression(times, values)
        spread = statistics.pstdev(v - slope * t - intercept for t, v in after)
        floor = _FLOORS[self.figure]
        if self.figure == "rss_bytes":
            floor = max(floor, _RSS_SHARE * statistics.fmean(values))
        return slope * (times[-1] - times[0]), max(2 * spread, floor)


class Watch:
    """Samples of every process; a new pid begins a new series."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._begun_s = time.monotonic()
        self.series: dict[tuple[str, int, str], Series] = {}
        self.kills_s: list[float] = []

    def killed(self) -> None:
        """Remember when, for the plot."""
        self.kills_s.append(time.monotonic() - self._begun_s)

    def now(self) -> str:
        """The last figures of the processes that run, each added up."""
        programs, totals = self._site.programs, dict.fromkeys(_FLOORS, 0.0)
        for (name, pid, figure), series in self.series.items():
            if programs.is_running(name) and programs.pid(name) == pid:
                totals[figure] += series.points[-1][1]
        memory = f"RSS {totals.pop('rss_bytes') / 2**20:.0f} MiB"
        return ", ".join([memory, *(f"{figure} {total:.0f}" for figure, total in totals.items())])

    async def run(self) -> None:
        while True:
            for name in self._site.programs.parts:
                await self._sample(name)
            await asyncio.sleep(_SAMPLE_S)

    async def _sample(self, name: str) -> None:
        programs = self._site.programs
        if not programs.is_running(name) or self._site.trouble.is_struck(name):
            return
        part, pid = programs.parts[name], programs.pid(name)
        use = use_of(pid)
        values: dict[str, float] = {
            "rss_bytes": use.rss_bytes,
            "sockets": use.sockets,
            "threads": use.threads,
        }
        values |= await _told(programs, part)
        now_s = time.monotonic() - self._begun_s
        for figure, value in values.items():
            series = self.series.setdefault((name, pid, figure), Series(figure))
            series.points.append((now_s, value))

    def verdicts(self) -> Iterator[tuple[str, bool]]:
        """A line for each series that is long enough, and whether it is flat."""
        for (name, _, figure), series in sorted(self.series.items()):
            found = series.rise()
            if found is None:
                continue
            rise, allowed = found
            unit, scale = ("MiB", 2.0**20) if figure == "rss_bytes" else (figure, 1.0)
            label = f"{name} {figure.removesuffix('_bytes')}"
            last = series.points[-1][1] / scale
            told = (
                f"{label:32} {last:8.1f} {unit:9} rises {rise / scale:+7.2f} of {allowed / scale:.2f} allowed"
            )
            yield told, rise <= allowed

    def draw(self, path: Path, title: str) -> None:
        """One plot for each figure, one line for each life of a process, a dotted one for each kill."""
        import matplotlib as mpl  # noqa: PLC0415  # takes a second, and only this needs it

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
        from PIL import Image  # noqa: PLC0415  # matplotlib's own

        figures = list(_FLOORS)
        image, axes = plt.subplots(len(figures), 1, figsize=(11, 2.4 * len(figures)), sharex=True)
        colours: dict[str, str] = defaultdict(lambda: f"C{len(colours) % 10}")
        for (name, _, figure), series in self.series.items():
            axis = axes[figures.index(figure)]
            scale = 2.0**20 if figure == "rss_bytes" else 1.0
            times, values = zip(*series.points, strict=True)
            label = name if name not in colours else None
            axis.plot(
                [t / 60 for t in times], [v / scale for v in values], color=colours[name], lw=1, label=label
            )
        for axis, figure in zip(axes, figures, strict=True):
            axis.set_ylabel("RSS, MiB" if figure == "rss_bytes" else figure)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            for kill_s in self.kills_s:
                axis.axvline(kill_s / 60, color="0.4", lw=0.8, ls=":")
        axes[0].legend(fontsize=7, ncol=4, loc="lower right")
        axes[0].set_title(title, fontsize=9)
        axes[-1].set_xlabel("minutes")
        image.tight_layout()
        image.savefig(path, dpi=110)
        plt.close(image)
        with Image.open(path) as drawn:
            few_colours = drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        few_colours.save(path, optimize=True)


async def _told(programs: Programs, part: Part) -> dict[str, float]:
    """What a part says of itself; nothing where it does not answer."""
    if part.kind not in {"gateway", "sidecar"}:
        counts = await counts_of(programs, part)
        return {figure: counts[figure] for figure in ("requests", "leases") if figure in counts}
    status, page = await programs.get(part.admin, "/metrics")
    if status != 200:
        return {}
    names = {"requests": "in_flight", "tasks": "tasks"}
    values = {figure: gauge(page, f"pdcoord_{part.kind}_{name}") for figure, name in names.items()}
    assert None not in values.values(), f"{part.name} does not tell all of {', '.join(names.values())}"
    return {figure: value for figure, value in values.items() if value is not None}


async def _kill_now_and_then(site: Site, watch: Watch, rng: random.Random, seconds: float) -> None:
    names = [name for name in site.programs.parts if name not in _STEADY]
    end_s = time.monotonic() + seconds
    told_s = time.monotonic()
    next_s = told_s + 60 / _KILLS_PER_MINUTE / 2
    while time.monotonic() < end_s:
        await asyncio.sleep(1.0)
        now_s = time.monotonic()
        # None near the end: what is measured last is to be calm.
        if next_s <= now_s < end_s - _PROGRESS_S:
            next_s = now_s + rng.uniform(0.6, 1.4) * 60 / _KILLS_PER_MINUTE
            watch.killed()
            await site.trouble.strike(Fault("kill", rng.choice(names), 1.0, 0))
        if now_s - told_s > _PROGRESS_S:
            told_s = now_s
            verdicts = site.clients.verdicts
            left_s = max(0.0, end_s - now_s)
            calls = f"{verdicts.asked} calls, {len(verdicts.wrong)} wrong"
            print(f"  {left_s:5.0f} s left: {calls}; all processes: {watch.now()}", flush=True)


async def _run(seed: int, minutes: float, folder: Path, picture: Path) -> bool:
    async with AsyncExitStack() as stack:
        site = await start(stack, folder, seed)
        watch = Watch(site)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch.run())
            for index in range(CLIENTS):
                group.create_task(site.clients.run(seed * 1_000 + index, _PAUSE_S))
            await _kill_now_and_then(site, watch, random.Random(seed), minutes * 60)
            watching.cancel()
            found = await site.settle()
        for line in report(site.clients.verdicts, site.trouble, resumed_ids(site.programs)):
            print(line)
    verdicts = list(watch.verdicts())
    print("  of each process: the last value, and the rise over the last three quarters of its life")
    for told, is_flat in verdicts:
        print(f"  {'flat ' if is_flat else 'GROWS'} {told}")
    asked, wrong = site.clients.verdicts.asked, len(site.clients.verdicts.wrong)
    watch.draw(picture, f"{asked} calls, {wrong} wrong; dotted: a kill, after which a line begins anew")
    print(f"  plot: {picture}")
    for each in found[:40]:
        print(f"FAILED {each}")
    if not verdicts:
        print("too short to tell what grows")
    is_flat = bool(verdicts) and all(flat for _, flat in verdicts)
    print("flat" if is_flat else "not flat", flush=True)
    return is_flat and not found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, draw; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("benchmarks/results/soak.png"))
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pdcoord-soak-") as made:
        is_good = asyncio.run(_run(given.seed, given.minutes, Path(made), given.plot))
    if not is_good:
        print(f"replay: python -m benchmarks.chaos.soak --seed {given.seed} --minutes {given.minutes:g}")
    return not is_good


if __name__ == "__main__":
    sys.exit(main())
