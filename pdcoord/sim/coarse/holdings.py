"""What coarse sequences hold of an engine's pool: cached beginnings, room to compute in, and its release."""

from collections.abc import Iterable

from pdcoord.sim.coarse.pool import TokenPool
from pdcoord.sim.coarse.sequences import Sequence, Stage


class Holdings:
    """Takes and lets go of room for sequences, in whole blocks."""

    __slots__ = ("_block_tokens", "_key_tokens", "pool")

    def __init__(self, pool: TokenPool) -> None:
        self.pool = pool
        self._block_tokens = pool.block_tokens
        self._key_tokens = pool.key_tokens

    def rounded(self, tokens: int) -> int:
        """Tokens of the blocks that so many need."""
        size = self._block_tokens
        return -(-tokens // size) * size

    def missing(self, sequence: Sequence, count: int) -> int:
        """Tokens of the blocks that it lacks to compute `count` more."""
        return self.rounded(sequence.computed + count) - sequence.allocated

    def take_beginning(self, sequence: Sequence) -> bool:
        """Take the cached beginning of a prompt, and for a fetch the rest too; False if it does not fit.

        Nothing is taken unless all that is known of it fits: a prompt that begins and then does not fit
        would be computed twice.
        """
        pool, known, keys = self.pool, sequence.known, sequence.keys
        # The last token is always computed, for its logits.
        reusable = (known - 1) // self._block_tokens * self._block_tokens
        named = list(keys[: pool.match(keys, reusable // self._key_tokens)])
        pool.hold(named)
        run = 0
        if sequence.run is not None and len(named) == sequence.stored_keys:
            run = pool.reclaim(sequence.run)
        hit = len(named) * self._key_tokens + run
        missing = self.rounded(known) - hit
        if missing > pool.available_tokens:
            found = pool.release(named, run, run)
            sequence.run = found if run else sequence.run
            return False
        sequence.named = named
        sequence.stored_keys = len(named)
        sequence.computed = sequence.allocated = hit
        sequence.run = None
        if sequence.awaits_fetch:
            pool.take(missing)
            sequence.allocated += missing
        if sequence.cached_tokens is None:
            sequence.cached_tokens = hit
        return True

    def store(self, sequence: Sequence) -> None:
        """Make keys findable whose tokens are computed."""
        full = min(sequence.computed // self._key_tokens, len(sequence.keys))
        if full > sequence.stored_keys:
            self.pool.name(sequence.keys[sequence.stored_keys : full], sequence.named)
            sequence.stored_keys = full

    def drop(self, sequence: Sequence) -> None:
        """Let go of all that a sequence holds; it is over, unless the caller says otherwise."""
        own = sequence.allocated - len(sequence.named) * self._key_tokens
        full = sequence.computed // self._block_tokens * self._block_tokens
        run = full - sequence.stored_keys * self._key_tokens
        sequence.run = self.pool.release(sequence.named, own, min(run, own))
        sequence.named = []
        sequence.allocated = 0
        sequence.stage = Stage.OVER

    def validate(self, holders: Iterable[tuple[Sequence, int]]) -> None:
        """Assert that every token is accounted for, given each holder with what its blocks hold."""
        keys: list[int] = []
        own = 0
        for sequence, allocated in holders:
            named = len(sequence.named) * self._key_tokens
            assert allocated >= named, "keys without room"
            assert allocated % self._block_tokens == 0, "half a block is held"
            own += allocated - named
            keys += sequence.named
        self.pool.validate(keys, own)
