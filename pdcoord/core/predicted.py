"""Blocks that an endpoint was just sent and has not yet told of: taken as cached for a few seconds."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdcoord.core.request import BlockKey

PREDICTION_S_MAX = 5.0
"""How long after its prefill a prompt counts as cached without being told of. Dynamo's predict-on-route keeps
its predictions as long."""
WAIT_S_MAX = 120.0
"""Longest wait for a prefill that is counted besides: while a prompt stands in a queue, others with the same
beginning do well to stand behind it."""

PREDICTED_BLOCKS_MAX = 262_144
"""Bound on what is predicted of one model at a time; past it those go first that end first."""


@dataclass(frozen=True, slots=True, order=True)
class _Prediction:
    until_s: float
    number: int
    ordinal: int
    keys: tuple[BlockKey, ...]


class Predictions:
    """Keys by the endpoints that are predicted to hold them, each until its time is up."""

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._until_s: dict[int, dict[BlockKey, float]] = {}
        self._queue: list[_Prediction] = []
        self._queued_blocks = 0
        self._count = 0

    @property
    def holders(self) -> Mapping[BlockKey, int]:
        """Bit mask of endpoint ordinals by key; current as of the last `expire`."""
        return self._holders

    def ordinals(self) -> set[int]:
        """Of the endpoints that something is predicted of."""
        return set(self._until_s)

    def note(self, ordinal: int, keys: Sequence[BlockKey], now_s: float, wait_s: float = 0.0) -> None:
        """Take keys as held by an endpoint from now on.

        Args:
            wait_s: until their prefill is predicted to be done.
        """
        if not keys:
            return
        kept = tuple(keys[:PREDICTED_BLOCKS_MAX])
        until_s = now_s + min(wait_s, WAIT_S_MAX) + PREDICTION_S_MAX
        self._count += 1
        heapq.heappush(self._queue, _Prediction(until_s, self._count, ordinal, kept))
        self._queued_blocks += len(kept)
        bit, untils, holders = 1 << ordinal, self._until_s.setdefault(ordinal, {}), self._holders
        for key in kept:
            untils[key] = max(until_s, untils.get(key, 0.0))
            holders[key] = holders.get(key, 0) | bit
        while self._queued_blocks > PREDICTED_BLOCKS_MAX:
            self._end(heapq.heappop(self._queue))

    def expire(self, now_s: float) -> None:
        """Drop what its time is up for; work is in proportion to what was noted."""
        queue = self._queue
        while queue and queue[0].until_s <= now_s:
            self._end(heapq.heappop(queue))

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
