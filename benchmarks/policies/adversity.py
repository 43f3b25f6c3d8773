"""What trouble costs: mixed traffic at one rate, with and without it, ours beside the best rivals."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.policies import trouble
from benchmarks.policies.jobs import Done, Job, Pool
from benchmarks.policies.suite import MODEL, VENDORS, goodput

NONE = "no trouble"


def study(
    pool: Pool,
    labels: Sequence[str],
    rate: float,
    plan: tuple[int, float, Path | None],
    told: Callable[[Done], None],
) -> dict[str, Any]:
    """Goodput and TTFT by trouble and router; `plan` is seeds, seconds and the folder of traces."""
    seeds, seconds, traces = plan
    kinds = ("", *trouble.KINDS)
    jobs = [
        Job(VENDORS, MODEL, label, "mix", rate, seed, seconds, trouble=kind, traces=traces)
        for kind in kinds
        for label in labels
        for seed in range(seeds)
    ]
    runs = pool.run(jobs, told)
    found: dict[str, Any] = {"rate": rate, "kinds": {}}
    for kind in kinds:
        found["kinds"][kind or NONE] = {
            label: _figures([d for d in runs if d.job.trouble == kind and d.job.router == label])
            for label in labels
        }
    return found


def _figures(runs: Sequence[Done]) -> dict[str, float]:
    values = [goodput(done) for done in runs]
    return {
        "goodput_per_s": statistics.fmean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "ttft_p99_s": statistics.fmean(done.summary["ttft"]["p99"] for done in runs),
        "failed": statistics.fmean(done.summary["failed"] for done in runs),
        "shed": statistics.fmean(done.summary["shed"] for done in runs),
    }
