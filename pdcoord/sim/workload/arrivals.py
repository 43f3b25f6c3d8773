"""When calls are sent: stages of a rate, evenly or by chance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal, Protocol

from pydantic import Field, model_validator

from pdcoord.policy.values import Spec
from pdcoord.sim.workload.draws import Shares, mix, unit

ARRIVALS_MAX = 10_000_000


class StageSpec(Spec):
    """One stretch of time at one rate."""

    rate: float = Field(ge=0, le=1_000_000, description="Arrivals per second; 0 is a pause.")
    duration: float = Field(gt=0, le=31_536_000, description="Length in seconds.")


class LoadSpec(Spec):
    """Arrivals over time, with the keys of inference-perf's `load`."""

    type: Literal["poisson", "constant"] = Field(
        default="poisson",
        description="constant: evenly. poisson: by chance, as many in each stage as its rate says.",
    )
    stages: tuple[StageSpec, ...] = Field(
        min_length=1, max_length=10_000, description="Stages, one after another."
    )

    @model_validator(mode="after")
    def _check(self) -> "LoadSpec":
        count = sum(stage.rate * stage.duration for stage in self.stages)
        if count > ARRIVALS_MAX:
            raise ValueError(f"has {count:.0f} arrivals, expected at most {ARRIVALS_MAX}; shorten a stage")
        if count < 0.5:
            raise ValueError("has no arrival; raise a rate or a duration")
        return self


class Times(Protocol):
    """Arrivals in order, in seconds from the start; the same at every iteration."""

    def __iter__(self) -> Iterator[float]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Stage:
    """`count` arrivals in [start_s, start_s + duration_s)."""

    start_s: float
    duration_s: float
    count: int


class StagedTimes:
    """Times of a load.

    A Poisson process that is known to have n arrivals in a stage has them at n independent uniform times;
    so the rate of each stage is met to the last call, and the seed decides only when.
    """

    def __init__(self, load: LoadSpec, seed: int, rate_factor: float = 1.0) -> None:
        self.is_even = load.type == "constant"
        self._seed = seed
        self.stages: list[Stage] = []
        start_s = 0.0
        due = 0.0
        given = 0
        for stage in load.stages:
            due += stage.rate * stage.duration * rate_factor
            count = round(due) - given  # What one stage rounds away the next one has.
            given += count
            self.stages.append(Stage(start_s, stage.duration, count))
            start_s += stage.duration
        self.duration_s = start_s

    def __len__(self) -> int:
        return sum(stage.count for stage in self.stages)

    def __iter__(self) -> Iterator[float]:
        rng = Random(self._seed)  # noqa: S311  # traffic is not a secret
        for stage in self.stages:
            if self.is_even:
                gap_s = stage.duration_s / max(1, stage.count)
                yield from (stage.start_s + index * gap_s for index in range(stage.count))
                continue
            left = 1.0  # Share of the stage after the last arrival; order statistics one by one.
            for waiting in range(stage.count, 0, -1):
                left *= rng.random() ** (1.0 / waiting)
                yield stage.start_s + (1.0 - left) * stage.duration_s


class DealtTimes:
    """The arrivals of a load that fall to one of several takers by their weights."""

    def __init__(self, times: StagedTimes, weights: Sequence[float], taker: int, seed: int) -> None:
        self._times = times
        self._shares = Shares(weights)
        self._taker = taker
        self._seed = mix(seed, 1)

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[float]:
        at, seed, taker = self._shares.at, self._seed, self._taker
        for number, at_s in enumerate(self._times):
            if at(unit(seed, number)) == taker:
                yield at_s
