"""One call's leg on a coarse engine, and the set of those that decode, kept in sums."""

import heapq
from enum import IntEnum
from typing import Any

from pdcoord.sim.workload.call import Call


class Stage(IntEnum):
    """Where a leg stands; leased is a finished prefill whose KV waits for its consumer."""

    WAITING = 0
    FETCHING = 1
    PREFILLING = 2
    DECODING = 3
    LEASED = 4
    OVER = 5


class Sequence:
    """One leg. As `pdcoord.sim.live.LiveRequest`, without token ids.

    While it decodes, `computed` and `output` are what they were when it began to, less the steps that had
    been done by then: `Decoders.leave` writes them anew.

    Attributes:
        flight: whoever is told of it; opaque here.
        goal: tokens to answer with.
        output: tokens answered.
        computed: leading tokens of prompt and answer whose KV is here.
        allocated: tokens that its blocks hold, keys' included.
        named: keys that it holds; what it holds besides is its own.
        stored_keys: leading keys that the prefix cache was told of.
        run: of its last preemption, what was computed and has no key.
        awaits_fetch: its KV is still to come.
        cached_tokens: found in the cache when it was first taken up; None before.
        fetch_tokens: to come from elsewhere, once that is known.
        place: index of the place that it is meant for.
        has_arrived: an engine has taken it in.
    """

    __slots__ = (
        "allocated",
        "awaits_fetch",
        "cached_tokens",
        "call",
        "computed",
        "entry",
        "fetch_tokens",
        "flight",
        "goal",
        "has_arrived",
        "has_fetched",
        "is_prefill_leg",
        "keys",
        "named",
        "output",
        "place",
        "prompt",
        "run",
        "stage",
        "stored_keys",
    )

    def __init__(
        self,
        call: Call,
        flight: Any,
        place: int = 0,
        *,
        is_prefill_leg: bool = False,
        awaits_fetch: bool = False,
    ) -> None:
        self.call = call
        self.place = place
        self.has_arrived = False
        self.flight = flight
        self.is_prefill_leg = is_prefill_leg
        self.awaits_fetch = awaits_fetch
        self.prompt = call.prompt_tokens
        self.keys = call.keys
        self.goal = 1 if is_prefill_leg else call.output_tokens
        self.output = 0
        self.computed = 0
        self.allocated = 0
        self.named: list[int] = []
        self.stored_keys = 0
        self.run: tuple[int] | None = None
        self.has_fetched = False
        self.cached_tokens: int | None = None
        self.fetch_tokens = 0
        self.entry = 0
        self.stage = Stage.WAITING

    @property
    def known(self) -> int:
        """Tokens of prompt and answer so far; not while it decodes."""
        return self.prompt + self.output


class Decoders:
    """The sequences that compute one token a step, as sums: a step of all of them costs no more than one's.

    Attributes:
        step: steps done so far.
        count: sequences in the set.
        context_tokens: of those together, before the next step.
    """

    __slots__ = ("_ends", "_entry_count", "_phases", "block_tokens", "context_tokens", "count", "step")

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.step = 0
        self.count = 0
        self.context_tokens = 0
        # By (computed - step) modulo the block: which of them need a new block in which step.
        self._phases = [0] * block_tokens
        self._ends: list[tuple[int, int, Sequence]] = []
        self._entry_count = 0

    def join(self, sequence: Sequence) -> None:
        step = self.step
        self.count += 1
        self.context_tokens += sequence.computed
        self._phases[(sequence.computed - step) % self.block_tokens] += 1
        self._entry_count += 1
        sequence.entry = self._entry_count
        heapq.heappush(self._ends, (step + sequence.goal - sequence.output, self._entry_count, sequence))
        sequence.computed -= step
        sequence.output -= step
        sequence.stage = Stage.DECODING

    def leave(self, sequence: Sequence) -> None:
        """Take one out, and bring its figures up to date."""
        step = self.step
        self._phases[sequence.computed % self.block_tokens] -= 1
        sequence.computed += step
        sequence.output += step
        self.count -= 1
        self.context_tokens -= sequence.computed
        sequence.entry = 0

    def advance(self, step_count: int) -> None:
        self.step += step_count
        self.context_tokens += self.count * step_count

    def pop_ended(self) -> Sequence | None:
        """One that has answered all it was to, still in the set; None without one."""
        first = self._first()
        return first[2] if first is not None and first[0] <= self.step else None

    def steps_left(self) -> int:
        """Until the first ends; 0 in an empty set."""
        first = self._first()
        return 0 if first is None else first[0] - self.step

    def _first(self) -> tuple[int, int, Sequence] | None:
        ends = self._ends
        while ends and ends[0][2].entry != ends[0][1]:
            heapq.heappop(ends)
        return ends[0] if ends else None

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether its next token begins a block."""
        return (sequence.computed + self.step) % self.block_tokens == 0

    def new_blocks(self, first: int, step_count: int) -> int:
        """Blocks that begin in `step_count` steps, of which the first is `first` steps from now."""
        size, phases = self.block_tokens, self._phases
        cycles, rest = divmod(step_count, size)
        blocks = cycles * self.count
        if rest:
            # Step i needs those of phase -(step + i); the phases of consecutive steps lie side by side.
            last = (-(self.step + first + rest - 1)) % size
            end = last + rest
            blocks += sum(phases[last:end]) if end <= size else sum(phases[last:]) + sum(phases[: end - size])
        return blocks

    def validate(self, members: list[Sequence]) -> None:
        """Assert that the sums are those of the members."""
        assert self.count == len(members), "count differs from the members"
        context = sum(member.computed + self.step for member in members)
        assert self.context_tokens == context, "context_tokens differs from the members"
        phases = [0] * self.block_tokens
        for member in members:
            phases[member.computed % self.block_tokens] += 1
        assert phases == self._phases, "phases differ from the members"
        live = {entry for _, entry, sequence in self._ends if sequence.entry == entry}
        assert live == {member.entry for member in members}, "a member never ends"
