"""What a simulated run says of each call, as the lines of its results file."""

from dataclasses import dataclass
from enum import StrEnum

OURS = "pdcoord"
"""What our own router is called in results, tables and plots."""


class Fate(StrEnum):
    """How a simulated call ended; closed."""

    OK = "ok"
    SHED = "shed"
    FAILED = "failed"
    UNFINISHED = "unfinished"


@dataclass(frozen=True, slots=True)
class CallResult:
    """One call from its arrival to its end.

    Attributes:
        at_s: when it arrived; the others count from the start of the run too, None where they never came.
        routed_s: when a route was found.
        first_s: when its first token was seen.
        ended_s: when its last token was seen, or when it failed or was shed.
        cached_tokens: prompt tokens that the place that prefilled had cached.
        prefill: id of the endpoint that computed the prompt; that of `decode` if it did it itself.
        why: the router's word for its choice.
        fell_back: the route was split and the prompt was computed on `decode` all the same.
    """

    id: int
    kind: str
    tenant: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    at_s: float
    routed_s: float | None
    first_s: float | None
    ended_s: float | None
    cached_tokens: int
    prefill: str
    decode: str
    why: str
    fate: Fate
    fell_back: bool
    ttft_s_max: float | None
    tpot_s_max: float | None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for answers of fewer than two."""
        if self.fate is not Fate.OK or self.first_s is None or self.ended_s is None or self.output_tokens < 2:
            return None
        return (self.ended_s - self.first_s) / (self.output_tokens - 1)

    @property
    def is_good(self) -> bool:
        """Served within its objectives."""
        if self.fate is not Fate.OK or self.ttft_s is None:
            return False
        if self.ttft_s_max is not None and self.ttft_s > self.ttft_s_max:
            return False
        return self.tpot_s_max is None or self.tpot_s is None or self.tpot_s <= self.tpot_s_max
