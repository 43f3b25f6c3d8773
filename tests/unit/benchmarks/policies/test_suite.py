"""Who is run with how many seeds, on goodput that is made up."""

from collections.abc import Callable, Sequence
from random import Random

from benchmarks.policies.jobs import Done, Job, Pool
from benchmarks.policies.suite import START_RATES, Plan, study
from benchmarks.policies.verdict import verdicts

START = START_RATES["chat"]
PEAKS = {
    "pdcoord": 100.0,
    "round-robin": 20.0,
    "llm-d": 80.0,
    "dynamo": 79.0,
    "dynamo+cross": 60.0,
    "least-load": 50.0,
    "mooncake": 40.0,
    "mooncake+cross": 90.0,
}


class MadeUp(Pool):
    """Runs nothing: goodput rises to each router's peak at 4 times the start and falls behind it."""

    def __init__(self, spread: float) -> None:
        self.known = {}
        self.made: list[Job] = []
        self._spread = spread

    def run(self, jobs: Sequence[Job], told: Callable[[Done], None]) -> list[Done]:
        for job in jobs:
            if job not in self.known:
                self.made.append(job)
                self.known[job] = Done(
                    job, {"goodput_per_s": self._goodput(job), "offered_per_s": job.rate}, 0.0
                )
            told(self.known[job])
        return [self.known[job] for job in jobs]

    def _goodput(self, job: Job) -> float:
        shape = {1: 0.4, 2: 0.8, 4: 1.0, 8: 0.5}.get(round(job.rate / START), 0.3)
        noise = Random(f"{job.router} {job.seed}").uniform(-self._spread, self._spread)
        return PEAKS[job.router] * shape * (1 + noise)


def seeds_of(pool: MadeUp) -> dict[str, dict[int, int]]:
    """How many seeds were run, by router and factor of the start rate."""
    found: dict[str, dict[int, int]] = {}
    for job in pool.made:
        own = found.setdefault(job.router, {})
        factor = round(job.rate / START)
        own[factor] = own.get(factor, 0) + 1
    return found


def plan(seeds: int, finalists: int = 2) -> Plan:
    rivals = [label for label in PEAKS if label != "pdcoord" and "+" not in label]
    return Plan(rivals, seeds, min(3, seeds), 20.0, finalists, 2.0, None)


def test_only_those_that_decide_are_run_with_every_seed_and_only_at_their_best() -> None:
    pool = MadeUp(0.001)
    found = study(pool, plan(10), ["chat"], lambda _: None)["chat"]
    seeds = seeds_of(pool)
    assert seeds["pdcoord"] == {1: 1, 2: 3, 4: 10, 8: 1, 16: 1}
    # As near to the best in one vendor as to be it with other seeds, and the best as if it could cross.
    assert {label for label in seeds if seeds[label][4] == 10} == {
        "pdcoord",
        "llm-d",
        "dynamo",
        "mooncake+cross",
    }
    assert seeds["round-robin"] == {1: 1, 2: 3, 4: 3, 8: 1, 16: 1}
    assert seeds["least-load"] == {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}
    assert {column.best for column in verdicts(found["finals"]).values()} == {"llm-d", "mooncake+cross"}
    assert [len(column.by_seed) for column in verdicts(found["finals"]).values()] == [10, 10]


def test_no_run_is_made_twice() -> None:
    pool = MadeUp(0.1)
    study(pool, plan(10), ["chat"], lambda _: None)
    assert len(pool.made) == len(set(pool.made))


def test_runs_made_before_are_not_made_again_and_give_the_same() -> None:
    first, second = MadeUp(0.1), MadeUp(0.1)
    found = study(first, plan(10), ["chat"], lambda _: None)
    second.known = dict(list(first.known.items())[:40])
    assert study(second, plan(10), ["chat"], lambda _: None) == found
    assert len(second.made) == len(first.made) - 40


def test_nobody_without_every_seed_may_still_be_the_best() -> None:
    for finalists in (1, 2, 5):
        pool = MadeUp(0.3)
        finals = study(pool, plan(12, finalists), ["chat"], lambda _: None)["chat"]["finals"]
        for column in verdicts(finals).values():
            best = finals[column.best]["peak"]
            others = [own["peak"] for own in finals.values() if len(own["peak"]["seeds"]) < 12]
            assert all(own["mean"] < best["mean"] for own in others)


def test_one_seed_is_enough_for_a_verdict() -> None:
    pool = MadeUp(0.0)
    found = study(pool, plan(1), ["chat"], lambda _: None)["chat"]
    assert len(pool.made) == 8 * 5
    assert verdicts(found["finals"])["one vendor"].ratio == 100 / 80
