"""`pdcoord simulate`: run a workload on an emulated fleet in virtual time, and show what came of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pdcoord.policy.errors import PolicyError
from pdcoord.sim.study.contenders import Contender, UnknownContenderError, contender, run_on
from pdcoord.sim.study.runs import Run, write_runs
from pdcoord.sim.study.stage import Stage, load_stage
from pdcoord.sim.study.tables import kinds_table, summary_table, ways_table
from pdcoord.sim.workload.call import Workload
from pdcoord.sim.workload.compile import compile_workload
from pdcoord.sim.workload.workloadfile import load_workload

RATE_SCALE_MAX = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a person asked for.

    Attributes:
        rate_scales: factors of the workload's rates, one run of each router for each.
        seed: in place of the workload's; None for that.
        until_s: when runs are cut off; None to let every call end.
        signal_age_s: how old samples are when routers hear of them.
        out: folder for files; None to print only.
    """

    policy: Path
    fleet: Path
    workload: Path
    routers: Sequence[str]
    rate_scales: Sequence[float] = (1.0,)
    seed: int | None = None
    until_s: float | None = None
    signal_age_s: float = 0.0
    out: Path | None = None
    is_svg: bool = False


class OrderError(ValueError):
    """What was asked for cannot be run; the message names the option and the remedy."""


def simulate(order: Order, console: Console | None = None) -> int:
    """Run, print and write; the exit status is 2 where a file or an option cannot be used."""
    shown = console if console is not None else Console()
    try:
        runs = run_all(order, shown)
        if order.out is not None:
            write_runs(order.out, _head(order), runs, is_svg=order.is_svg)
    except (PolicyError, UnknownContenderError, OrderError, OSError) as error:
        complain("simulate", error)
        return 2
    _print(runs, shown)
    if order.out is not None:
        shown.print(f"written to {order.out}", markup=False)
    return 0


def complain(command: str, error: Exception) -> None:
    """One line or more on stderr, as they are."""
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    errors.print(f"pdcoord {command}: {error}")


def run_all(order: Order, console: Console) -> list[Run]:
    """Every router under every rate, one after another.

    Raises:
        PolicyError: if a file cannot be used.
        UnknownContenderError: for a router that does not exist.
        OrderError: for an option out of range.
    """
    _check(order)
    contenders = list(dict.fromkeys(contender(name) for name in order.routers))
    stage = load_stage(order.policy, order.fleet)
    stage = replace(stage, scene=replace(stage.scene, signal_age_s=order.signal_age_s))
    loaded = load_workload(order.workload)
    for name in stage.unused:
        console.print(f"engine {name} is in no pool of the policy and stays idle", markup=False)
    runs: list[Run] = []
    with progress_bar(console) as progress:
        session = _Session(order, stage, progress)
        for index, scale in enumerate(dict.fromkeys(order.rate_scales)):
            workload = compile_workload(loaded, seed=order.seed, rate_factor=scale)
            for note in workload.notes if index == 0 else ():
                console.print(note, markup=False)
            runs += [session.run(each, workload, scale) for each in contenders]
    return runs


def progress_bar(console: Console) -> Progress:
    """One line for each run: its name, a bar, calls done of all."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _check(order: Order) -> None:
    for scale in order.rate_scales:
        if not 0.0 < scale <= RATE_SCALE_MAX:
            raise OrderError(
                f"--rate-scale is {scale:g}, expected more than 0 and at most {RATE_SCALE_MAX:g}"
            )
    if order.until_s is not None and not order.until_s > 0.0:
        raise OrderError(f"--until-s is {order.until_s:g}, expected more than 0")
    if not 0.0 <= order.signal_age_s <= 3_600.0:
        raise OrderError(f"--signal-age-s is {order.signal_age_s:g}, expected 0 to 3600")
    if order.out is not None and order.out.exists() and not order.out.is_dir():
        raise OrderError(f"--out is {order.out}, which is a file; name a folder")


@dataclass(frozen=True, slots=True)
class _Session:
    """All runs of one order."""

    order: Order
    stage: Stage
    progress: Progress

    def run(self, each: Contender, workload: Workload, scale: float) -> Run:
        progress, order = self.progress, self.order
        task = progress.add_task(f"{each.label} x{scale:g}", total=workload.call_count)
        started_s = time.perf_counter()
        results = run_on(
            self.stage,
            each,
            workload,
            seed=order.seed or 0,
            until_s=order.until_s,
            progress=lambda done: progress.update(task, completed=done),
        )
        progress.update(task, completed=len(results))
        return Run(each.label, scale, results, time.perf_counter() - started_s)


def _print(runs: Sequence[Run], console: Console) -> None:
    for scale in dict.fromkeys(run.rate_scale for run in runs):
        same = [run for run in runs if run.rate_scale == scale]
        title = f"rates x{scale:g}"
        console.print(summary_table(title, {run.router: run.summary for run in same}))
        kinds = sorted({kind for run in same for kind in run.kinds})
        if kinds:
            by_kind = {kind: {r.router: r.kinds[kind] for r in same if kind in r.kinds} for kind in kinds}
            console.print(kinds_table(f"{title}, by kind of call", by_kind))
        console.print(ways_table(f"{title}: where calls went, and why", {r.router: r.ways for r in same}))
    calls, wall_s = sum(len(run.results) for run in runs), sum(run.wall_s for run in runs)
    console.print(f"{calls} calls simulated in {wall_s:.1f} s, {calls / max(wall_s, 1e-9) * 60:.0f} a minute")


def _head(order: Order) -> dict[str, object]:
    """What makes the runs what they are; paths by name only, so that another folder changes nothing."""
    return {
        "policy": order.policy.name,
        "fleet": order.fleet.name,
        "workload": order.workload.name,
        "seed": order.seed,
        "until_s": order.until_s,
        "signal_age_s": order.signal_age_s,
    }
