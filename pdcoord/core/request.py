"""What routing needs to know of a call; no text."""

from dataclasses import dataclass, field
from typing import NewType

from pdcoord.core.fleet import ModelName
from pdcoord.core.model import Slo
from pdcoord.protocol.headers import HostPort

RequestId = NewType("RequestId", str)
BlockKey = NewType("BlockKey", int)
"""Chained hash of a block and all blocks before it, 64 bits."""


def is_allowed(allowed: frozenset[str] | None, address: HostPort) -> bool:
    """Whether a set of addresses and hosts has this one; None has all."""
    return allowed is None or address in allowed or address.rpartition(":")[0].strip("[]") in allowed


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready to be routed.

    Attributes:
        model: the policy's name of the model, aliases resolved.
        adapter: LoRA adapter of the model that was asked for; "" for the model itself.
        prompt_tokens: counted, or estimated from bytes.
        is_prompt_counted: whether prompt_tokens is exact; an estimate never refuses a request.
        block_keys: keys of the prompt's full blocks in order; a partial last block has none.
        block_tokens: prompt tokens that one key stands for.
        choice_count: answers asked for; more than one is never split.
        is_splittable: whether the engines' hand-over can carry this kind of call at all.
        is_generative: whether there is a decode phase at all.
        is_streamed: whether the answer's first byte comes with its first token; else it comes with the last.
        tenant: whose call it is, for fairness and for what is learned of output lengths; "" if not said.
        priority: higher goes first; below 0 the request is shed before others wait.
        slo: the call's own objectives, each in place of the model's where it is set.
        token_keys: keys of the prompt's full blocks made from its token ids, where its model's prefixes
            are precise and the tokens are known; else empty.
        token_block_tokens: prompt tokens that one of those keys stands for.
        is_resumed: it is what is left of an answer that broke off elsewhere; what came of that is prompt now.
        allowed: addresses (`host:port`, or a host alone for all its ports) that legs may go to; None for all.
    """

    id: RequestId
    model: ModelName
    prompt_tokens: int
    block_keys: tuple[BlockKey, ...] = ()
    block_tokens: int = 64
    output_tokens_max: int | None = None
    is_prompt_counted: bool = False
    choice_count: int = 1
    is_splittable: bool = True
    is_generative: bool = True
    is_streamed: bool = True
    tenant: str = ""
    priority: int = 0
    slo: Slo = field(default_factory=Slo)
    token_keys: tuple[BlockKey, ...] = ()
    token_block_tokens: int = 16
    allowed: frozenset[str] | None = None
    is_resumed: bool = False
    adapter: str = ""

    def allows(self, address: HostPort) -> bool:
        """Whether a leg may go there."""
        return is_allowed(self.allowed, address)

    @property
    def is_sheddable(self) -> bool:
        """Whether it is refused at once where others would wait."""
        return self.priority < 0
