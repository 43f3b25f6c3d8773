"""Routing in the simulator: the published table, rivals on every workload, trouble; bars decide the exit."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.policies import adversity, bars, report, seedtable, suite
from benchmarks.policies.jobs import Done, Pool
from benchmarks.policies.journal import Journal, OtherCodeError, fingerprint
from benchmarks.policies.page import RESULTS
from benchmarks.policies.verdict import deciders, verdicts
from benchmarks.policies.workloads import SUITE, TRACES
from pdcoord.sim.study.results import OURS

KEYS = {"seed": "seed_table", "suite": "suite", "adversity": "adversity"}
"""Parts by their names in the file."""
PARTS = tuple(KEYS)
TABLE_SEEDS_QUICK = 10
"""Near saturation times to the first token of one seed and another differ by two, and a run takes seconds."""
TROUBLE_SEEDS_QUICK = 3
QUICK_RIVALS = (
    "round-robin",
    "least-request",
    "llm-d",
    "llm-d-precise",
    "cache-aware",
    "least-load",
    "dynamo-agg",
    "dynamo",
    "dynamo-conditional",
    "llm-d-pd",
    "mooncake",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="shorter runs, coarser climbs, the rivals that matter most"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help="of each part (default 20; --quick: 10 for the table, 3 under trouble)",
    )
    parser.add_argument("--seconds", type=float, help="arrivals of each run (default 60, with --quick 20)")
    parser.add_argument(
        "--only",
        choices=PARTS,
        action="append",
        help="run this part only, and keep what the file has of the others; may be repeated",
    )
    parser.add_argument(
        "--workload",
        choices=SUITE,
        action="append",
        help="of the suite, keeping what the file has of others; may be repeated",
    )
    parser.add_argument(
        "--traces", type=Path, metavar="FOLDER", help=f"where {' and '.join(TRACES.values())} lie"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="keeps every run that is done; named again after an interruption, it spares them",
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    if any(value is not None and value <= 0 for value in (options.seeds, options.seconds, options.workers)):
        parser.error("every number must be positive")
    return options


def plan_of(options: argparse.Namespace) -> suite.Plan:
    is_quick, seeds = options.quick, options.seeds or 20
    return suite.Plan(
        rivals=QUICK_RIVALS if is_quick else suite.all_rivals(),
        seeds=seeds,
        seeds_first=min(seeds, 3 if is_quick else 5),
        seconds=options.seconds or (20.0 if is_quick else 60.0),
        finalists=3 if is_quick else 4,
        step=1.6 if is_quick else 1.3,
        traces=options.traces,
    )


def workloads_of(options: argparse.Namespace) -> list[str]:
    chosen = options.workload or list(SUITE)
    if options.traces is None:
        for name in TRACES:
            if name in chosen:
                print(f"{name} is left out: its trace is not given with --traces", file=sys.stderr)
        chosen = [name for name in chosen if name not in TRACES]
    return list(dict.fromkeys(chosen))


def kept(options: argparse.Namespace) -> dict[str, Any]:
    """What the file has of parts and workloads that are not run."""
    if (options.only is None and options.workload is None) or not options.json.exists():
        return {}
    found: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))
    settings = found.get("settings", {})
    if "rivals" in settings.get("suite", {}):
        # A file from before workloads could be run in pieces says it once for all.
        settings["suite"] = dict.fromkeys(found.get("suite", {}), settings["suite"])
    run_anew = {KEYS[part] for part in parts_of(options)} - ({"suite"} if options.workload else set())
    return {key: value for key, value in found.items() if key not in run_anew}


def parts_of(options: argparse.Namespace) -> list[str]:
    return list(options.only or PARTS)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything asked for; the order of parts is fixed, since trouble strikes who was best before.

    Raises:
        OtherCodeError: if the journal has runs of other code.
    """
    with ExitStack() as stack:
        known, keep = None, None
        if options.journal is not None:
            journal = stack.enter_context(Journal(options.journal, fingerprint()))
            known, keep = journal.known, journal.add
        pool = Pool(options.workers, known, keep)
        stack.callback(pool.close)
        told = stack.enter_context(progress(console))
        results = _run_parts(options, pool, told)
    results["bars"] = bars.bars(results)
    return results


def _run_parts(
    options: argparse.Namespace, pool: Pool, told: Callable[[str], Callable[[Done], None]]
) -> dict[str, Any]:
    plan, parts, results = plan_of(options), parts_of(options), kept(options)
    made: dict[str, Any] = results.setdefault("settings", {})
    settings = {"is_quick": options.quick, "seconds": plan.seconds, "rivals": list(plan.rivals)}
    if "seed" in parts:
        seconds = 120.0 if options.quick else 240.0
        seeds = options.seeds or (TABLE_SEEDS_QUICK if options.quick else plan.seeds)
        results["seed_table"] = seedtable.study(pool, seeds, seconds, told("seed table"))
        made["seed_table"] = {"is_quick": options.quick, "seconds": seconds, "seeds": seeds}
    if "suite" in parts or "adversity" in parts:
        chosen = workloads_of(options) if "suite" in parts else ["mix"]
        found = results.get("suite", {}) | suite.study(pool, plan, chosen, told("suite"))
        results["suite"] = {name: found[name] for name in SUITE if name in found}
        of_suite = settings | {"seeds": plan.seeds, "seeds_first": plan.seeds_first}
        of_all = made.get("suite", {}) | dict.fromkeys(chosen, of_suite)
        made["suite"] = {name: of_all[name] for name in results["suite"]}
    if "adversity" in parts and "mix" in results["suite"]:
        finals = results["suite"]["mix"]["finals"]
        labels = [OURS, "round-robin", *deciders(finals)]
        seeds = options.seeds or (TROUBLE_SEEDS_QUICK if options.quick else plan.seeds)
        of = (seeds, plan.seconds, plan.traces)
        best = {column.best for column in verdicts(finals).values()}
        rate = max((finals[label]["peak"] for label in sorted(best)), key=lambda peak: peak["mean"])["rate"]
        results["adversity"] = adversity.study(pool, list(dict.fromkeys(labels)), rate, of, told("adversity"))
        made["adversity"] = settings | {"seeds": seeds}
    return results


class progress:  # noqa: N801 - used as a function
    """A line for each part, with the runs done of those known so far."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def __enter__(self) -> Callable[[str], Callable[[Done], None]]:
        self._progress.start()
        return self._begin

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _begin(self, name: str) -> Callable[[Done], None]:
        task = self._progress.add_task(name, total=None, note="")

        def told(done: Done) -> None:
            job = done.job
            note = f"{job.router} on {job.workload} x{job.rate:.2f}, {done.wall_s:.1f} s"
            self._progress.update(task, advance=1, note=note)

        return told


def main() -> int:
    options = parse()
    console = Console()
    started_s = time.perf_counter()
    try:
        results = run(options, console)
    except OtherCodeError as error:
        print(error, file=sys.stderr)
        return 2
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    report.show(results, console)
    missed = [bar for bar in results["bars"] if not bar["is_met"]]
    for bar in missed:
        print(f"missed: {bar['name']}: {bar['why']}")
    print(f"{time.perf_counter() - started_s:.0f} s; results in {options.json}; make plots draws them")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
