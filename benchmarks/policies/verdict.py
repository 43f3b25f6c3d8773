"""Ours over the best rival of each column, from goodput that was measured with the same seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

from pdcoord.sim.routers.registry import SPLITTING
from pdcoord.sim.study.contenders import CROSSING
from pdcoord.sim.study.results import OURS

CONFIDENCE = 0.95
SPREAD_SHARE_MIN = 0.02
"""Of the best rival's mean: few seeds may lie closer together by luck than more would."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One column of one workload.

    Attributes:
        best: the rival with the best mean goodput of those that were run with every seed.
        ratio: of mean goodput, ours over the best rival's.
        low, high: interval of `CONFIDENCE` for the ratio; None with one seed.
        by_seed: the ratio of each seed.
    """

    best: str
    ratio: float
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]

    @property
    def stdev(self) -> float:
        return statistics.stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0

    @property
    def spread(self) -> str:
        """In words, as bars and tables have it."""
        count = len(self.by_seed)
        if self.low is None or self.high is None:
            return "1 seed"
        between = f"{CONFIDENCE:.0%} within {self.low:.3f} to {self.high:.3f}"
        of_seeds = f"{count} seeds {min(self.by_seed):.3f} to {max(self.by_seed):.3f}, stdev {self.stdev:.3f}"
        return f"{between}; {of_seeds}"


def columns(labels: Iterable[str]) -> dict[str, list[str]]:
    """Rivals' labels by column; one that never splits is the same in both."""
    rivals = [label for label in dict.fromkeys(labels) if label != OURS]
    return {
        "one vendor": [label for label in rivals if not label.endswith(CROSSING)],
        "as if they could cross": [label for label in rivals if label not in SPLITTING],
    }


def verdicts(finals: Mapping[str, Any]) -> dict[str, Verdict]:
    """By column; `finals` has the peak of each router by label, as the results have it."""
    ours = finals[OURS]["peak"]["seeds"]
    found: dict[str, Verdict] = {}
    for column, labels in columns(deciders(finals)).items():
        best = max(labels, key=lambda label: finals[label]["peak"]["mean"])
        found[column] = compare(best, ours, finals[best]["peak"]["seeds"])
    return found


def compare(best: str, ours: Sequence[float], theirs: Sequence[float]) -> Verdict:
    """Goodput of both, in the order of seeds.

    The interval is that of a ratio of means over pairs (Cochran, Sampling Techniques, 3rd edition, 6.3): the
    deviation of ours from ratio times theirs, by Student's t.
    """
    whole = max(statistics.fmean(theirs), 1e-9)
    ratio = statistics.fmean(ours) / whole
    by_seed = tuple(mine / max(other, 1e-9) for mine, other in zip(ours, theirs, strict=True))
    count = len(by_seed)
    if count == 1:
        return Verdict(best, ratio, None, None, by_seed)
    left = [mine - ratio * other for mine, other in zip(ours, theirs, strict=True)]
    squared = sum(each * each for each in left) / (count - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(squared / count) / whole
    return Verdict(best, ratio, ratio - half, ratio + half, by_seed)


def deciders(finals: Mapping[str, Any]) -> list[str]:
    """Ours, and rivals that were run with as many seeds."""
    count = len(finals[OURS]["peak"]["seeds"])
    return [label for label, own in finals.items() if len(own["peak"]["seeds"]) == count]


def undecided(finals: Mapping[str, Any], seeds: int) -> list[str]:
    """Who must be run with more seeds before anybody can be called the best rival.

    Ours, and of each column whoever lacks seeds and is either the best so far or so near that the spread of
    their seeds could make it the best.
    """
    chosen = [OURS]
    for labels in columns(finals).values():
        peaks = {label: finals[label]["peak"] for label in labels}
        best = max(peaks.values(), key=lambda peak: peak["mean"])
        for label, peak in peaks.items():
            spread = max(peak["stdev"], best["stdev"], SPREAD_SHARE_MIN * best["mean"])
            if peak["mean"] + spread >= best["mean"]:
                chosen.append(label)
    return [label for label in dict.fromkeys(chosen) if len(finals[label]["peak"]["seeds"]) < seeds]
