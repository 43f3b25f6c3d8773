"""Raises the rate for each contender until it has seen its best, with all contenders in step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.policies.jobs import Done, Job, Pool

DECLINES_MAX = 2
"""Rates in a row that were worse than the best, after which a contender is done."""
STEPS_MAX = 14
NOISE = 0.01
"""Gains below this share are none."""
LASTS_SHARE = 0.9
"""Of a run's time: where a trace, speeded up, ends before, what is counted is a burst at its end."""

Metric = Callable[[Done], float]


@dataclass(slots=True)
class Climb:
    """One contender on one workload.

    Attributes:
        step: the factor from one rate to the next.
        is_used_up: its trace does not last at the next rate.
    """

    base: Job
    step: float
    done: list[Done] = field(default_factory=list)
    is_used_up: bool = False

    def best(self, metric: Metric) -> Done:
        return max(self.done, key=metric)

    def next_rate(self, metric: Metric) -> float | None:
        """The next rate worth trying; None when the best has been seen."""
        if not self.done:
            return self.base.rate
        if self.is_used_up or len(self.done) >= STEPS_MAX:
            return None
        best = max(metric(done) for done in self.done)
        first = next(i for i, done in enumerate(self.done) if metric(done) >= best * (1 - NOISE))
        if best > 0 and len(self.done) - 1 - first >= DECLINES_MAX:
            return None
        return self.done[-1].job.rate * self.step


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
            each.is_used_up = done.summary["last_at_s"] < LASTS_SHARE * done.job.seconds
            if not each.is_used_up or not each.done:
                each.done.append(done)
