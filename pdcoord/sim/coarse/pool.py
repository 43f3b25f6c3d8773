"""An engine's KV pool counted in tokens: what sequences hold, what is cached and idle, what is free."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

IdleName = int | tuple[int]
"""A key, or the number of a run of blocks that has no key."""


class TokenPool:
    """As `pdcoord.sim.kvpool.KvPool`, with runs of tokens in place of blocks.

    A prompt's key stands for `key_tokens`; what has no key (the rest of a prompt, an answer that nobody goes
    on from) is a run with a number. Idle ones are evicted oldest first, the tail of a chain before its front.

    Attributes:
        held_tokens: in use by sequences and leases; a shared key counts once.
        idle_tokens: cached and held by nobody.
        stored: keys that were named since the caller last emptied it.
        removed: keys that were evicted since then.
    """

    __slots__ = (
        "_idle",
        "_refs",
        "_run_count",
        "block_tokens",
        "capacity_tokens",
        "held_tokens",
        "idle_tokens",
        "is_caching",
        "key_tokens",
        "keys_per_unit",
        "removed",
        "stored",
    )

    def __init__(
        self, capacity_tokens: int, block_tokens: int, key_tokens: int, *, is_caching: bool = True
    ) -> None:
        if min(capacity_tokens, block_tokens, key_tokens) < 1:
            raise ValueError(
                f"capacity_tokens is {capacity_tokens}, block_tokens {block_tokens} and key_tokens "
                f"{key_tokens}, expected at least 1 each"
            )
        self.capacity_tokens = capacity_tokens
        self.block_tokens = block_tokens
        self.key_tokens = key_tokens
        # Only whole blocks are found again: keys count in units that are both.
        self.keys_per_unit = math.lcm(key_tokens, block_tokens) // key_tokens
        self.is_caching = is_caching
        self.held_tokens = 0
        self.idle_tokens = 0
        self.stored: list[int] = []
        self.removed: list[int] = []
        self._refs: dict[int, int] = {}
        # Oldest first. A plain dict: twice as fast as an ordered one, and it is evicted from in runs.
        self._idle: dict[IdleName, int] = {}
        self._run_count = 0

    @property
    def available_tokens(self) -> int:
        """What `take` can give."""
        return self.capacity_tokens - self.held_tokens

    @property
    def usage(self) -> float:
        """Share that is held, 0..1; what is idle counts as free, as in vLLM."""
        return self.held_tokens / self.capacity_tokens

    def cached_keys(self) -> set[int]:
        """Every key that can be found."""
        return {*self._refs, *(name for name in self._idle if isinstance(name, int))}

    def match(self, keys: Sequence[int], count_max: int) -> int:
        """How many keys of a chain's beginning are cached, in whole blocks."""
        if not self.is_caching:
            return 0
        refs, idle = self._refs, self._idle
        count = 0
        for key in keys:
            if count >= count_max or (key not in refs and key not in idle):
                break
            count += 1
        return count - count % self.keys_per_unit

    def hold(self, keys: Sequence[int]) -> None:
        """Take keys that are cached."""
        refs, idle = self._refs, self._idle
        woken = 0
        for key in keys:
            count = refs.get(key, 0)
            refs[key] = count + 1
            if not count:
                del idle[key]
                woken += 1
        self.idle_tokens -= woken * self.key_tokens
        self.held_tokens += woken * self.key_tokens

    def take(self, tokens: int) -> None:
        """Hold `tokens` with nothing in them, at the cost of the oldest that is idle."""
        short = tokens + self.held_tokens + self.idle_tokens - self.capacity_tokens
        if short > 0:
            self._evict(short)
        self.held_tokens += tokens

    def _evict(self, tokens: int) -> None:
        idle = self._idle
        gone: list[IdleName] = []
        for name, size in idle.items():
            if isinstance(name, int):
                self.removed.append(name)
            elif size > tokens:
                left = size - -(-tokens // self.block_tokens) * self.block_tokens
                if left > 0:
                    idle[name] = left
                    self.idle_tokens -= size - left
                    tokens = 0
                    break
            gone.append(name)
            self.idle_tokens -= size
            tokens -= size
            if tokens <= 0:
                break
        assert tokens <= 0, "more was taken than is available"
        for name in gone:
            del idle[name]

    def name(self, keys: Iterable[int], named: list[int]) -> None:
        """Make what a sequence computed findable, and add it to `named`.

        A key that another one has already is left out: its tokens stay the sequence's own, unnamed.
        """
        if not self.is_caching:
            return
        refs, idle = self._refs, self._idle
        for key in keys:
            if key not in refs and key not in idle:
                refs[key] = 1
                named.append(key)
                self.stored.append(key)

    def unhold(self, keys: Sequence[int]) -> None:
        """Let keys go; the tail of a chain becomes the first to be evicted."""
        refs, idle, key_tokens = self._refs, self._idle, self.key_tokens
        slept = 0
        for key in reversed(keys):
            count = refs[key] - 1
            if count:
                refs[key] = count
            else:
                del refs[key]
                idle[key] = key_tokens
                slept += 1
        self.idle_tokens += slept * key_tokens
        self.held_tokens -= slept * key_tokens

    def release(self, named: Sequence[int], own_tokens: int, run_tokens: int) -> tuple[int] | None:
        """Let a sequence's holdings go.

        Args:
            own_tokens: what it holds besides its keys.
            run_tokens: those of them that are full blocks without a key and stay cached.

        Returns:
            The number by which `reclaim` finds the run; None without one.
        """
        self.held_tokens -= own_tokens
        run: tuple[int] | None = None
        if run_tokens > 0 and self.is_caching:
            self._run_count += 1
            run = (self._run_count,)
            self._idle[run] = run_tokens
            self.idle_tokens += run_tokens
        self.unhold(named)
        return run

    def run_tokens(self, run: tuple[int]) -> int:
        """What is left of a run."""
        return self._idle.get(run, 0)

    def reclaim(self, run: tuple[int]) -> int:
        """Hold what is left of a run again."""
        tokens = self._idle.pop(run, 0)
        self.idle_tokens -= tokens
        self.held_tokens += tokens
        return tokens

    def validate(self, named: Iterable[int], own_tokens: int) -> None:
        """Assert that every token is accounted for.

        Args:
            named: keys of all sequences and leases, each once for each that holds it.
            own_tokens: what they hold besides, together.
        """
        assert dict(Counter(named)) == self._refs, "holds differ from the sequences' keys"
        held = len(self._refs) * self.key_tokens + own_tokens
        assert self.held_tokens == held, f"held_tokens is {self.held_tokens}, the sequences hold {held}"
        assert self.idle_tokens == sum(self._idle.values()), "idle_tokens differs from what is idle"
        assert self.held_tokens + self.idle_tokens <= self.capacity_tokens, "more tokens than there are"
        assert not self._refs.keys() & self._idle.keys(), "a key is both held and idle"
