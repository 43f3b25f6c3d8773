"""Approximate prefix index: which endpoint was sent which blocks, bounded by an LRU per endpoint."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count

from pdcoord.core.request import BlockKey

FEW_BITS = 8
"""Up to so many bits of a mask are found faster one by one than in its digits, at 1,000 endpoints."""

_Run = tuple[BlockKey, ...]


class _Held:
    """The blocks of one endpoint in runs of a chain, longest unused first.

    Of a prompt the last block is forgotten first, so that of each chain the front is held. Each use makes one
    run of the whole chain, and leaves the rest of those that it took from as old as they were: to keep an
    order of single blocks took a quarter of a decision.

    Attributes:
        block_count: in all runs.
    """

    __slots__ = ("_begins", "_numbers", "_runs", "block_count")

    def __init__(self) -> None:
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._begins: dict[BlockKey, int] = {}
        self._numbers = count()
        self.block_count = 0

    def depth(self, keys: _Run) -> int:
        """How many leading keys are held."""
        return sum(shared for _, shared in self._along(keys))

    def use(self, keys: _Run) -> _Run:
        """Make a chain the youngest, its front last; what was not held of it is returned."""
        depth = 0
        for number, shared in self._along(keys):
            self._take_front(number, shared)
            depth += shared
        if keys:
            number = next(self._numbers)
            self._runs[number] = keys
            self._begins[keys[0]] = number
        new = keys[depth:]
        self.block_count += len(new)
        return new

    def take_oldest(self, most: int) -> _Run:
        """Forget up to `most` blocks of those that were unused for longest; at least one."""
        number, run = next(iter(self._runs.items()))
        left, taken = run[:-most], run[-most:]
        if left:
            self._runs[number] = left
        else:
            self._take_front(number, len(run))
        self.block_count -= len(taken)
        return taken

    def runs(self) -> Iterable[_Run]:
        return self._runs.values()

    def _along(self, keys: _Run) -> list[tuple[int, int]]:
        """The runs that keys go along, each once, from their front, with how much of each."""
        found: dict[int, int] = {}
        depth = 0
        while depth < len(keys):
            number = self._begins.get(keys[depth])
            if number is None or number in found:
                break
            run = self._runs[number]
            part = keys[depth : depth + len(run)]
            shared = len(run)
            if part != run:
                pairs = enumerate(zip(part, run, strict=False))
                shared = next((at for at, (a, b) in pairs if a != b), len(part))
            found[number] = shared
            depth += shared
        return list(found.items())

    def _take_front(self, number: int, length: int) -> None:
        """Take the first blocks out of a run, perhaps all; the rest stays as old as it is."""
        run = self._runs[number]
        # Of keys that are no chain another run may begin alike.
        if self._begins.get(run[0]) == number:
            del self._begins[run[0]]
        if length == len(run):
            del self._runs[number]
        else:
            self._runs[number] = run[length:]
            self._begins[run[length]] = number


class PrefixIndex:
    """Longest cached prefix on every endpoint, found in one walk over the prompt's keys.

    Holders of a block are bits of one integer, so a walk costs one AND per block whatever the
    number of endpoints.
    """

    def __init__(self) -> None:
        self._holders: dict[BlockKey, int] = {}
        self._held: dict[int, _Held] = {}

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
        held = self._held.get(ordinal)
        return held.depth(tuple(keys)) if held is not None else 0

    def record(self, ordinal: int, keys: Sequence[BlockKey], blocks_max: int) -> None:
        """Note that an endpoint holds these blocks, and forget its oldest past `blocks_max`.

        Args:
            keys: of a prompt's blocks; each stands for all before it, too.
        """
        held = self._held.get(ordinal)
        if held is None:
            held = self._held[ordinal] = _Held()
        bit, holders = 1 << ordinal, self._holders
        mask_of = holders.get
        for key in held.use(tuple(keys[:blocks_max])):
            holders[key] = mask_of(key, 0) | bit
        while held.block_count > blocks_max:
            self._release(held.take_oldest(held.block_count - blocks_max), bit)

    def forget(self, ordinal: int) -> None:
        """Drop all that an endpoint held."""
        held = self._held.pop(ordinal, None)
        for run in () if held is None else held.runs():
            self._release(run, 1 << ordinal)

    def validate(self) -> None:
        """Assert that both directions of the index agree."""
        expected: dict[BlockKey, int] = {}
        for ordinal, held in self._held.items():
            keys = [key for run in held.runs() for key in run]
            assert len(set(keys)) == len(keys) == held.block_count, "blocks are miscounted"
            for key in keys:
                expected[key] = expected.get(key, 0) | 1 << ordinal
        assert self._holders == expected, "holders and held blocks disagree"

    def _release(self, keys: _Run, bit: int) -> None:
        holders = self._holders
        for key in keys:
            left = holders.pop(key, 0) & ~bit
            if left:
                holders[key] = left


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
