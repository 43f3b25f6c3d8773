"""An emulated engine without tokens: the step loop of `pdcoord.sim.engine` in strides.

While nothing changes but the length of what is decoded, any number of steps is one stride, timed in closed
form; what comes in its midst cuts it at the end of a step. A step that computes prompts is one stride.
"""

import math
from collections import deque
from enum import IntEnum
from random import Random

from pdcoord.core.fleet import Sample
from pdcoord.sim.coarse.holdings import Holdings
from pdcoord.sim.coarse.pool import TokenPool
from pdcoord.sim.coarse.sequences import Decoders, Sequence, Stage
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.steps import StepWork, step_s


class News(IntEnum):
    """What an engine tells of a leg: its first token, its last, or that it has room for the KV to fetch."""

    BEGAN = 0
    DONE = 1
    FETCH = 2


class CoarseEngine:
    """One engine. Where it differs from EngineModel: a batch is never larger than a step's tokens.

    Attributes:
        wake_s: when `wake` must be called next; infinite while it idles.
        news: what happened since the caller last emptied it, in order.
        slowness: 1.0 when healthy; a step takes this many times as long.
        step_count: steps done.
        busy_s: time that those took.
    """

    def __init__(self, settings: EngineSettings, key_tokens: int, rng: Random) -> None:
        self.settings = settings
        self.wake_s = math.inf
        self.news: list[tuple[News, Sequence]] = []
        self.slowness = 1.0
        self.step_count = 0
        self.preemption_count = 0
        self.busy_s = 0.0
        self._rng = rng
        self._key_tokens = key_tokens
        self._block_tokens = settings.layout.block_tokens
        self._running_max = min(settings.running_max, settings.step_tokens_max)
        self._restart()

    def _restart(self) -> None:
        settings = self.settings
        capacity_tokens = settings.block_total * self._block_tokens
        self.pool = TokenPool(
            capacity_tokens, self._block_tokens, self._key_tokens, is_caching=settings.caches_prefixes
        )
        self._holdings = Holdings(self.pool)
        self._decoders = Decoders(self._block_tokens)
        self._running: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._waiting: deque[Sequence] = deque()
        self._fetching: dict[Sequence, None] = {}
        self._leased: dict[Sequence, None] = {}
        # The stride under way: its prompts' parts, its length in steps, and its time's closed form.
        self._parts: dict[Sequence, int] = {}
        self._fresh: list[Sequence] = []
        self._stride = 0
        self._stride_s = 0.0
        self._first_s = 0.0
        self._growth_s = 0.0
        self.wake_s = math.inf

    # What anybody may look at.

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """As vLLM's num_requests_waiting: those that wait for KV are among them."""
        return len(self._waiting) + len(self._fetching)

    @property
    def is_full(self) -> bool:
        """Whether the next leg is answered 503."""
        return self.waiting_count >= self.settings.queued_max

    def sample(self, now_s: float) -> Sample:
        """What a scrape reads."""
        held = self.pool.held_tokens
        if self._stride > 1:
            done = self._steps_by(now_s)
            held += self._decoders.new_blocks(1, max(0, done - 1)) * self._block_tokens
        capacity = self.pool.capacity_tokens
        return Sample(self.running_count, self.waiting_count, held / capacity, now_s, capacity)

    def goal_of(self, prompt_tokens: int, output_tokens: int) -> int:
        """Tokens that an answer can have here; 0 if the prompt does not fit."""
        return max(0, min(output_tokens, self.settings.context_tokens_max - prompt_tokens))

    # What happens to it.

    def submit(self, sequence: Sequence, now_s: float) -> None:
        """Take a leg in. The caller has looked at `is_full` and `goal_of`."""
        sequence.has_arrived = True
        if not sequence.is_prefill_leg:
            sequence.goal = self.goal_of(sequence.prompt, sequence.goal)
        self._waiting.append(sequence)
        # Behind others it cannot be next: they wait for what only the end of a stride brings.
        if len(self._waiting) == 1:
            self._reconsider(now_s)

    def fetched(self, sequence: Sequence, now_s: float) -> None:
        """A leg's KV has arrived."""
        del self._fetching[sequence]
        sequence.awaits_fetch = False
        sequence.has_fetched = True
        sequence.computed = sequence.prompt
        self._holdings.store(sequence)
        # The last token is computed again, for its logits.
        sequence.computed -= 1
        sequence.stage = Stage.WAITING
        self._waiting.appendleft(sequence)
        self._reconsider(now_s)

    def release(self, sequence: Sequence, now_s: float) -> None:
        """End the lease of a finished prefill."""
        if sequence.stage is Stage.LEASED:
            del self._leased[sequence]
            self._holdings.drop(sequence)
            self._reconsider(now_s)

    def abort(self, sequence: Sequence, now_s: float) -> None:
        """Forget a leg that has answered nothing yet."""
        match sequence.stage:
            case Stage.OVER:
                return
            case Stage.LEASED:
                del self._leased[sequence]
            case Stage.WAITING:
                self._waiting.remove(sequence)
            case Stage.FETCHING:
                del self._fetching[sequence]
            case Stage.PREFILLING | Stage.DECODING:
                self._leave(sequence)
                del self._running[sequence]
                self._parts.pop(sequence, None)
                if sequence in self._fresh:
                    self._fresh.remove(sequence)
        self._holdings.drop(sequence)
        self._reconsider(now_s)

    def kill(self) -> list[Sequence]:
        """The engine dies and comes back empty; whose legs were lost is returned."""
        lost = [*self._running, *self._waiting, *self._fetching, *self._leased]
        for sequence in self._running:
            if sequence.stage is Stage.DECODING:
                self._decoders.leave(sequence)
        for sequence in lost:
            sequence.stage = Stage.OVER
        self.news.clear()
        self._restart()
        return lost

    def slow(self, slowness: float, now_s: float) -> None:
        """From its next step on each takes `slowness` times as long as it should."""
        self._cut(now_s)
        self.slowness = slowness

    def _reconsider(self, now_s: float) -> None:
        """Something may be possible that was not: begin it now, or when the step under way has ended."""
        if self._stride:
            if self._waiting and len(self._running) < self._running_max:
                self._cut(now_s)
        else:
            self._begin(now_s)

    # Strides.

    def wake(self) -> None:
        """Let the stride that ends at `wake_s` end, and the next begin."""
        now_s, stride, decoders = self.wake_s, self._stride, self._decoders
        assert stride, "an idle engine was woken"
        if stride > 1:
            self.pool.take(decoders.new_blocks(1, stride - 1) * self._block_tokens)
        decoders.advance(stride)
        self.step_count += stride
        self.busy_s += now_s - self._stride_s
        self._stride = 0
        for sequence in self._fresh:
            self.news.append((News.BEGAN, sequence))
        self._fresh.clear()
        while (ended := decoders.pop_ended()) is not None:
            decoders.leave(ended)
            del self._running[ended]
            ended.allocated = self._holdings.rounded(ended.computed)
            self._finish(ended)
        if self._parts:
            parts, self._parts = self._parts, {}
            for sequence, count in parts.items():
                self._end_part(sequence, count)
        self._begin(now_s)

    def _end_part(self, sequence: Sequence, count: int) -> None:
        sequence.computed += count
        self._holdings.store(sequence)
        if sequence.computed < sequence.known:
            return
        del self._prefilling[sequence]
        sequence.output += 1
        if sequence.output == 1:
            self.news.append((News.BEGAN, sequence))
        if sequence.output < sequence.goal:
            self._decoders.join(sequence)
        else:
            del self._running[sequence]
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self.news.append((News.DONE, sequence))
        if sequence.is_prefill_leg:
            sequence.stage = Stage.LEASED
            self._leased[sequence] = None
            return
        after = sequence.call.keys_after
        if len(after) > len(sequence.keys):
            sequence.keys = after
            self._holdings.store(sequence)
        self._holdings.drop(sequence)

    def _begin(self, now_s: float) -> None:
        """Choose the next stride, if there is anything to compute."""
        self.wake_s = math.inf
        if not self._running and not self._waiting:
            return
        preempted = self._choose()
        decoders, parts = self._decoders, self._parts
        if not decoders.count and not parts:
            return
        work = StepWork(decoders.count, decoders.context_tokens)
        stride = 1
        if parts:
            for sequence, count in parts.items():
                end = sequence.computed + count
                work.prefill_tokens += count
                work.token_pairs += end * end - sequence.computed * sequence.computed
        elif not self._fresh and not (preempted and self._waiting):
            stride = self._longest_stride()
        slowness = self.slowness
        if self.settings.jitter_share:
            # The mean of so many uniform draws, whose spread falls with the root of their number.
            share = self.settings.jitter_share / math.sqrt(stride)
            slowness *= 1.0 + share * self._rng.uniform(-1.0, 1.0)
        speed = self.settings.speed
        self._first_s = step_s(speed, work) * slowness
        self._growth_s = speed.step_s_per_context_token * decoders.count * slowness
        self._stride = stride
        self._stride_s = now_s
        self.wake_s = now_s + self._took_s(stride)

    def _choose(self) -> bool:
        """Decodes, then prompts under way, then new ones, within the budget; whether any was preempted."""
        decoders = self._decoders
        preempted = self._grow_decoders()
        budget = self.settings.step_tokens_max - decoders.count
        if self._prefilling:
            before = self.preemption_count
            budget = self._plan_prefills(budget)
            preempted = preempted or self.preemption_count > before
        # As in vLLM, nothing new begins in a step that had to preempt, unless it would be empty.
        if self._waiting and (not preempted or not (decoders.count or self._parts)):
            self._admit(budget)
        return preempted

    def _longest_stride(self) -> int:
        """Steps until a sequence ends or the pool has no block for the next."""
        decoders, available = self._decoders, self.pool.available_tokens // self._block_tokens
        most = decoders.steps_left()
        # Each sequence begins one block at most in so many steps, and one more.
        if decoders.count * ((most - 1) // self._block_tokens + 1) <= available:
            return most
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if decoders.new_blocks(1, middle - 1) <= available:
                low = middle
            else:
                high = middle - 1
        return low

    def _took_s(self, step_count: int) -> float:
        """Time of the stride's first steps."""
        return step_count * self._first_s + self._growth_s * (step_count * (step_count - 1) / 2)

    def _steps_by(self, now_s: float) -> int:
        """Steps of the stride that have ended by now or are under way, at least 1."""
        elapsed_s, first, growth = now_s - self._stride_s, self._first_s, self._growth_s
        if growth > 1e-15:
            b = first - growth / 2
            guess = (math.sqrt(b * b + 2 * growth * max(0.0, elapsed_s)) - b) / growth
        else:
            guess = elapsed_s / first if first > 0.0 else 1.0
        count = min(self._stride, max(1, math.ceil(guess)))
        while count < self._stride and self._took_s(count) < elapsed_s:
            count += 1
        while count > 1 and self._took_s(count - 1) >= elapsed_s:
            count -= 1
        return count

    def _cut(self, now_s: float) -> None:
        """Let the stride end with the step that is under way."""
        if self._stride > 1:
            self._stride = self._steps_by(now_s)
            self.wake_s = self._stride_s + self._took_s(self._stride)

    # Room.

    def _grow_decoders(self) -> bool:
        """Give every decoding sequence room for its next token; whether that took preemption."""
        pool, size = self.pool, self._block_tokens
        needed = self._decoders.new_blocks(0, 1) * size
        if needed <= pool.available_tokens:
            if needed:
                pool.take(needed)
            return False
        given: set[Sequence] = set()
        for sequence in list(self._running):
            needs_block = sequence.stage is Stage.DECODING and self._decoders.needs_block(sequence)
            if needs_block and self._make_room(sequence, size, given):
                given.add(sequence)
        return True

    def _make_room(self, sequence: Sequence, tokens: int, given: set[Sequence] | None = None) -> bool:
        """Take `tokens` for a running sequence, at the cost of the youngest; whether it still runs.

        Args:
            given: those that decode and have room for their next token; None if all have.
        """
        while tokens > self.pool.available_tokens:
            victim, _ = self._running.popitem()
            self._preempt(victim, has_room=given is None or victim in given)
            if victim is sequence:
                return False
        self.pool.take(tokens)
        return True

    def _leave(self, sequence: Sequence, *, has_room: bool = True) -> None:
        """Take a running sequence out of what it does; `has_room` for the token it computes now."""
        if sequence.stage is Stage.DECODING:
            self._decoders.leave(sequence)
            sequence.allocated = self._holdings.rounded(sequence.computed + has_room)
        else:
            del self._prefilling[sequence]

    def _preempt(self, victim: Sequence, *, has_room: bool) -> None:
        """Take a sequence's room; it is computed anew later, first in the queue."""
        self._leave(victim, has_room=has_room)
        self._parts.pop(victim, None)
        self._holdings.drop(victim)
        victim.computed = 0
        victim.has_fetched = False
        victim.stage = Stage.WAITING
        self._waiting.appendleft(victim)
        self.preemption_count += 1

    def _plan_prefills(self, budget: int) -> int:
        """Parts of the prompts under way; what is left of the budget."""
        for sequence in list(self._prefilling):
            count = min(sequence.known - sequence.computed, budget)
            if count <= 0 or sequence.stage is not Stage.PREFILLING:
                continue
            needed = self._holdings.missing(sequence, count)
            if needed > 0:
                planned = self._planned_tokens()
                still_runs = self._make_room(sequence, needed)
                # What victims were to compute is free again.
                budget += planned - self._planned_tokens()
                if not still_runs:
                    continue
                sequence.allocated += needed
            self._parts[sequence] = count
            budget -= count
        return budget

    def _planned_tokens(self) -> int:
        return sum(self._parts.values()) + self._decoders.count

    # Admission.

    def _admit(self, budget: int) -> None:
        waiting, running = self._waiting, self._running
        while waiting and budget > 0 and len(running) < self._running_max:
            sequence = waiting[0]
            if not sequence.has_fetched and not self._holdings.take_beginning(sequence):
                return
            waiting.popleft()
            if sequence.awaits_fetch:
                sequence.fetch_tokens = sequence.prompt - sequence.computed
                sequence.stage = Stage.FETCHING
                self._fetching[sequence] = None
                self.news.append((News.FETCH, sequence))
                continue
            running[sequence] = None
            count = min(sequence.known - sequence.computed, budget)
            needed = self._holdings.missing(sequence, count)
            if needed > 0:
                self.pool.take(needed)
                sequence.allocated += needed
            if sequence.computed and sequence.known - sequence.computed == 1:
                if not sequence.output:
                    self._fresh.append(sequence)
                self._decoders.join(sequence)
            else:
                sequence.stage = Stage.PREFILLING
                self._prefilling[sequence] = None
                self._parts[sequence] = count
            budget -= count

    def validate(self) -> None:
        """Assert that every sequence and every token is accounted for."""
        running = list(self._running)
        decoding = [sequence for sequence in running if sequence.stage is Stage.DECODING]
        prefilling = [sequence for sequence in running if sequence.stage is Stage.PREFILLING]
        assert len(decoding) + len(prefilling) == len(running) <= self._running_max, "running is miscounted"
        assert prefilling == list(self._prefilling), "prompts under way are miscounted"
        assert set(self._parts) <= set(prefilling), "a part of nobody's prompt"
        assert set(self._fresh) <= set(decoding), "a first token of nobody"
        self._decoders.validate(decoding)
        fetched = [sequence for sequence in self._waiting if sequence.has_fetched]
        step, rounded = self._decoders.step, self._holdings.rounded
        self._holdings.validate(
            (one, rounded(one.computed + step + 1) if one.stage is Stage.DECODING else one.allocated)
            for one in [*running, *self._fetching, *self._leased, *fetched]
        )
        for sequence in self._waiting:
            assert sequence.stage is Stage.WAITING, "one that waits does something else"
        assert bool(self._stride) == (self.wake_s < math.inf), "a stride never ends"
        assert self._stride or not running, "sequences run without a step"
        assert all(one.stage is Stage.FETCHING for one in self._fetching), "a fetch does something else"
        assert all(one.stage is Stage.LEASED for one in self._leased), "a lease does something else"
