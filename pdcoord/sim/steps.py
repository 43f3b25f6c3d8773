"""Which tokens an engine computes in its next step, and how long the step takes."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pdcoord.core.costs import SpeedFigures
from pdcoord.sim.live import LiveRequest, Shared, State


@dataclass(slots=True)
class StepWork:
    """What the duration of a step depends on.

    Attributes:
        decode_count: sequences that compute one token each.
        context_tokens: of those sequences together.
        prefill_tokens: of all prefill chunks together.
        token_pairs: end² - begin² of each chunk, summed; attention's share.
    """

    decode_count: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    token_pairs: int = 0

    def add(self, live: LiveRequest, count: int) -> None:
        if live.is_decoding:
            self.decode_count += 1
            self.context_tokens += live.computed
        else:
            self.prefill_tokens += count
            end = live.computed + count
            self.token_pairs += end * end - live.computed * live.computed


def step_s(speed: SpeedFigures, work: StepWork) -> float:
    """Duration of one step.

    The weights are read once a step, while prefill tokens compute: the longer of the two counts. The
    KV of decoding sequences is read besides. A step of decodes alone is `SpeedFigures.step_s`, one of a
    whole prompt alone `SpeedFigures.prefill_s`, but never shorter than reading the weights.
    """
    compute_s = 0.0
    if work.prefill_tokens:
        compute_s = (
            speed.prefill_base_s
            + speed.prefill_s_per_token * work.prefill_tokens
            + speed.prefill_s_per_token_squared * work.token_pairs
        )
    return (
        max(speed.step_base_s, compute_s)
        + speed.step_s_per_context_token * work.context_tokens
        + speed.step_s_per_sequence * work.decode_count
    )


@dataclass(slots=True)
class Step:
    """One step under way: requests with the tokens each computes in it."""

    parts: dict[str, tuple[LiveRequest, int]] = field(default_factory=dict)
    work: StepWork = field(default_factory=StepWork)
    ends_s: float = 0.0


class Batch:
    """The running requests, oldest first, and those that wait, in the order they will be taken."""

    def __init__(self, shared: Shared, begin_fetch: Callable[[LiveRequest], None]) -> None:
        self.running: list[LiveRequest] = []
        self.waiting: deque[LiveRequest] = deque()
        self._shared = shared
        self._begin_fetch = begin_fetch

    def plan(self) -> Step | None:
        """Choose the next step: decodes, then prefills under way, then new ones, within the budget.

        None if there is nothing to compute. Requests whose KV is elsewhere begin to fetch it.
        """
        parts: dict[str, tuple[LiveRequest, int]] = {}
        budget = self._shared.settings.step_tokens_max
        preempted = False
        decoding = [live for live in self.running if live.is_decoding]
        prefilling = [live for live in self.running if not live.is_decoding]
        for live in decoding + prefilling:
            count = min(live.remaining, budget)
            if count == 0 or live.state is not State.RUNNING:
                continue
            fits, victims = self._make_room(live, count)
            for victim in victims:
                preempted = True
                if (part := parts.pop(victim.id, None)) is not None:
                    budget += part[1]
            if fits:
                parts[live.id] = (live, count)
                budget -= count
        # As in vLLM, nothing new begins in a step that had to preempt, unless it would be empty.
        if not preempted or not parts:
            self._admit(parts, budget)
        if not parts:
            return None
        step = Step(parts)
        for live, count in parts.values():
            step.work.add(live, count)
        return step

    def _make_room(self, live: LiveRequest, count: int) -> tuple[bool, list[LiveRequest]]:
        """Give `live` blocks for `count` more tokens, at the cost of the youngest if need be."""
        shared = self._shared
        victims: list[LiveRequest] = []
        needed = _blocks_for(live.computed + count, shared) - len(live.blocks)
        if needed <= 0:
            return True, victims
        while needed > 0:
            blocks = shared.pool.allocate(needed)
            if blocks is not None:
                live.blocks.extend(blocks)
                break
            victim = self.running.pop()
            self._preempt(victim)
            victims.append(victim)
            if victim is live:
                return False, victims
        return True, victims

    def _preempt(self, victim: LiveRequest) -> None:
        """Take a request's blocks; it is computed anew later, first in the queue."""
        shared = self._shared
        shared.pool.release(victim.blocks)
        victim.restart()
        victim.state = State.WAITING
        self.waiting.appendleft(victim)
        shared.counters.preemptions += 1

    def _admit(self, parts: dict[str, tuple[LiveRequest, int]], budget: int) -> None:
        shared = self._shared
        while self.waiting and budget > 0 and len(self.running) < shared.settings.running_max:
            live = self.waiting[0]
            if not live.has_fetched and not self._take_blocks(live):
                return
            self.waiting.popleft()
            if live.scheduled_s is None:
                live.scheduled_s = shared.now_s
            if live.awaits_fetch:
                live.state = State.FETCHING
                self._begin_fetch(live)
                if live.awaits_fetch:
                    continue
            live.state = State.RUNNING
            self.running.append(live)
            count = min(live.remaining, budget)
            fits, _ = self._make_room(live, count)
            if not fits:
                return
            parts[live.id] = (live, count)
            budget -= count

    def _take_blocks(self, live: LiveRequest) -> bool:
        """Take the cached beginning of a prompt, and for a fetch the rest too; False if it does not fit.

        Nothing is taken unless all that is known of the request fits: a prompt that begins and then
        does not fit would be computed twice.
        """
        shared = self._shared
        pool = shared.pool
        # The last token is always computed, for its logits.
        reusable = (len(live.ids) - 1) // pool.block_tokens
        hit: list[int] = []
        if shared.settings.caches_prefixes:
            hit = pool.match(live.full_hashes(reusable, shared.settings))
        pool.hold(hit)
        # A room brings the first token of the answer along, which needs its place at once.
        known = len(live.ids) + (1 if live.awaits_fetch and live.request.room else 0)
        missing = _blocks_for(known, shared) - len(hit)
        if missing > pool.available_count:
            pool.release(hit)
            return False
        live.blocks = hit
        live.computed = len(hit) * pool.block_tokens
        live.stored_blocks = len(hit)
        live.taint = pool.taint_of(hit)
        if live.awaits_fetch:
            live.blocks.extend(pool.allocate(missing) or ())
        if live.cached_tokens is None:
            live.cached_tokens = live.computed
            shared.counters.cache_queried_tokens += live.prompt_tokens
            shared.counters.cache_hit_tokens += live.computed
        return True

    def remove(self, live: LiveRequest) -> None:
        """Take a request out of whichever list it is in."""
        if live in self.running:
            self.running.remove(live)
        elif live in self.waiting:
            self.waiting.remove(live)


def _blocks_for(tokens: int, shared: Shared) -> int:
    return -(-tokens // shared.pool.block_tokens)


def store_full_blocks(live: LiveRequest, shared: Shared) -> None:
    """Put blocks that have become full into the prefix cache."""
    pool = shared.pool
    full, begin = live.computed // pool.block_tokens, live.stored_blocks
    if full <= begin or not pool.is_caching:
        return
    hashes = live.full_hashes(full, shared.settings)
    size = pool.block_tokens
    pool.store(
        live.blocks[begin:full],
        hashes[begin:],
        hashes[begin - 1] if begin else None,
        live.ids[begin * size : full * size],
        live.taint,
    )
    live.stored_blocks = full
