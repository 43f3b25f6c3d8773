"""A request while an emulated engine has it, and what the engine's parts share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import Role
from pdcoord.sim.counters import EngineCounters
from pdcoord.sim.kvpool import KvPool
from pdcoord.sim.messages import (
    EngineEffect,
    EngineRequest,
    FinishReason,
    IssuedTicket,
    RejectReason,
    RequestDone,
)
from pdcoord.sim.settings import EngineSettings
from pdcoord.sim.timers import Timers
from pdcoord.sim.tokens import (
    BlockHash,
    answer_token,
    chain_hashes,
    drawn_length,
    mix,
    prompt_digest,
    read_context,
    root_hash,
)


class State(StrEnum):
    """Where a request stands.

    rendezvous is an SGLang prefill that waits for its decode, fetching waits for remote KV, sending is
    an SGLang prefill whose KV is on its way, closing was aborted while KV was written into its blocks.
    """

    RENDEZVOUS = "rendezvous"
    WAITING = "waiting"
    FETCHING = "fetching"
    RUNNING = "running"
    SENDING = "sending"
    CLOSING = "closing"


TimerKey = tuple[str, str]
"""What a timer is for, and the request, pull or room it is of."""


@dataclass(slots=True)
class Shared:
    """What the parts of one engine share.

    Attributes:
        effects: of the event that is being handled, in order.
    """

    settings: EngineSettings
    pool: KvPool
    timers: Timers[TimerKey]
    counters: EngineCounters
    effects: list[EngineEffect]
    now_s: float = 0.0

    def emit(self, effect: EngineEffect) -> None:
        self.effects.append(effect)


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request's progress.

    Attributes:
        ids: prompt and answer.
        hashes: of the full blocks of `ids`, as far as they were needed.
        computed: leading tokens of `ids` whose KV is in `blocks`.
        stored_blocks: leading blocks that the prefix cache was told of.
        content: digest of what the model makes its answer from, less taint.
        said: tokens of that answer that the prompt ends with already.
        digest: of the prompt, whose KV this is.
        taint: 0 if the KV is right.
        awaits_fetch: whether its KV is still to come from a producer.
        has_fetched: whether its KV came; then its blocks are its own already.
    """

    request: EngineRequest
    arrived_s: float
    output_goal: int
    planned_finish: FinishReason
    content: int
    said: int
    digest: int
    ids: list[int]
    prompt_tokens: int
    output_tokens: int = 0
    state: State = State.WAITING
    hashes: list[BlockHash] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    stored_blocks: int = 0
    taint: int = 0
    awaits_fetch: bool = False
    has_fetched: bool = False
    cached_tokens: int | None = None
    external_tokens: int = 0
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one comes out."""
        return len(self.ids) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether one token of compute yields one token of answer."""
        return self.remaining == 1 and self.computed > 0

    def next_token(self) -> int:
        """What the model says next; wrong KV makes it say something else."""
        content = mix(self.content, self.taint) if self.taint else self.content
        return answer_token(content, self.said + self.output_tokens, self.request.choice_index)

    def full_hashes(self, count: int, settings: EngineSettings) -> Sequence[BlockHash]:
        """Hashes of the first `count` full blocks."""
        block_tokens = settings.layout.block_tokens
        known = len(self.hashes)
        if known < count:
            parent = self.hashes[-1] if self.hashes else root_hash(settings.model, self.request.cache_salt)
            fresh = self.ids[known * block_tokens : count * block_tokens]
            self.hashes.extend(chain_hashes(parent, fresh, block_tokens))
        return self.hashes[:count]

    def restart(self) -> None:
        """Forget what was computed; the blocks are the caller's to release."""
        self.blocks = []
        self.computed = 0
        self.stored_blocks = 0
        self.taint = 0
        self.has_fetched = False

    def done(self, finish: FinishReason, now_s: float, ticket: IssuedTicket | None) -> RequestDone:
        """What is told of its end."""
        return RequestDone(
            request_id=self.id,
            finish=finish,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens or 0,
            external_tokens=self.external_tokens,
            arrived_s=self.arrived_s,
            scheduled_s=self.arrived_s if self.scheduled_s is None else self.scheduled_s,
            first_token_s=now_s if self.first_token_s is None else self.first_token_s,
            at_s=now_s,
            ticket=ticket,
        )

    def validate(self, block_tokens: int) -> None:
        """Assert that the counts agree."""
        assert 0 <= self.computed <= len(self.ids), "more computed than there is"
        assert len(self.ids) == self.prompt_tokens + self.output_tokens, "the answer is miscounted"
        assert self.computed <= len(self.blocks) * block_tokens, "KV without a block"
        assert self.output_tokens <= self.output_goal, "answered too much"


def misfit(request: EngineRequest, settings: EngineSettings) -> tuple[RejectReason, str] | None:
    """Why an engine could never serve a request; None if it can."""
    count = len(request.prompt)
    if count == 0:
        return RejectReason.EMPTY_PROMPT, "the prompt is empty"
    # One token of the context is for the answer, unless none is wanted.
    if count >= settings.context_tokens_max + request.is_pooling:
        message = f"the prompt has {count} tokens, the context {settings.context_tokens_max}"
        return RejectReason.CONTEXT_TOO_LONG, message
    if settings.is_room_worker and request.room is None:
        return RejectReason.ROOM_REQUIRED, "a disaggregated worker serves requests with a room only"
    return None


def make_live(request: EngineRequest, settings: EngineSettings, now_s: float) -> LiveRequest:
    """Decide how long the answer will be, and from what."""
    context = read_context(settings.model_seed, request.prompt, request.choice_index)
    room_left = settings.context_tokens_max - len(request.prompt)
    goal, finish = room_left, FinishReason.LENGTH
    if request.is_pooling:
        goal = 0
    elif request.output_tokens_max is not None:
        goal = min(request.output_tokens_max, room_left)
    elif not request.ignores_eos:
        drawn = max(0, drawn_length(context.content, request.choice_index) - context.said)
        if drawn < room_left:
            goal, finish = drawn, FinishReason.STOP
    is_room_prefill = settings.is_room_worker and settings.role is Role.PREFILL
    if request.is_prefill_leg or is_room_prefill:
        goal, finish = min(goal, 1), FinishReason.LENGTH
    if goal == 0 and request.is_pooling:
        finish = FinishReason.STOP
    return LiveRequest(
        request=request,
        arrived_s=now_s,
        output_goal=goal,
        planned_finish=finish,
        content=context.content,
        said=context.said,
        digest=prompt_digest(request.prompt),
        ids=list(request.prompt),
        prompt_tokens=len(request.prompt),
    )
