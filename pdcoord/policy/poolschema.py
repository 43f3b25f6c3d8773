"""A pool as an operator writes it: endpoints of one vendor, engine, layout and role."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from pdcoord.core.fleet import EngineKind, Role
from pdcoord.policy.errors import KeyPath, quote
from pdcoord.policy.expect import DEFAULT_WORDS
from pdcoord.policy.values import (
    Address,
    EndpointName,
    GbitPerS,
    Labels,
    Milliseconds,
    Name,
    Port,
    Spec,
)
from pdcoord.policy.yamltext import FaultsError
from pdcoord.protocol.plans import KV_PORT
from transfer.layout import PLAIN_TILING, KvDtype, KvLayout, KvSplit, Order
from transfer.presets import PRESETS
from transfer.verdict import KNOWN_TILINGS, Connector


def _preset_name(name: str) -> str:
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"is {quote(name)}, expected one of {', '.join(PRESETS)}{hint}")
    return name


PresetName = Annotated[str, AfterValidator(_preset_name), Field(json_schema_extra={"enum": list(PRESETS)})]


def _block_tokens_or_preset(schema: dict[str, Any]) -> None:
    """Say in JSON Schema that a preset brings a block size."""
    schema["required"].remove("block_tokens")
    if not schema["required"]:
        del schema["required"]
    named = {"properties": {"preset": {"type": "string"}}, "required": ["preset"]}
    schema["anyOf"] = [{"required": ["block_tokens"]}, named]


class LayoutSpec(Spec):
    """How the engines of a pool store KV; decides, with the connector, which pools can be paired.

    `pdcoord paths --layouts A B` judges two of them; the presets are listed at the end of this page.
    """

    model_config = ConfigDict(json_schema_extra=_block_tokens_or_preset)

    preset: PresetName | None = Field(
        default=None,
        description=(
            "A backend's own layout by name. It stands in for the defaults of the other keys, and those that "
            "are written here override it."
        ),
    )
    block_tokens: int = Field(
        ge=1,
        description="Tokens in one KV block: vLLM --block-size, SGLang --page-size.",
        json_schema_extra={DEFAULT_WORDS: "required without a preset"},
    )
    order: Order = Field(
        default=Order.NHD,
        description=(
            "Physical order of the axes: in NHD a block's tokens come before its heads, in HND its heads "
            "before its tokens (vLLM VLLM_KV_CACHE_LAYOUT). The others are vLLM's names, with L for layers, "
            "B for blocks, H for heads, N for tokens and C for a token's elements."
        ),
    )
    dtype: KvDtype = Field(
        default=KvDtype.BFLOAT16,
        description=(
            "Element type of the KV cache (vLLM --kv-cache-dtype; the model's own type when it is auto). "
            "AMD gfx94x writes fp8_e4m3fnuz where others write fp8_e4m3fn."
        ),
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=1024, description="Ranks that share a layer's KV heads: --tensor-parallel-size."
    )
    tiling: str = Field(
        default=PLAIN_TILING,
        min_length=1,
        max_length=64,
        description=(
            "Name of a vendor's private arrangement inside a page; plain where there is none. Known: "
            f"{', '.join(KNOWN_TILINGS)}. Another one can be paired with its equal only."
        ),
    )
    split: KvSplit = Field(
        default=KvSplit.PACKED,
        description=(
            "Where keys and values stand. packed: a token's key beside its value. halved: all keys of a "
            "block before all its values. separate: in two tensors."
        ),
    )
    head_dim_multiple: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Each head is padded with zeros to a multiple of this many elements; 1 pads nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: object) -> object:
        """Put what the preset says where nothing is written."""
        if not isinstance(data, dict) or (name := data.get("preset")) is None:
            return data
        # What names no preset is a problem of its own; any block size keeps it the only one.
        is_known = isinstance(name, str) and name in PRESETS
        layout = PRESETS[name].layout if is_known else KvLayout(1)
        return {field.name: getattr(layout, field.name) for field in fields(layout)} | data

    def compiled(self) -> KvLayout:
        """The layout that this describes."""
        return KvLayout(**{field.name: getattr(self, field.name) for field in fields(KvLayout)})


KV_PORT_MEANING = (
    f"KV side channel of an engine with our connector that prefills: its kv_port, {KV_PORT} if not set."
)
METRICS_PORT_MEANING = (
    "Metrics port of the sidecar on a pod that decodes, which tells what its probes of paths found; nobody "
    "asks it if not set."
)
KV_EVENTS_PORT_MEANING = (
    "ZMQ port of the engine's KV events (the port of vLLM's and SGLang's --kv-events-config `endpoint`), at "
    "the address's host; 5557 is their default. Write `tcp://*:PORT` there: with another host the engine "
    "calls that one, and is not heard. Without this port the endpoint's prefixes are approximate."
)
KV_EVENTS_REPLAY_PORT_MEANING = (
    "ZMQ port that sends past KV events again (`replay_endpoint`). Without it a lost event empties what is "
    "known of the endpoint."
)


class EndpointSpec(Spec):
    """One engine rank that can be addressed."""

    address: Address = Field(
        description=(
            "host:port where requests go: the sidecar on a decode pod, the engine itself on a prefill pod."
        )
    )
    name: EndpointName | None = Field(
        default=None, description="Name in logs and metrics, unique in the pool; the address if not set."
    )
    bootstrap_port: Port | None = Field(
        default=None,
        description=(
            "SGLang's rendezvous port (--disaggregation-bootstrap-port); 8998, SGLang's own default, on "
            "SGLang pools that prefill, otherwise unused."
        ),
    )
    kv_port: Port | None = Field(default=None, description=KV_PORT_MEANING)
    metrics_port: Port | None = Field(default=None, description=METRICS_PORT_MEANING)
    kv_events_port: Port | None = Field(default=None, description=KV_EVENTS_PORT_MEANING)
    kv_events_replay_port: Port | None = Field(default=None, description=KV_EVENTS_REPLAY_PORT_MEANING)


class SelectorSpec(Spec):
    """Picks the pool's endpoints out of the endpoints file, or the namespace's pods, by their labels."""

    match_labels: Annotated[Labels, Field(min_length=1)] = Field(
        description="Labels that an entry or a pod must have, all of them, with these values."
    )


class SpeedSpec(Spec):
    """What work costs on one endpoint, as two formulas.

    prefill = base + a·tokens + b·tokens², step = base + c·sequences + d·context.

    The prefill figures are needed on every pool that may compute a prompt, which decode pools of vLLM
    do when a request is kept together; the step figures on every pool that decodes. Of each group at
    least one must be above 0.
    """

    prefill_base_ms: Milliseconds | None = Field(
        default=None, description="Fixed cost of one prefill, in ms."
    )
    prefill_ms_per_token: Milliseconds | None = Field(
        default=None,
        description="Cost of each prompt token to compute, in ms: 1000 / prefill tokens per second.",
    )
    prefill_ns_per_token_squared: float | None = Field(
        default=None,
        ge=0,
        le=1e9,
        description="Cost that grows with the square of the prompt (attention), in ns; 0 leaves it out.",
    )
    step_base_ms: Milliseconds | None = Field(
        default=None,
        description="One decode step of an empty batch, in ms: the inter-token latency at batch 1.",
    )
    step_us_per_sequence: float | None = Field(
        default=None, ge=0, le=1e7, description="Cost of each further sequence in the batch to a step, in µs."
    )
    step_ns_per_context_token: float | None = Field(
        default=None,
        ge=0,
        le=1e7,
        description=(
            "Cost of each token of context in the batch to a step, in ns: "
            "KV bytes per token / memory bandwidth."
        ),
    )


class LimitsSpec(Spec):
    """Bounds on what one endpoint of the pool is given."""

    in_flight_max: int = Field(
        default=256,
        ge=1,
        le=65_536,
        description="Requests on one endpoint at a time, both legs counted; 256 is a common --max-num-seqs.",
    )
    context_tokens_max: int | None = Field(
        default=None,
        ge=1,
        le=100_000_000,
        description=(
            "Prompt and output tokens of one request together (--max-model-len); if not set, the "
            "engine's own limit answers."
        ),
    )


class PoolSpec(Spec):
    """Endpoints of one vendor, engine, layout and role."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["endpoints"]}, {"required": ["selector"]}]}
    )

    name: Name = Field(description="Unique over all documents; part of every endpoint's id.")
    role: Role = Field(description="Legs that the pool takes: prefill, decode, or both, as load asks.")
    vendor: str = Field(
        pattern=r"^[!-~]([ -~]*[!-~])?$",
        max_length=64,
        description="Maker of the accelerators, free text, shown in metrics.",
        json_schema_extra={"x-expected": "up to 64 printable ASCII characters"},
    )
    engine: EngineKind = Field(description="The engine, which decides the dialect of the handoff.")
    connector: Connector = Field(
        description=(
            "Software that moves KV. nixl: vLLM's NixlConnector, equal layouts only. pdcoord: ours, unlike "
            "layouts too. sglang: SGLang's own, on its prefill and decode servers. none: KV never leaves; "
            "the pool serves whole requests."
        )
    )
    layout: LayoutSpec | None = Field(
        default=None,
        description="How KV is stored. Without it every pair with this pool is impossible.",
    )
    kv_bytes_per_token: int = Field(
        ge=1,
        le=1 << 26,
        description=(
            "KV bytes that one prompt token adds to a transfer, all ranks together: "
            "2 x layers x KV heads x head size x bytes per element."
        ),
    )
    link_gbit_per_s: GbitPerS | None = Field(
        default=None,
        description=(
            "What one endpoint's network card carries, in Gbit/s. Without it the bandwidth of the pool's "
            "paths is unknown, and nothing is split over them."
        ),
    )
    endpoints: tuple[EndpointSpec, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="The pool's endpoints. Exactly one of endpoints and selector is set.",
    )
    selector: SelectorSpec | None = Field(
        default=None,
        description="Where the endpoints come from an endpoints file, or are pods: which of them.",
    )
    speed: SpeedSpec = Field(description="Speed figures of one endpoint, the seed of every prediction.")
    cost_per_hour: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Cost of one endpoint, in any one currency for the whole file; breaks ties of time.",
    )
    limits: LimitsSpec = Field(default_factory=LimitsSpec, description="Bounds on what an endpoint is given.")
    priority_max: int | None = Field(
        default=None,
        ge=-1_000,
        le=1_000,
        description=(
            "Requests of this priority and lower ones (admission.objectives) come to this pool first while "
            "its predicted first token is within slo.ttft_ms, or without one within admission.queue_ms_max; "
            "those of higher priority only when the other pools are not. For older hardware. If not set, the "
            "pool is as good as any for all."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [*_source_faults(self), *_connector_faults(self)]
        if faults:
            raise FaultsError(faults)
        return self


def _source_faults(pool: PoolSpec) -> list[tuple[KeyPath, str]]:
    if pool.endpoints is None and pool.selector is None:
        return [((), "has neither endpoints nor selector; set one of them")]
    if pool.endpoints is not None and pool.selector is not None:
        return [(("selector",), "is set beside endpoints; keep one of them")]
    return []


def _connector_faults(pool: PoolSpec) -> list[tuple[KeyPath, str]]:
    """Refuse a connector that the engine does not have in this role."""
    connector = pool.connector
    if pool.engine is EngineKind.VLLM:
        if connector is Connector.SGLANG:
            return [(("connector",), "is sglang on a vllm pool, expected one of nixl, pdcoord, none")]
    elif pool.role is Role.BOTH:
        # --disaggregation-mode is prefill, decode or null, and a null server moves no KV (SGLang 0.5.23).
        if connector is not Connector.NONE:
            return [(("connector",), f"is {connector} on an sglang pool with role both, expected none")]
    elif connector is not Connector.SGLANG:
        return [(("connector",), f"is {connector} on an sglang pool with role {pool.role}, expected sglang")]
    return []
