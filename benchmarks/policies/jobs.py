"""One simulated run as a job for a process, and the pool that runs many of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.policies import trouble
from benchmarks.policies.fleets import stage
from benchmarks.policies.workloads import traffic
from pdcoord.sim.study.contenders import contender, run_on
from pdcoord.sim.study.lines import summary_data
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.study.statistics import summarize

GRACE_S = 60.0
"""What has not ended so long after the last arrival counts as unfinished."""
WAITING_MAX = 4
"""Jobs handed to the pool ahead of time, for each worker."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run.

    Attributes:
        vendors: letters of `fleets.VENDORS`.
        rate: factor of the workload's own rates.
        seconds: how long calls begin; traces are cut to as much.
        trouble: a name of `trouble.KINDS`, or "".
        is_whole: let every call end; else the run ends `GRACE_S` after the last arrival.
    """

    vendors: str
    model: str
    router: str
    workload: str
    rate: float
    seed: int
    seconds: float
    trouble: str = ""
    is_whole: bool = False
    traces: Path | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A job with what its results add up to.

    Attributes:
        summary: as `summary_data` has it, of the calls that arrive after the first third, while caches
            and batches neither fill nor empty; `steady_tokens_per_s` is what was generated in that time.
    """

    job: Job
    summary: dict[str, Any]
    wall_s: float


def run(job: Job) -> Done:
    """Run one job here."""
    started_s = perf_counter()
    own = stage(job.vendors, job.model)
    workload = traffic(job.workload, job.rate, job.seed, job.seconds, job.traces)
    if job.trouble:
        own = replace(own, scene=trouble.strike(own.scene, job.trouble, job.seed, job.seconds))
    until_s = None if job.is_whole else job.seconds + GRACE_S
    results = run_on(own, contender(job.router), workload, seed=job.seed, until_s=until_s)
    from_s = job.seconds / 3
    counted = [each for each in results if from_s <= each.at_s < job.seconds]
    summary = summary_data(summarize(counted))
    tokens = sum(_tokens_within(each, from_s, job.seconds) for each in results)
    summary["steady_tokens_per_s"] = tokens / (job.seconds - from_s)
    return Done(job, summary, perf_counter() - started_s)


def _tokens_within(result: CallResult, from_s: float, to_s: float) -> float:
    """Tokens of a served answer that came in that time, as if it had come evenly."""
    if result.fate is not Fate.OK or result.first_s is None or result.ended_s is None:
        return 0.0
    took_s = max(result.ended_s - result.first_s, 1e-9)
    within_s = min(result.ended_s, to_s) - max(result.first_s, from_s)
    return result.output_tokens * max(0.0, within_s) / took_s


class Pool:
    """Runs jobs in processes, a bounded number ahead, and tells of each that is done.

    Attributes:
        known: runs that need not be made again; those that are made join them.
    """

    def __init__(
        self,
        workers: int | None = None,
        known: Mapping[Job, Done] | None = None,
        keep: Callable[[Done], None] | None = None,
    ) -> None:
        """`keep` hears of every run that was made, when it ends."""
        self._workers = workers or os.cpu_count() or 1
        self._executor = ProcessPoolExecutor(self._workers)
        self.known = dict(known or {})
        self._keep = keep

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], told: Callable[[Done], None]) -> list[Done]:
        """All of them; in the order of `jobs`, whatever the order in which they end."""
        for job in jobs:
            if job in self.known:
                told(self.known[job])
        left = iter([job for job in dict.fromkeys(jobs) if job not in self.known])
        running: set[Future[Done]] = set()
        while True:
            running |= {
                self._executor.submit(run, job)
                for job in islice(left, self._workers * WAITING_MAX - len(running))
            }
            if not running:
                return [self.known[job] for job in jobs]
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                done = future.result()
                self.known[done.job] = done
                if self._keep is not None:
                    self._keep(done)
                told(done)
