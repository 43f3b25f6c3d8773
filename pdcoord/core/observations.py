"""What was seen of work that is done: what speed is learned from."""

from dataclasses import dataclass

from pdcoord.core.fleet import Endpoint, ModelName


@dataclass(frozen=True, slots=True)
class PrefillSeen:
    """A prompt was computed.

    Attributes:
        took_s: of the prefill itself, with the wait behind others taken off as far as it is known.
        is_alone: nothing else ran there meanwhile, so that `took_s` is no guess.
    """

    endpoint: Endpoint
    uncached_tokens: int
    took_s: float
    is_alone: bool


@dataclass(frozen=True, slots=True)
class StepsSeen:
    """An answer was generated.

    Attributes:
        step_count: decode steps, one less than the tokens of the answer.
        took_s: from its first to its last token.
        batch: sequences that decoded on the endpoint meanwhile, averaged over time, with this one.
        context_tokens: of those sequences together, averaged alike.
    """

    endpoint: Endpoint
    step_count: int
    took_s: float
    batch: float
    context_tokens: float


@dataclass(frozen=True, slots=True)
class TransferSeen:
    """KV was moved.

    Attributes:
        took_s: from asking for it to its last byte, as far as that can be told.
        bytes_ahead: what was under way on the same links when it was asked for.
    """

    prefill: Endpoint
    decode: Endpoint
    transfer_bytes: int
    bytes_ahead: int
    took_s: float


@dataclass(frozen=True, slots=True)
class OutputSeen:
    """A request ended with an answer of so many tokens."""

    model: ModelName
    tenant: str
    output_tokens: int


Observation = PrefillSeen | StepsSeen | TransferSeen | OutputSeen
