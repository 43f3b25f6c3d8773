"""What a policy says of one model, compiled: the rules every decision for it obeys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pdcoord.core.fleet import ModelName, Pool
from pdcoord.protocol.headers import HostPort
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


class CanaryMode(StrEnum):
    """What canaries are for: nothing, to be looked at, or to keep unlike pairs shut until they passed."""

    OFF = "off"
    OBSERVE = "observe"
    ENFORCE = "enforce"


class PrefixMode(StrEnum):
    """What is believed of where a prompt's beginning is cached.

    Precise is what engines say in KV events, with the approximate index where they say nothing;
    approximate is what was sent where.
    """

    PRECISE = "precise"
    APPROXIMATE = "approximate"


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How the token ids of a prompt are had.

    Attributes:
        file: the model's tokenizer.json, which prompts that are plain text are tokenized by.
        render: a server that renders whole calls to token ids; None to ask the model's engines.
        deadline_s: longest that a request waits for its tokens.
    """

    file: str | None = None
    render: HostPort | None = None
    deadline_s: float = 0.05


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
        resume_tries_max: continuations of one stream.
        resume_age_s_max: a stream whose first byte is longer ago is not continued.
        resume_stall_s_min: shortest silence of a stream that counts as a stall.
        hedge_share_max: share of requests that may be asked of a second decode endpoint while the first shows
            no output, 0..1, over the last `window` requests; 0.0 for none.
        hedge_after_s_min: none is before it has waited so long.
        quarantine_share_max: share of the endpoints that could stand in for each other that may be out of the
            choice at a time for how they serve, 0..1; 0.0 for none.
    """

    rungs: tuple[RungKind, ...] = (
        RungKind.OTHER_PREFILL,
        RungKind.COLOCATED,
        RungKind.OTHER_DECODE,
        RungKind.RESUME,
    )
    other_prefill_max: int = 2
    other_decode_max: int = 2
    colocated_share_max: float = 1.0
    decode_kv_usage_max: float = 0.95
    window: int = 200
    resume_tries_max: int = 3
    resume_age_s_max: float = 600.0
    resume_stall_s_min: float = 10.0
    hedge_share_max: float = 0.05
    hedge_after_s_min: float = 0.25
    quarantine_share_max: float = 0.5


@dataclass(frozen=True, slots=True)
class Slo:
    """Objectives; None where none is set."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """Which requests wait here for their turn, and for how long.

    Attributes:
        queue_s_max: predicted wait at the engines above which a request waits here instead.
        wait_s_max: longest wait here; 0.0 has nobody wait.
        requests_max: that may wait.
        deadline_excess_max: how far past its own deadline, as a share of it, the predicted first token of
            a request may be before it is refused.
        low_share_min: share of the work of higher classes that lower ones get while they wait, 0..1.
        objectives: priority by the name that clients send; a name that is not here has priority 0.
    """

    queue_s_max: float = 5.0
    wait_s_max: float = 30.0
    requests_max: int = 1_024
    deadline_excess_max: float = 0.25
    low_share_min: float = 0.05
    objectives: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CanaryRules:
    """How unlike pairs of pools are tried: those of unequal layouts, or of unlike vendors.

    Attributes:
        interval_s: about how often each endpoint of a pair that passed is tried again.
        timeout_s: longest wait for one of the two answers; later the canary says nothing.
        prompt_tokens: about how long the prompt is, as the model's bytes per token tell; at least two and a
            half of the model's largest blocks.
        logprob_tolerance: how far logprobs of two engines may be apart, in nats, for the answers to be equal.
    """

    mode: CanaryMode = CanaryMode.ENFORCE
    interval_s: float = 600.0
    timeout_s: float = 30.0
    prompt_tokens: int = 400
    output_tokens: int = 16
    logprob_tolerance: float = 0.5


@dataclass(frozen=True, slots=True)
class Model:
    """One model's policy.

    Attributes:
        aliases: other names that clients may use.
        adapters: LoRA adapters that all its engines serve, under names that clients may use.
        bytes_per_token: prompt bytes per token, for prompts that arrive as text.
        prefix_block_tokens: granularity of the approximate prefix index.
        prefix_blocks_per_endpoint_max: bound on the index's memory.
        prefix_mode: precise needs engines that publish KV events and a way to count a prompt's tokens.
        precise_block_tokens: granularity of the exact prefix index, whatever the engines' blocks are.
        precise_blocks_max: bound on its memory: engine blocks of all the model's endpoints together.
        tokenizing: how a prompt's tokens are had where prefixes are precise.
    """

    name: ModelName
    pools: tuple[Pool, ...]
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    disaggregation: Disaggregation = field(default_factory=Disaggregation)
    fallback: Fallback = field(default_factory=Fallback)
    slo: Slo = field(default_factory=Slo)
    admission: AdmissionRules = field(default_factory=AdmissionRules)
    bytes_per_token: float = 4.0
    prefix_block_tokens: int = 64
    prefix_blocks_per_endpoint_max: int = 32_768
    prefix_mode: PrefixMode = PrefixMode.APPROXIMATE
    precise_block_tokens: int = 16
    precise_blocks_max: int = 1_000_000
    tokenizing: Tokenizing = field(default_factory=Tokenizing)
    canary: CanaryRules = field(default_factory=CanaryRules)

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may call it, and its adapters."""
        return (self.name, *self.aliases, *self.adapters)

    def adapter_of(self, name: str) -> str:
        """The adapter that one of its names asks for; "" for the model itself."""
        return name if name != self.name and name in self.adapters else ""

    @property
    def prefix_block_bytes(self) -> int:
        return max(1, round(self.prefix_block_tokens * self.bytes_per_token))

    @property
    def block_tokens_max(self) -> int:
        """The largest block of any pool; a shorter prompt has no block to hand over."""
        layouts = [pool.side.layout for pool in self.pools]
        return max((layout.block_tokens for layout in layouts if layout is not None), default=1)
