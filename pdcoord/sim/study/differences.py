"""How a replay differs from what was recorded, request by request; pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.study.statistics import Distribution, pool_of
from pdcoord.sim.study.trafficlog import Recorded


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a call went, why, and what came of it.

    Attributes:
        ttft_s: None if no first token came.
    """

    prefill: str
    decode: str
    why: str
    fate: str
    ttft_s: float | None
    cached_tokens: int

    @property
    def is_split(self) -> bool:
        return self.prefill != self.decode

    @property
    def pools(self) -> str:
        """`prefill -> decode`, or one pool where it did both; `-` where the call went nowhere."""
        prefill, decode = pool_of(self.prefill), pool_of(self.decode)
        if not decode:
            return "-"
        return f"{prefill} -> {decode}" if self.is_split else decode


@dataclass(frozen=True, slots=True)
class Difference:
    """One call under both policies."""

    name: str
    at_s: float
    prompt_tokens: int
    before: Decision
    after: Decision

    @property
    def is_changed(self) -> bool:
        """Whether it went to other pools, was split differently, or ended differently.

        Another endpoint of the same pool is no change of the decision: which of its twins is free
        depends on everything before.
        """
        return self.before.pools != self.after.pools or self.before.fate != self.after.fate

    @property
    def gained_s(self) -> float | None:
        """How much sooner its first token came; None where it came in one of the two only."""
        if self.before.ttft_s is None or self.after.ttft_s is None:
            return None
        return self.before.ttft_s - self.after.ttft_s


def differences(recorded: Sequence[Recorded], results: Iterable[CallResult]) -> list[Difference]:
    """Both side by side in the order of arrival; `results` are of the calls in `recorded`, by id."""
    by_id = {result.id: result for result in results}
    return [
        Difference(
            each.name,
            each.call.at_s,
            each.call.prompt_tokens,
            Decision(each.prefill, each.decode, each.why, each.fate, each.ttft_s, each.cached_tokens),
            _decision(by_id[each.call.id]),
        )
        for each in recorded
        if each.call.id in by_id
    ]


def _decision(result: CallResult) -> Decision:
    return Decision(
        result.prefill, result.decode, result.why, result.fate, result.ttft_s, result.cached_tokens
    )


@dataclass(frozen=True, slots=True)
class Change:
    """Calls that went one way and now go another.

    Attributes:
        gained_s: of those whose first token came both times, on average; None where there are none.
    """

    before: str
    after: str
    why: str
    count: int
    gained_s: float | None


def changes(found: Sequence[Difference]) -> list[Change]:
    """Changed decisions, grouped by what they changed from and to, most first."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for each in found:
        if each.is_changed:
            before, after = _shown(each.before), _shown(each.after)
            groups.setdefault((before, after, each.after.why), []).append(each)
    listed = [Change(*key, len(group), _mean_gain_s(group)) for key, group in groups.items()]
    return sorted(listed, key=lambda change: (-change.count, change.before, change.after, change.why))


@dataclass(frozen=True, slots=True)
class Totals:
    """One side of a replay."""

    served: int
    split: int
    cached_tokens: int
    ttft: Distribution
    fates: dict[str, int]


def totals(decisions: Sequence[Decision]) -> Totals:
    return Totals(
        served=sum(decision.fate == Fate.OK for decision in decisions),
        split=sum(decision.is_split for decision in decisions),
        cached_tokens=sum(decision.cached_tokens for decision in decisions),
        ttft=Distribution.of(d.ttft_s for d in decisions if d.ttft_s is not None),
        fates=dict(sorted(Counter(str(decision.fate) for decision in decisions).items())),
    )


def _shown(decision: Decision) -> str:
    return decision.pools if decision.fate == Fate.OK else f"{decision.pools} ({decision.fate})"


def _mean_gain_s(group: Sequence[Difference]) -> float | None:
    gains = [each.gained_s for each in group if each.gained_s is not None]
    return sum(gains) / len(gains) if gains else None
