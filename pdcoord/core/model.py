"""What a policy says of one model, compiled: the rules every decision for it obeys."""

from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import ModelName, Pool
from pdcoord.protocol.plans import RungKind


class SplitMode(StrEnum):
    """Whether requests may be split."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class LegOrder(StrEnum):
    """When the decode leg of a split request is sent: behind the prefill leg, or with it.

    Concurrent needs our own connector on both sides; elsewhere it is sequential (SGLang knows only the
    other).
    """

    SEQUENTIAL = "sequential"
    CONCURRENT = "concurrent"


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """When to split and how long to wait.

    Attributes:
        uncached_tokens_min: prompts with fewer tokens to compute stay together.
        saving_s_min: the noise of the estimate; a smaller saving does not split.
        prefill_deadline_s: longest wait for a prefill leg.
        transfer_deadline_s: longest wait from the decode leg's start to its first byte.
        bandwidth_bytes_per_s_min: a slower path is not used.
    """

    mode: SplitMode = SplitMode.AUTO
    uncached_tokens_min: int = 256
    saving_s_min: float = 0.005
    prefill_deadline_s: float = 60.0
    transfer_deadline_s: float = 20.0
    bandwidth_bytes_per_s_min: float = 1e9
    order: LegOrder = LegOrder.SEQUENTIAL


@dataclass(frozen=True, slots=True)
class Fallback:
    """The ladder and its budget.

    Attributes:
        rungs: in the order to try; refuse is always last and not listed.
        other_prefill_max: prefill pods to try after the first.
        other_decode_max: decode pods to try after the first.
        colocated_share_max: share of requests that may fall back to a local prefill, 0..1, over the
            last `window` requests, so that a prefill outage does not become a decode outage.
        decode_kv_usage_max: no local prefill on a decode pod whose KV pool is fuller than this, 0..1.
    """

    rungs: tuple[RungKind, ...] = (RungKind.OTHER_PREFILL, RungKind.COLOCATED, RungKind.OTHER_DECODE)
    other_prefill_max: int = 2
    other_decode_max: int = 2
    colocated_share_max: float = 1.0
    decode_kv_usage_max: float = 0.95
    window: int = 200


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives; None where none is set."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """One model's policy.

    Attributes:
        aliases: other names that clients may use.
        bytes_per_token: prompt bytes per token, for prompts that arrive as text.
        prefix_block_tokens: granularity of the approximate prefix index.
        prefix_blocks_per_endpoint_max: bound on the index's memory.
    """

    name: ModelName
    pools: tuple[Pool, ...]
    aliases: tuple[str, ...] = ()
    disaggregation: Disaggregation = field(default_factory=Disaggregation)
    fallback: Fallback = field(default_factory=Fallback)
    slo: Slo = field(default_factory=Slo)
    bytes_per_token: float = 4.0
    prefix_block_tokens: int = 64
    prefix_blocks_per_endpoint_max: int = 32_768

    @property
    def prefix_block_bytes(self) -> int:
        return max(1, round(self.prefix_block_tokens * self.bytes_per_token))

    @property
    def block_tokens_max(self) -> int:
        """The largest block of any pool; a shorter prompt has no block to hand over."""
        layouts = [pool.side.layout for pool in self.pools]
        return max((layout.block_tokens for layout in layouts if layout is not None), default=1)
