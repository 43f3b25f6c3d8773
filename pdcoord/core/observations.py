"""What was seen of work that is done: what speed is learned from."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.fleet import Endpoint, ModelName

DURATION_S_MAX = 3_600.0
STEP_S_MAX = 60.0
TOKENS_MAX = 10_000_000
CONTEXT_TOKENS_MAX = 1_000_000_000
BATCH_MAX = 100_000
BYTES_MAX = 1 << 50
"""What is beyond these was not measured but made up."""


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


class ObservationKind(StrEnum):
    """Closed, a label of metrics."""

    PREFILL = "prefill"
    STEPS = "steps"
    TRANSFER = "transfer"
    OUTPUT = "output"


def kind_of(observation: Observation) -> ObservationKind:
    match observation:
        case PrefillSeen():
            return ObservationKind.PREFILL
        case StepsSeen():
            return ObservationKind.STEPS
        case TransferSeen():
            return ObservationKind.TRANSFER
        case OutputSeen():
            return ObservationKind.OUTPUT


def is_sane(observation: Observation) -> bool:
    """Whether it can have been measured. Comparisons are false where a figure is not a number."""
    match observation:
        case PrefillSeen(_, uncached, took_s, _):
            return 0 < uncached <= TOKENS_MAX and 0.0 < took_s <= DURATION_S_MAX
        case StepsSeen(_, step_count, took_s, batch, context_tokens):
            is_counted = 0 < step_count <= TOKENS_MAX and 0.0 < took_s <= STEP_S_MAX * step_count
            return is_counted and 1.0 <= batch <= BATCH_MAX and 0.0 <= context_tokens <= CONTEXT_TOKENS_MAX
        case TransferSeen(_, _, transfer_bytes, bytes_ahead, took_s):
            is_counted = 0 < transfer_bytes <= BYTES_MAX and 0 <= bytes_ahead <= BYTES_MAX
            return is_counted and 0.0 < took_s <= DURATION_S_MAX
        case OutputSeen(_, _, output_tokens):
            return 0 < output_tokens <= TOKENS_MAX
