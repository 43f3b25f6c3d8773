"""Approximate prefix index: which endpoint was sent which blocks, bounded by an LRU per endpoint."""

from collections import OrderedDict
from collections.abc import Container, Sequence

from pdcoord.core.request import BlockKey

FEW_BITS = 8
"""Up to so many bits of a mask are found faster one by one than in its digits, at 1,000 endpoints."""


class PrefixIndex:
    """Longest cached prefix on every endpoint, found in one walk over the prompt's keys.

    Holders of a block are bits of one integer, so a walk costs one AND per block whatever the
    number of endpoints.
    """

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._held: dict[int, OrderedDict[BlockKey, None]] = {}

    @property
    def block_count(self) -> int:
        return len(self._holders)

    def match(self, keys: Sequence[BlockKey]) -> dict[int, int]:
        """Blocks of the longest matching prefix by endpoint ordinal; endpoints with none are absent."""
        matched: dict[int, int] = {}
        alive = -1
        depth = 0
        for key in keys:
            still = alive & self._holders.get(key, 0)
            if depth and still != alive:
                mark_depth(matched, alive ^ still, depth)
            alive = still
            if not alive:
                return matched
            depth += 1
        if depth:
            mark_depth(matched, alive, depth)
        return matched

    def depth(self, ordinal: int, keys: Sequence[BlockKey]) -> int:
        """Blocks of the longest prefix that one endpoint holds."""
        held: Container[BlockKey] = self._held.get(ordinal, ())
        for index, key in enumerate(keys):
            if key not in held:
                return index
        return len(keys)

    def record(self, ordinal: int, keys: Sequence[BlockKey], blocks_max: int) -> None:
        """Note that an endpoint holds these blocks, and forget its oldest past `blocks_max`."""
        held, holders = self._held.setdefault(ordinal, OrderedDict()), self._holders
        bit, mask_of, refresh = 1 << ordinal, holders.get, held.move_to_end
        keys = keys[:blocks_max]
        # What is held of a chain is its front: it is younger than the rest whenever both are recorded.
        known = 0
        for key in keys:
            if key not in held:
                break
            known += 1
        # Last block first, so that the front of a prefix, without which the rest is worth nothing,
        # is always the youngest and goes last.
        for key in reversed(keys[known:]):
            held[key] = None
            mask = mask_of(key)
            holders[key] = bit if mask is None else mask | bit
        for key in reversed(keys[:known]):
            refresh(key)
        while len(held) > blocks_max:
            key, _ = held.popitem(last=False)
            self._release(key, bit)

    def forget(self, ordinal: int) -> None:
        """Drop all that an endpoint held."""
        for key in self._held.pop(ordinal, ()):
            self._release(key, 1 << ordinal)

    def validate(self) -> None:
        """Assert that both directions of the index agree."""
        expected: dict[BlockKey, int] = {}
        for ordinal, held in self._held.items():
            for key in held:
                expected[key] = expected.get(key, 0) | 1 << ordinal
        assert self._holders == expected, "holders and held blocks disagree"

    def _release(self, key: BlockKey, bit: int) -> None:
        left = self._holders[key] & ~bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]


def mark_depth(matched: dict[int, int], bits: int, depth: int) -> None:
    """Note a depth for every endpoint whose ordinal is a bit of `bits`."""
    if bits.bit_count() <= FEW_BITS:
        while bits:
            lowest = bits & -bits
            matched[lowest.bit_length() - 1] = depth
            bits ^= lowest
        return
    # Binary digits, lowest first: finding the next "1" in them beats big-integer arithmetic per bit.
    digits = f"{bits:b}"[::-1]
    ordinal = digits.find("1")
    while ordinal >= 0:
        matched[ordinal] = depth
        ordinal = digits.find("1", ordinal + 1)
