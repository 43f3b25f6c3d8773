"""How long waits take beside what was predicted, so that who would wait in vain is told at once."""

from collections.abc import Container
from dataclasses import dataclass

FADE = 0.97
"""What a wait that was seen counts for after one more: about the last thirty speak."""
FACTOR_MIN, FACTOR_MAX = 0.25, 8.0
PRIOR_S = 0.5
"""Seconds of waits, predicted as they were, that stand in before any was seen."""


@dataclass(slots=True)
class _Seen:
    predicted_s: float = PRIOR_S
    waited_s: float = PRIOR_S
    longest_s: float = 0.0


class Turnover:
    """Predicted work ahead says which of two waits is longer; what it takes is learned, by model."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def factor(self, model: str) -> float:
        """What a predicted wait is to be multiplied by, FACTOR_MIN..FACTOR_MAX; 1.0 before any was seen."""
        seen = self._seen.get(model)
        if seen is None:
            return 1.0
        return min(max(seen.waited_s / seen.predicted_s, FACTOR_MIN), FACTOR_MAX)

    def wait_s(self, model: str, predicted_s: float) -> float:
        """A predicted wait as it is likely to be.

        What was learned makes it no longer than twice the longest that was seen lately: a moment in which
        nothing went on is no reason to turn people away from a queue that moves again.
        """
        seen = self._seen.get(model)
        if seen is None:
            return predicted_s
        learned_s = self.factor(model) * predicted_s
        return (
            learned_s if learned_s <= predicted_s else max(predicted_s, min(learned_s, 2.0 * seen.longest_s))
        )

    def note(self, model: str, predicted_s: float, waited_s: float) -> None:
        """A request's wait is over, with its turn or without; then it would have been at least as long."""
        seen = self._seen.setdefault(model, _Seen())
        # The prior fades into a floor: a model whose waits are all short must not divide by nothing.
        seen.predicted_s = max(FADE * seen.predicted_s + predicted_s, 1e-3)
        seen.waited_s = max(FADE * seen.waited_s + waited_s, 1e-3)
        seen.longest_s = max(FADE * seen.longest_s, waited_s)

    def keep_only(self, models: Container[str]) -> None:
        self._seen = {name: seen for name, seen in self._seen.items() if name in models}

    def validate(self) -> None:
        for seen in self._seen.values():
            assert seen.predicted_s > 0.0, seen
            assert seen.waited_s > 0.0, seen
