"""Blocks that an endpoint was just sent and has not yet told of: taken as cached for a few seconds."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdcoord.core.request import BlockKey

PREDICTION_S_MAX = 5.0
"""How long routing alone counts as caching. Dynamo's predict-on-route keeps its predictions as long."""

PREDICTED_BLOCKS_MAX = 262_144
"""Bound on what is predicted of one model at a time; past it the oldest predictions go first."""


@dataclass(frozen=True, slots=True)
class _Prediction:
    ordinal: int
    keys: tuple[BlockKey, ...]
    until_s: float


class Predictions:
    """Keys by the endpoints that are predicted to hold them, each until its time is up."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._until_s: dict[int, dict[BlockKey, float]] = {}
        self._queue: deque[_Prediction] = deque()
        self._queued_blocks = 0

    @property
    def holders(self) -> Mapping[BlockKey, int]:
        """Bit mask of endpoint ordinals by key; current as of the last `expire`."""
        return self._holders

    def ordinals(self) -> set[int]:
        """Of the endpoints that something is predicted of."""
        return set(self._until_s)

    def note(self, ordinal: int, keys: Sequence[BlockKey], now_s: float) -> None:
        """Take keys as held by an endpoint from now on."""
        if not keys:
            return
        kept = tuple(keys[:PREDICTED_BLOCKS_MAX])
        until_s = now_s + PREDICTION_S_MAX
        self._queue.append(_Prediction(ordinal, kept, until_s))
        self._queued_blocks += len(kept)
        bit, untils, holders = 1 << ordinal, self._until_s.setdefault(ordinal, {}), self._holders
        for key in kept:
            untils[key] = until_s
            holders[key] = holders.get(key, 0) | bit
        while self._queued_blocks > PREDICTED_BLOCKS_MAX:
            self._end(self._queue.popleft())

    def expire(self, now_s: float) -> None:
        """Drop what its time is up for; work is in proportion to what was noted."""
        queue = self._queue
        while queue and queue[0].until_s <= now_s:
            self._end(queue.popleft())

    def forget(self, ordinal: int) -> None:
        """Drop all that an endpoint was predicted to hold; its place in the queue runs out by itself."""
        bit = 1 << ordinal
        for key in self._until_s.pop(ordinal, ()):
            self._release(key, bit)

    def validate(self) -> None:
        """Assert that keys, endpoints and the queue agree."""
        expected: dict[BlockKey, int] = {}
        for ordinal, untils in self._until_s.items():
            for key in untils:
                expected[key] = expected.get(key, 0) | 1 << ordinal
        assert self._holders == expected, "predicted holders and endpoints disagree"
        assert self._queued_blocks == sum(len(each.keys) for each in self._queue), "queued blocks miscounted"
        queued = {(each.ordinal, key) for each in self._queue for key in each.keys}
        held = {(ordinal, key) for ordinal, untils in self._until_s.items() for key in untils}
        assert held <= queued, "a prediction that never ends"

    def _end(self, prediction: _Prediction) -> None:
        self._queued_blocks -= len(prediction.keys)
        untils = self._until_s.get(prediction.ordinal)
        if untils is None:
            return
        bit = 1 << prediction.ordinal
        for key in prediction.keys:
            # A later prediction of the same key keeps it.
            if untils.get(key, prediction.until_s + 1.0) <= prediction.until_s:
                del untils[key]
                self._release(key, bit)
        if not untils:
            del self._until_s[prediction.ordinal]

    def _release(self, key: BlockKey, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]
