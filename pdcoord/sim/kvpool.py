"""An engine's KV blocks: who holds them, which are cached, pinned for a consumer, or free."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdcoord.sim.tokens import BlockHash


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """A run of blocks that can now be found by hash.

    Attributes:
        parent: hash of the block before the first; None where the run begins a prompt.
        token_ids: of all blocks together.
    """

    hashes: tuple[BlockHash, ...]
    parent: BlockHash | None
    token_ids: tuple[int, ...]
    block_tokens: int


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks that were evicted and can no longer be found."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class AllCleared:
    """The prefix cache was emptied."""


PoolEvent = BlocksStored | BlocksRemoved | AllCleared


class KvPool:
    """Blocks 1..n of one KV group; block 0 is vLLM's null block and is never handed out.

    A block is held (by sequences and pins), idle (cached, held by nobody, evicted oldest first) or
    free. Only idle blocks are evicted, so a pinned one never is.
    """

    def __init__(self, block_count: int, block_tokens: int, *, is_caching: bool = True) -> None:
        if block_count < 1 or block_tokens < 1:
            raise ValueError(
                f"block_count is {block_count} and block_tokens {block_tokens}, expected at least 1 each"
            )
        self.block_count = block_count
        self.block_tokens = block_tokens
        self.is_caching = is_caching
        self._free: list[int] = list(range(block_count, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holds: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._taint: dict[int, int] = {}
        self._events: list[PoolEvent] = []

    @property
    def available_count(self) -> int:
        """Blocks that `allocate` can give: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def cached_count(self) -> int:
        return len(self._block_of)

    @property
    def pinned_count(self) -> int:
        return len(self._pins)

    @property
    def usage(self) -> float:
        """Share of blocks that are held, 0..1; idle ones count as free, as in vLLM."""
        return 1.0 - self.available_count / self.block_count

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """The blocks of the longest cached beginning of a chain."""
        found: list[int] = []
        if not self.is_caching:
            return found
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Take blocks that are cached or already held."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holds[block] = self._holds.get(block, 0) + 1

    def allocate(self, count: int) -> list[int] | None:
        """Blocks with nothing in them, held once; None, and nothing changed, if there are too few."""
        if count > self.available_count:
            return None
        evicted: list[BlockHash] = []
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict(evicted)
            self._holds[block] = 1
            blocks.append(block)
        if evicted:
            self._events.append(BlocksRemoved(tuple(evicted)))
        return blocks

    def _evict(self, evicted: list[BlockHash]) -> int:
        block, _ = self._idle.popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._taint.pop(block, None)
        evicted.append(block_hash)
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Let blocks go; the tail of a chain becomes the first to be evicted, as in vLLM."""
        for block in reversed(blocks):
            self._drop(self._holds, block)

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep held blocks for a consumer, apart from who holds them now."""
        for block in blocks:
            self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._drop(self._pins, block)

    def _drop(self, counts: dict[int, int], block: int) -> None:
        counts[block] -= 1
        if counts[block] == 0:
            del counts[block]
        if block in self._holds or block in self._pins:
            return
        if block in self._hash_of:
            self._idle[block] = None
        else:
            self._taint.pop(block, None)
            self._free.append(block)

    def store(
        self,
        blocks: Sequence[int],
        hashes: Sequence[BlockHash],
        parent: BlockHash | None,
        token_ids: Sequence[int],
        taint: int = 0,
    ) -> None:
        """Make full, held blocks findable; one whose hash another block has stays unnamed.

        Args:
            blocks: consecutive blocks of one chain.
            hashes: one for each block.
            parent: hash before the first block, None at a prompt's beginning.
            token_ids: of all blocks together.
            taint: 0 if the content is right, else what was put in its place.
        """
        if not self.is_caching:
            return
        run: list[BlockHash] = []
        for index, (block, block_hash) in enumerate(zip(blocks, hashes, strict=True)):
            if block_hash in self._block_of or block in self._hash_of:
                self._note_stored(run, index, hashes, parent, token_ids)
                run = []
                continue
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            if taint:
                self._taint[block] = taint
            run.append(block_hash)
        self._note_stored(run, len(blocks), hashes, parent, token_ids)

    def _note_stored(
        self,
        run: list[BlockHash],
        end: int,
        hashes: Sequence[BlockHash],
        parent: BlockHash | None,
        token_ids: Sequence[int],
    ) -> None:
        if not run:
            return
        begin = end - len(run)
        size = self.block_tokens
        self._events.append(
            BlocksStored(
                tuple(run),
                hashes[begin - 1] if begin else parent,
                tuple(token_ids[begin * size : end * size]),
                size,
            )
        )

    def taint_of(self, blocks: Iterable[int]) -> int:
        """The first wrong content among blocks; 0 if all are right."""
        return next((self._taint[block] for block in blocks if block in self._taint), 0)

    def clear_cache(self) -> None:
        """Forget every cached block; held ones stay with their holders, unnamed."""
        self._free.extend(self._idle)
        for block in self._idle:
            self._taint.pop(block, None)
        self._idle.clear()
        self._hash_of.clear()
        self._block_of.clear()
        self._events.append(AllCleared())

    def drain_events(self) -> list[PoolEvent]:
        """What changed in the prefix cache since the last call, in order."""
        events = self._events
        self._events = []
        return events

    def validate(self, held: Iterable[int], pinned: Iterable[int]) -> None:
        """Assert that every block is accounted for.

        Args:
            held: each block once for each sequence that has it.
            pinned: each block once for each lease that has it.
        """
        assert dict(Counter(held)) == self._holds, "holds differ from the sequences' blocks"
        assert dict(Counter(pinned)) == self._pins, "pins differ from the leases' blocks"
        free, idle = set(self._free), set(self._idle)
        taken = set(self._holds) | set(self._pins)
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(idle) + len(taken) == self.block_count, "a block is lost or in two states"
        assert free | idle | taken == set(range(1, self.block_count + 1)), "a block is lost"
        assert {block: h for h, block in self._block_of.items()} == self._hash_of, "hash index broken"
        assert idle <= set(self._hash_of), "an idle block has no hash"
        assert set(self._taint) <= idle | taken, "a free block has content"
