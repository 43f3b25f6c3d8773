"""Raises the rate for each contender until it has seen its best, with all contenders in step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.policies.jobs import Done, Job, Pool
from benchmarks.policies.workloads import lasts

DECLINES_MAX = 2
"""Rates in a row that were worse than the best, after which a contender is done."""
STEPS_MAX = 14
NOISE = 0.01
"""Gains below this share are none."""
CRASH_SHARE = 0.5
"""Of the best: what has fallen below does not come back at a higher rate."""

Metric = Callable[[Done], float]


@dataclass(slots=True)
class Climb:
    """One contender on one workload.

    Attributes:
        step: the factor from one rate to the next.
    """

    base: Job
    step: float
    done: list[Done] = field(default_factory=list)

    def best(self, metric: Metric) -> Done:
        return max(self.done, key=metric)

    def next_rate(self, metric: Metric) -> float | None:
        """The next rate worth trying; None when the best has been seen."""
        if not self.done:
            return self.base.rate
        last = self.done[-1]
        rate = last.job.rate * self.step
        if len(self.done) >= STEPS_MAX or not lasts(self.base.workload, rate, self.base.seconds):
            return None
        best = max(metric(done) for done in self.done)
        first = next(i for i, done in enumerate(self.done) if metric(done) >= best * (1 - NOISE))
        is_past = len(self.done) - 1 - first >= DECLINES_MAX or metric(last) < best * CRASH_SHARE
        return None if best > 0 and is_past else rate


def climb(
    pool: Pool, bases: Sequence[Job], metric: Metric, step: float, told: Callable[[Done], None]
) -> list[Climb]:
    """Climb from the rate of each base; in the order of `bases`."""
    climbs = [Climb(base, step) for base in bases]
    while True:
        steps = [(each, rate) for each in climbs if (rate := each.next_rate(metric)) is not None]
        if not steps:
            return climbs
        jobs = [replace(each.base, rate=rate) for each, rate in steps]
        for (each, _), done in zip(steps, pool.run(jobs, told), strict=True):
            each.done.append(done)
