"""Whole deployments in virtual time, each from a seed, with every kind of trouble the simulator knows."""

import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pdcoord.core.model import LegOrder
from pdcoord.sim.scenario import draw
from pdcoord.sim.simulation import Simulation

SEEDS = 2_000
_REQUESTS = 30
_OUTPUT_TOKENS = 240
_PROGRESS_S = 15.0
_CHUNK = 8


@dataclass
class Tally:
    """What came of many seeds.

    Attributes:
        failures: seed and message of each that broke a rule.
    """

    seeds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.seeds += other.seeds
        self.outcomes.update(other.outcomes)
        self.struck.update(other.struck)
        self.refusals.update(other.refusals)
        self.resumed += other.resumed
        self.failures += other.failures

    def lines(self) -> Iterator[str]:
        """For a person to read."""
        requests = sum(self.outcomes.values())
        yield f"{self.seeds} seeds, {requests} requests, {sum(self.struck.values())} faults"
        yield "  faults    " + _listed(self.struck)
        yield "  outcomes  " + _listed(self.outcomes)
        yield "  refusals  " + _listed(self.refusals)
        yield f"  streams resumed and whole  {self.resumed}"
        for seed, message in self.failures:
            yield f"FAILED seed {seed}: {message}"
            yield f"  replay: python -m benchmarks.chaos simulation --seed {seed} --count 1"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def run_seed(seed: int) -> Tally:
    """One seed: drawn, run, and every rule checked after each event and at the end."""
    tally = Tally(seeds=1)
    scenario = draw(seed, request_count=_REQUESTS, output_tokens_max=_OUTPUT_TOKENS)
    if seed % 3 == 0:
        rules = replace(scenario.model.disaggregation, order=LegOrder.CONCURRENT)
        scenario = replace(scenario, model=replace(scenario.model, disaggregation=rules))
    simulation = Simulation(scenario)
    try:
        result = simulation.run()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is reported with its seed
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        tally.failures.append((seed, f"{type(error).__name__} at {where}: {error}"[:300]))
        return tally
    tally.outcomes.update(outcome.value for outcome in result.outcomes.elements())
    tally.struck.update(kind.value for kind in result.struck.elements())
    tally.refusals.update(reason.value for reason in result.refusals.elements())
    tally.resumed = result.resumed_count
    return tally


def run(first_seed: int, count: int) -> bool:
    """Run seeds on every core, print how far it is and what came of it; whether all rules held."""
    tally = Tally()
    begun_s = told_s = time.monotonic()
    seeds = range(first_seed, first_seed + count)
    with multiprocessing.Pool(min(os.cpu_count() or 1, count)) as pool:
        for each in pool.imap_unordered(run_seed, seeds, chunksize=min(_CHUNK, count)):
            tally.add(each)
            if time.monotonic() - told_s > _PROGRESS_S:
                told_s = time.monotonic()
                took = f"{told_s - begun_s:.0f} s"
                print(f"  {tally.seeds}/{count} seeds, {took}, {len(tally.failures)} failed", flush=True)
    for line in tally.lines():
        print(line)
    print(f"  took {time.monotonic() - begun_s:.0f} s", flush=True)
    return not tally.failures
