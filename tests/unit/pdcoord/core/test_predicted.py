"""Predictions run out, are bounded, and leave nothing behind."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdcoord.core import predicted
from pdcoord.core.predicted import PREDICTION_S_MAX, Predictions
from pdcoord.core.request import BlockKey

KEYS = tuple(BlockKey(key) for key in range(6))
keys = st.lists(st.sampled_from(KEYS), unique=True, max_size=6).map(tuple)
ordinals = st.sampled_from([0, 1, 70])


class PredictionsMachine(RuleBasedStateMachine):
    """Every operation beside a table of when each prediction ends."""

    def __init__(self) -> None:
        super().__init__()
        self.predictions = Predictions()
        self.until_s: dict[tuple[int, BlockKey], float] = {}
        self.now_s = 0.0

    @rule(ordinal=ordinals, keys=keys)
    def note(self, ordinal: int, keys: tuple[BlockKey, ...]) -> None:
        self.predictions.note(ordinal, keys, self.now_s)
        self.until_s |= {(ordinal, key): self.now_s + PREDICTION_S_MAX for key in keys}

    @rule(ordinal=ordinals)
    def forget(self, ordinal: int) -> None:
        self.predictions.forget(ordinal)
        self.until_s = {each: until_s for each, until_s in self.until_s.items() if each[0] != ordinal}

    @rule(passed_s=st.sampled_from([0.0, 1.0, 2.5, 6.0]))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.predictions.expire(self.now_s)
        self.until_s = {each: until_s for each, until_s in self.until_s.items() if until_s > self.now_s}

    @invariant()
    def agrees(self) -> None:
        self.predictions.validate()
        expected: dict[BlockKey, int] = {}
        for ordinal, key in self.until_s:
            expected[key] = expected.get(key, 0) | 1 << ordinal
        assert self.predictions.holders == expected


TestPredictions = PredictionsMachine.TestCase
TestPredictions.settings = settings(max_examples=50, stateful_step_count=30)


def test_the_oldest_go_past_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "PREDICTED_BLOCKS_MAX", 4)
    predictions = Predictions()
    predictions.note(0, KEYS[:3], 0.0)
    predictions.note(1, KEYS[3:5], 0.0)
    assert predictions.holders == {KEYS[3]: 2, KEYS[4]: 2}
    predictions.note(2, KEYS, 0.0)
    assert predictions.holders == dict.fromkeys(KEYS[:4], 4)
    predictions.validate()
