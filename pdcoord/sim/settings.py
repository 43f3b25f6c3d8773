"""What makes one emulated engine what it is, fixed for its life."""

from dataclasses import dataclass
from enum import StrEnum

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, Role
from transfer.layout import KvLayout
from transfer.verdict import Connector, Side


class LoadFailurePolicy(StrEnum):
    """What a decode engine does with a request whose KV could not be fetched (vLLM's option)."""

    FAIL = "fail"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One emulated engine.

    Attributes:
        model_seed: engines of one model share it: it decides what the model answers.
        block_total: blocks in the KV pool.
        kv_bytes_per_token: what one token of a prompt adds to a transfer from here.
        link_bytes_per_s: one direction of the NIC.
        step_tokens_max: vLLM's max_num_batched_tokens.
        running_max: vLLM's max_num_seqs.
        queued_max: vLLM's --max-num-queued-reqs; one more is answered 503.
        context_tokens_max: prompt and answer of one request together.
        lease_s: how long finished prefill blocks wait for a consumer (vLLM: kv_lease_duration).
        handshake_s: first contact with a producer, besides the message itself.
        pull_setup_s: from a producer's consent to the first byte.
        pull_s_max: longest life of one fetch, waiting for a room's prefill included (SGLang: 300 s).
        is_silent_corruption_stock: whether unequal block sizes pass the nixl handshake and give wrong
            tokens, as vLLM 0.32 does for bf16 blocks of 32 into 128.
        is_template_deaf: whether its chat template never reads continue_final_message, and ends the message.
        jitter_share: a step's time varies uniformly by this share either way, 0..1.
    """

    name: str
    model: str
    speed: SpeedFigures
    layout: KvLayout
    block_total: int
    kv_bytes_per_token: int
    link_bytes_per_s: float
    engine: EngineKind = EngineKind.VLLM
    role: Role = Role.BOTH
    connector: Connector = Connector.PDCOORD
    model_seed: int = 0
    step_tokens_max: int = 8_192
    running_max: int = 256
    queued_max: int = 1_024
    context_tokens_max: int = 131_072
    lease_s: float = 30.0
    handshake_s: float = 0.2
    pull_setup_s: float = 0.001
    pull_s_max: float = 300.0
    load_failure_policy: LoadFailurePolicy = LoadFailurePolicy.FAIL
    is_silent_corruption_stock: bool = False
    is_prefix_caching: bool = True
    moves_bytes_always: bool = False
    is_template_deaf: bool = False
    jitter_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("block_total", "step_tokens_max", "running_max", "queued_max", "context_tokens_max"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name in ("lease_s", "pull_s_max"):
            value = getattr(self, name)
            if value <= 0.0:
                raise ValueError(f"{name} is {value}, expected more than 0")
        pool_tokens = self.block_total * self.layout.block_tokens
        if pool_tokens < self.context_tokens_max:
            raise ValueError(
                f"the KV pool holds {pool_tokens} tokens, fewer than context_tokens_max "
                f"{self.context_tokens_max}; one request could never finish"
            )
        if not 0.0 <= self.jitter_share < 1.0:
            raise ValueError(f"jitter_share is {self.jitter_share}, expected 0 or more and less than 1")

    @property
    def side(self) -> Side:
        """This engine as one end of a path."""
        return Side(self.connector, self.layout)

    @property
    def is_room_worker(self) -> bool:
        """Whether every request must name a bootstrap room: an SGLang worker that is not of both roles."""
        return self.engine is EngineKind.SGLANG and self.role is not Role.BOTH

    @property
    def caches_prefixes(self) -> bool:
        """SGLang's decode workers keep no radix cache by default (0.5.23)."""
        return self.is_prefix_caching and not (self.is_room_worker and self.role is Role.DECODE)

    @property
    def heartbeat_s(self) -> float:
        """A waiting consumer renews every sixth of a lease (vLLM 0.32)."""
        return self.lease_s / 6

    @property
    def renewal_s(self) -> float:
        """What a heartbeat is worth: two thirds of a lease (vLLM 0.32)."""
        return self.lease_s * 2 / 3
