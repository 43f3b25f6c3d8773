"""How long work takes: prefill by uncached tokens, a step by batch and context, a transfer by bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpeedFigures:
    """One endpoint's speed, as a pool's policy seeds it.

    prefill_s = a + b·u + c·u² for u uncached tokens; step_s = a + b·context + c·batch, with context
    the tokens of all sequences in the batch. The forms are DistServe's (OSDI'24).

    Attributes:
        prefill_base_s: a; fixed cost of one prefill.
        prefill_s_per_token: b.
        prefill_s_per_token_squared: c; attention's share.
        step_base_s: a; one step of an empty batch, the weights' read.
        step_s_per_context_token: b; the KV's read.
        step_s_per_sequence: c.
    """

    prefill_base_s: float
    prefill_s_per_token: float
    step_base_s: float
    prefill_s_per_token_squared: float = 0.0
    step_s_per_context_token: float = 0.0
    step_s_per_sequence: float = 0.0

    def prefill_s(self, uncached_tokens: int) -> float:
        """Time of one prefill alone; 0.0 where nothing is left to compute."""
        if uncached_tokens <= 0:
            return 0.0
        return (
            self.prefill_base_s
            + self.prefill_s_per_token * uncached_tokens
            + self.prefill_s_per_token_squared * uncached_tokens * uncached_tokens
        )

    def step_s(self, batch: int, context_tokens: int) -> float:
        """Time of one decode step."""
        return (
            self.step_base_s
            + self.step_s_per_context_token * context_tokens
            + self.step_s_per_sequence * batch
        )


@dataclass(frozen=True, slots=True)
class PathFigures:
    """What a path costs a transfer.

    Attributes:
        latency_s: from asking for the KV to its first byte.
        bandwidth_bytes_per_s: of one transfer alone; 0.0 when unknown, and then nothing is split.
        spread_share: how far a transfer may be from its prediction, as a share of it: about one standard
            deviation.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    spread_share: float = 0.0

    def transfer_s(self, transfer_bytes: int, bytes_in_flight: int) -> float:
        """Time to move `transfer_bytes` behind what is already under way on the same link.

        Raises:
            ValueError: if the bandwidth is unknown.
        """
        if self.bandwidth_bytes_per_s <= 0.0:
            raise ValueError("bandwidth_bytes_per_s is 0.0: a path of unknown bandwidth has no cost")
        return self.latency_s + (transfer_bytes + bytes_in_flight) / self.bandwidth_bytes_per_s
