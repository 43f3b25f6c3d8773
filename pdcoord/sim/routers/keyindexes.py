"""What a rival believes of prefix caches: by what it sent, by KV events, and by what is in use now."""

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import cast

from pdcoord.core.prefix import PrefixIndex
from pdcoord.core.request import BlockKey


class SentIndex:
    """Approximate: what was sent to a place is taken to be cached there, up to a capacity.

    Holds only every `stride`-th key of a prompt, which is the key of a block of that many: the granularity
    of the rival's own hashing. Cheap in memory and time where keys are finer than that.

    Attributes:
        block_tokens: prompt tokens of one block that is held.
    """

    def __init__(self, key_tokens: int, block_tokens: int, match_tokens_max: int) -> None:
        """`block_tokens` is rounded to keys; of a prompt no more than `match_tokens_max` are looked at."""
        self._stride = max(1, round(block_tokens / key_tokens))
        self.block_tokens = self._stride * key_tokens
        self._blocks_max = max(1, match_tokens_max // self.block_tokens)
        self._index = PrefixIndex()

    @property
    def block_count(self) -> int:
        """Different blocks that are held anywhere."""
        return self._index.block_count

    def blocks(self, keys: Sequence[int]) -> Sequence[int]:
        """What is looked at of a prompt."""
        blocks = keys if self._stride == 1 else keys[self._stride - 1 :: self._stride]
        return blocks[: self._blocks_max]

    def match(self, blocks: Sequence[int]) -> dict[int, int]:
        """Blocks of the longest matching prefix by place; places with none are absent."""
        return self._index.match(cast("Sequence[BlockKey]", blocks))

    def record(self, index: int, blocks: Sequence[int], blocks_max: int) -> None:
        """A prompt was sent to a place; its oldest blocks past `blocks_max` are forgotten."""
        self._index.record(index, cast("Sequence[BlockKey]", blocks), blocks_max)

    def forget(self, index: int) -> None:
        self._index.forget(index)


class EventIndex:
    """Precise: what KV events say, with what was just sent until its events are due.

    Attributes:
        predicted_ttl_s: how long a key that was sent counts though no event has confirmed it; None for not
            at all.
    """

    def __init__(self, keys_max: Sequence[int], predicted_ttl_s: float | None) -> None:
        """`keys_max[i]` bounds what is held of place i: an endpoint may lie about its cache."""
        self.predicted_ttl_s = predicted_ttl_s
        self._keys_max = tuple(keys_max)
        self._holders: dict[int, int] = {}
        self._stored: list[OrderedDict[int, None]] = [OrderedDict() for _ in keys_max]
        self._predicted: list[dict[int, float]] = [{} for _ in keys_max]
        self._due: deque[tuple[float, int, tuple[int, ...]]] = deque()

    @property
    def key_count(self) -> int:
        """Different keys that are held anywhere."""
        return len(self._holders)

    def match(self, keys: Sequence[int], now_s: float) -> dict[int, int]:
        """Keys of the longest matching prefix by place; places with none are absent."""
        self._expire(now_s)
        return _matched(self._holders, keys)

    def apply(self, index: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """One KV event of a place."""
        held, predicted, bit = self._stored[index], self._predicted[index], 1 << index
        for key in stored:
            held[key] = None
            predicted.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) | bit
        for key in removed:
            was_predicted = predicted.pop(key, None) is not None
            if held.pop(key, 0) is None or was_predicted:
                self._release(key, bit)
        while len(held) > self._keys_max[index]:
            key, _ = held.popitem(last=False)
            self._release(key, bit)

    def predict(self, index: int, keys: Sequence[int], now_s: float) -> None:
        """A prompt was sent to a place."""
        if self.predicted_ttl_s is None:
            return
        self._expire(now_s)
        held, predicted, bit = self._stored[index], self._predicted[index], 1 << index
        due_s = now_s + self.predicted_ttl_s
        new = tuple(key for key in keys[: self._keys_max[index] - len(predicted)] if key not in held)
        for key in new:
            predicted[key] = due_s
            self._holders[key] = self._holders.get(key, 0) | bit
        if new:
            self._due.append((due_s, index, new))

    def forget(self, index: int) -> None:
        bit = 1 << index
        for key in {**self._stored[index], **self._predicted[index]}:
            self._release(key, bit)
        self._stored[index].clear()
        self._predicted[index].clear()

    def validate(self) -> None:
        """Assert that both directions of the index agree and its bounds hold."""
        expected: dict[int, int] = {}
        for index, (held, predicted) in enumerate(zip(self._stored, self._predicted, strict=True)):
            assert not held.keys() & predicted.keys(), "a key is both stored and predicted"
            assert max(len(held), len(predicted)) <= self._keys_max[index], "more keys than the bound"
            for key in (*held, *predicted):
                expected[key] = expected.get(key, 0) | 1 << index
        assert self._holders == expected, "holders and held keys disagree"

    def _expire(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            due_s, index, keys = self._due.popleft()
            predicted, bit = self._predicted[index], 1 << index
            for key in keys:
                # Sent again since: a later entry of the queue has it.
                if predicted.get(key) == due_s:
                    del predicted[key]
                    self._release(key, bit)

    def _release(self, key: int, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]


class ActiveIndex:
    """The blocks of calls that are open on each place, each counted once however many calls share it."""

    def __init__(self, place_count: int) -> None:
        self._holders: dict[int, int] = {}
        self._uses: list[dict[int, int]] = [{} for _ in range(place_count)]

    def block_count(self, index: int) -> int:
        """Different blocks in use on a place."""
        return len(self._uses[index])

    def match(self, keys: Sequence[int]) -> dict[int, int]:
        """Leading blocks of a prompt that are in use by place; places with none are absent."""
        return _matched(self._holders, keys)

    def open(self, index: int, keys: Sequence[int]) -> None:
        uses, bit = self._uses[index], 1 << index
        for key in keys:
            count = uses.get(key, 0)
            uses[key] = count + 1
            if not count:
                self._holders[key] = self._holders.get(key, 0) | bit

    def close(self, index: int, keys: Sequence[int]) -> None:
        uses, bit = self._uses[index], 1 << index
        for key in keys:
            count = uses[key] - 1
            if count:
                uses[key] = count
                continue
            del uses[key]
            left = self._holders[key] & ~bit
            if left:
                self._holders[key] = left
            else:
                del self._holders[key]


def _matched(holders: dict[int, int], keys: Sequence[int]) -> dict[int, int]:
    matched: dict[int, int] = {}
    alive = -1
    depth = 0
    for key in keys:
        still = alive & holders.get(key, 0)
        if depth and still != alive:
            _mark(matched, alive ^ still, depth)
        alive = still
        if not alive:
            return matched
        depth += 1
    if depth:
        _mark(matched, alive, depth)
    return matched


def _mark(matched: dict[int, int], bits: int, depth: int) -> None:
    while bits:
        low = bits & -bits
        matched[low.bit_length() - 1] = depth
        bits ^= low
