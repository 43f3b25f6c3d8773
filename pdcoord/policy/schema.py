"""The policy as an operator writes it: one PoolPolicy document per model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pdcoord.core.model import CanaryMode, LegOrder, PrefixMode, SplitMode
from pdcoord.policy.expect import EXPECTED
from pdcoord.policy.fallbackschema import FallbackSpec
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.policy.values import (
    Address,
    ApiVersion,
    DeadlineMs,
    Metadata,
    Milliseconds,
    ServedName,
    Share,
    Spec,
)
from pdcoord.policy.yamltext import FaultsError


class PrefixSpec(Spec):
    """What is known of which endpoint has which prompt prefix cached.

    The approximate index remembers what was sent where. The precise one follows the engines' KV events, by
    token ids; where an engine or a prompt's tokens are silent, the approximate one answers.
    """

    mode: PrefixMode = Field(
        default=PrefixMode.APPROXIMATE,
        description=(
            "precise needs engines that publish KV events (endpoints[].kv_events_port) and the prompts' "
            "tokens (tokenizer); approximate needs neither."
        ),
    )
    block_tokens: int = Field(
        default=64,
        ge=1,
        le=8192,
        description=(
            "Tokens that one entry stands for. Smaller finds shorter shared prefixes and costs more memory; "
            "64 is a system prompt's grain."
        ),
    )
    blocks_per_endpoint_max: int = Field(
        default=32_768,
        ge=1,
        le=4_194_304,
        description=(
            "Entries kept per endpoint, oldest use dropped first. 32768 x 64 tokens is 2.1 million tokens, "
            "more than the KV pool of one accelerator holds for an 8B model."
        ),
    )
    precise_block_tokens: int = Field(
        default=16,
        ge=4,
        le=8192,
        description=(
            "Tokens that one key of the precise index stands for, whatever the engines' blocks are. 16 is "
            "vLLM's own block; larger costs less memory and finds shorter matches."
        ),
    )
    precise_blocks_max: int = Field(
        default=1_000_000,
        ge=1_024,
        le=100_000_000,
        description=(
            "Engine blocks in the precise index, all endpoints together; past it the endpoint with the most "
            "loses its oldest. A million blocks of 16 tokens are the KV pools of about 60 accelerators "
            "with 260 thousand tokens each."
        ),
    )


class TokenizerSpec(Spec):
    """How the token ids of prompts are had where prefixes are precise.

    A prompt that comes as token ids needs nobody. Plain text is tokenized here, with `file`; all else is
    asked of `render`, or of a ready vLLM endpoint of the model.
    """

    file: str | None = Field(
        default=None,
        pattern=r"^/[^\x00]*$",
        max_length=4096,
        description=(
            "The model's tokenizer.json, as an absolute path where the gateway runs: it tokenizes the "
            "prompts of /v1/completions. Leave it out for a tokenizer that needs code of its own. A new "
            "content is taken over while the gateway runs."
        ),
        json_schema_extra={EXPECTED: "an absolute path such as /models/llama/tokenizer.json"},
    )
    render: Address | None = Field(
        default=None,
        description=(
            "A server with vLLM's /render calls (`vllm launch render`, or an engine with "
            "--enable-scale-out), which tells the tokens of every kind of call. Without it POST /tokenize of "
            "the model's vLLM endpoints tells those of chats, and of prompts for which there is no file."
        ),
    )
    deadline_ms: Annotated[float, Field(ge=1, le=10_000)] = Field(
        default=50.0,
        description=(
            "Longest that a request waits for its tokens, in ms; past it the approximate index decides. 50 "
            "tokenizes about 80 KB of text."
        ),
    )


class ModelSpec(Spec):
    """The model as the engines serve it."""

    name: ServedName = Field(description="Name under which the engines serve the model.")
    aliases: tuple[ServedName, ...] = Field(
        default=(), max_length=64, description="Other names that clients may use; unique over all documents."
    )
    adapters: tuple[ServedName, ...] = Field(
        default=(),
        max_length=256,
        description=(
            "LoRA adapters that every engine of the model serves under these names (vLLM: --lora-modules). "
            "Clients ask for one as `model`; the prefixes of each are kept apart. Unique like aliases. "
            "With a pool of SGLang each is NAME:ADAPTER, NAME that of the model and ADAPTER as in SGLang's "
            "--lora-paths: by a name without the colon its base model would answer."
        ),
    )
    bytes_per_token: float = Field(
        default=4.0,
        ge=0.25,
        le=64,
        description=(
            "Bytes of prompt text per token, to estimate a prompt's length without a tokenizer. "
            "4 suits English; about 2.5 suits code or mixed languages."
        ),
    )
    prefix: PrefixSpec = Field(default_factory=PrefixSpec, description="The prefix index.")
    tokenizer: TokenizerSpec | None = Field(
        default=None, description="How prompts are tokenized, where prefixes are precise."
    )


class DisaggregationSpec(Spec):
    """When a request is split, and how long its legs may take."""

    mode: SplitMode = Field(
        default=SplitMode.AUTO,
        description=(
            "auto splits where that is predicted to be faster, always wherever a path is open, "
            "never not at all."
        ),
    )
    order: LegOrder = Field(
        default=LegOrder.SEQUENTIAL,
        description=(
            "When the decode leg is sent. sequential: once the prefill leg has answered. concurrent: with "
            "it, so that KV moves while the prompt is still computed; only between pools of connector "
            "pdcoord, others stay sequential."
        ),
    )
    uncached_tokens_min: int = Field(
        default=256,
        ge=0,
        le=10_000_000,
        description=(
            "Prompts with fewer tokens to compute stay together. 256 is about 50 ms of prefill for an 8B "
            "model on an H100."
        ),
    )
    saving_ms_min: Milliseconds = Field(
        default=5.0,
        description=(
            "Smallest predicted saving that is worth a split, in ms: the noise of the prediction. 5 is "
            "half a decode step of an 8B model on an H100."
        ),
    )
    prefill_deadline_ms: DeadlineMs = Field(
        default=60_000.0,
        description=(
            "Longest wait for one prefill leg's answer, in ms. 60000 is 200 thousand tokens at 0.3 ms each."
        ),
    )
    transfer_deadline_ms: DeadlineMs = Field(
        default=20_000.0,
        description=(
            "Longest wait from the start of the decode leg to its first byte, in ms. Shorter than "
            "lease_ms, so that KV is given up before its producer drops it: 20000 is two thirds of the "
            "default lease."
        ),
    )
    lease_ms: DeadlineMs = Field(
        default=30_000.0,
        description=(
            "How long the engines keep KV for its consumer, in ms. 30000 is NixlConnector's own "
            "(kv_connector_extra_config.kv_lease_duration, 30 s)."
        ),
    )
    bandwidth_gbit_per_s_min: float = Field(
        default=8.0,
        ge=0,
        le=100_000,
        description=(
            "Paths with less bandwidth are not used, in Gbit/s. 8 keeps out UCX over plain TCP (4 to 5 "
            "Gbit/s), where a transfer takes as long as the prefill it saves."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.transfer_deadline_ms >= self.lease_ms:
            message = (
                f"is {self.transfer_deadline_ms:g}, expected less than lease_ms ({self.lease_ms:g}): "
                "KV would be dropped while it is waited for"
            )
            raise FaultsError([(("transfer_deadline_ms",), message)])
        return self


class SloSpec(Spec):
    """Objectives; a choice that is predicted to miss them loses to one that is not."""

    ttft_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = Field(
        default=None, description="Time to the first token, in ms."
    )
    tpot_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = Field(
        default=None, description="Time per output token after the first, in ms."
    )


ObjectiveName = Annotated[
    str,
    Field(
        pattern=r"^[!-~]+$",
        max_length=128,
        json_schema_extra={EXPECTED: "up to 128 printable ASCII characters without a space"},
    ),
]
Priority = Annotated[int, Field(ge=-1_000, le=1_000)]


class AdmissionSpec(Spec):
    """Which requests wait in the gateway for their turn, instead of in the engines."""

    queue_ms_max: Milliseconds = Field(
        default=5_000.0,
        description=(
            "A request whose best endpoint is predicted to have it wait longer than this, in ms, waits in "
            "the gateway instead, where order still counts. 5000 never leaves an engine idle; less is "
            "stricter about priorities and fairness."
        ),
    )
    wait_ms_max: Milliseconds = Field(
        default=30_000.0,
        description=(
            "Longest wait in the gateway, in ms, before 429; who is predicted to wait longer is told so now. "
            "0 has nobody wait: endpoints at their limits mean 429, and engines queue. 30000 is half of a "
            "client's usual timeout of a minute."
        ),
    )
    requests_max: int = Field(
        default=1_024,
        ge=1,
        le=65_536,
        description=(
            "Requests of this model that may wait. Each holds its body in memory: 1024 of 100 KB are 100 MB."
        ),
    )
    deadline_excess_max: float = Field(
        default=0.25,
        ge=0,
        le=100,
        description=(
            "How far past its own deadline (x-llm-d-slo-ttft-ms) the predicted first token of a request may "
            "be before it is refused, as a share of the deadline: 0.25 allows for the error of predictions."
        ),
    )
    low_share_min: Share = Field(
        default=0.05,
        description=(
            "Share of what higher priorities are given that lower ones get while they wait, 0 to 1. 0 is "
            "strict order; 0.05 keeps the lowest alive."
        ),
    )
    objectives: Annotated[dict[ObjectiveName, Priority], Field(max_length=64)] = Field(
        default_factory=dict,
        description=(
            "Priority by the name in a client's x-llm-d-inference-objective; a name that is not here, or "
            "none, has 0. Higher goes first; below 0 a request is refused where others would wait."
        ),
    )


class CanarySpec(Spec):
    """How pairs of pools of unlike vendors or layouts are tried: one prompt split and served alone."""

    mode: CanaryMode = Field(
        default=CanaryMode.ENFORCE,
        description=(
            "off: nothing is tried. observe: tried and told, and nothing is shut. enforce: such a pair "
            "carries no request before its first canary passed, and none while its last one failed. enforce, "
            "since a wrong pair answers 200 with wrong tokens, and a right one waits a second or so. With a "
            "sidecar that is not pdcoord's nothing says that a prompt was split: there a right answer leaves "
            "the pair open and unproven."
        ),
    )
    interval_s: float = Field(
        default=600.0,
        ge=1,
        le=604_800,
        description=(
            "About how often each endpoint of a pair that passed is tried again, in s. At 600 it costs an "
            "endpoint two prompts in ten minutes."
        ),
    )
    timeout_ms: DeadlineMs = Field(
        default=30_000.0,
        description=(
            "Longest wait for either answer, in ms; later the canary says nothing and is tried again. 30000 "
            "is a prompt in a queue behind others."
        ),
    )
    prompt_tokens: int = Field(
        default=400,
        ge=16,
        le=100_000,
        description=(
            "About how long the prompt is; at least two and a half of the largest block, whatever this says. "
            "400 is three blocks of 128 and a part of one, 25 of 16."
        ),
    )
    output_tokens: int = Field(
        default=16,
        ge=1,
        le=1_024,
        description="Tokens that are compared. 16 take 0.2 s of an engine with steps of 12 ms.",
    )
    logprob_tolerance: float = Field(
        default=0.5,
        ge=0,
        le=100,
        description=(
            "How far the logprobs of two engines may be apart, in nats, for a token to be the same or a tie: "
            "vendors round differently, fp8 KV more so. 0.5 is a start: the log line canary.judged tells how "
            "far a pair is apart. 0 wants equal numbers."
        ),
    )


class PoolPolicy(Spec):
    """How one model is served by its pools."""

    api_version: ApiVersion
    kind: Literal["PoolPolicy"] = Field(description="Always PoolPolicy.")
    metadata: Metadata = Field(description="What the document is called.")
    model: ModelSpec = Field(description="The model.")
    pools: tuple[PoolSpec, ...] = Field(
        min_length=1, max_length=256, description="The pools that serve it; at least one of them decodes."
    )
    disaggregation: DisaggregationSpec = Field(
        default_factory=DisaggregationSpec, description="When to split, and deadlines."
    )
    fallback: FallbackSpec = Field(default_factory=FallbackSpec, description="The fallback ladder.")
    slo: SloSpec = Field(default_factory=SloSpec, description="Objectives.")
    admission: AdmissionSpec = Field(
        default_factory=AdmissionSpec, description="Who waits, and who is refused."
    )
    canary: CanarySpec = Field(
        default_factory=CanarySpec, description="How unlike pairs of pools are tried before they are used."
    )
