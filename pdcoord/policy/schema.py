"""The policy as an operator writes it: one PoolPolicy document per model."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pdcoord.core.model import LegOrder, SplitMode
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.policy.values import ApiVersion, DeadlineMs, Metadata, Milliseconds, ServedName, Share, Spec
from pdcoord.policy.yamltext import FaultsError
from pdcoord.protocol.plans import RungKind


class PrefixSpec(Spec):
    """The approximate index of which endpoint has which prompt prefix cached."""

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


class ModelSpec(Spec):
    """The model as the engines serve it."""

    name: ServedName = Field(description="Name under which the engines serve the model.")
    aliases: tuple[ServedName, ...] = Field(
        default=(), max_length=64, description="Other names that clients may use; unique over all documents."
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


def _rung(rung: RungKind) -> RungKind:
    if rung is RungKind.REFUSE:
        raise ValueError("is refuse, which always comes last and is not listed; remove it")
    return rung


_RUNGS = [rung.value for rung in RungKind if rung is not RungKind.REFUSE]
LadderRung = Annotated[RungKind, AfterValidator(_rung), Field(json_schema_extra={"enum": _RUNGS})]


class BudgetSpec(Spec):
    """What keeps a prefill outage from becoming a decode outage."""

    colocated_share_max: Share = Field(
        default=1.0,
        description=(
            "Share of requests that may fall back to a prefill on their decode endpoint, 0 to 1; beyond it "
            "they take the next rung. 1 refuses nobody, and a prefill outage slows every stream instead."
        ),
    )
    decode_kv_usage_max: Share = Field(
        default=0.95,
        description=(
            "No such prefill on a decode endpoint whose KV pool is fuller than this, 0 to 1: above 0.95 it "
            "would push running requests out."
        ),
    )
    window_requests: int = Field(
        default=200,
        ge=1,
        le=100_000,
        description="Requests over which the share is counted; 200 tell shares 0.1 apart.",
    )


class FallbackSpec(Spec):
    """What is tried, in order, when a leg of a request fails."""

    ladder: tuple[LadderRung, ...] = Field(
        default=(RungKind.OTHER_PREFILL, RungKind.COLOCATED, RungKind.OTHER_DECODE),
        description=(
            "other-prefill: another prefill endpoint. colocated: prefill on the decode endpoint itself. "
            "other-decode: another decode endpoint. Each at most once; refuse follows the last."
        ),
    )
    other_prefill_max: int = Field(
        default=2,
        ge=0,
        le=16,
        description="Prefill endpoints to try after the first. 2 outlives one dead pod and one restarting.",
    )
    other_decode_max: int = Field(
        default=2, ge=0, le=16, description="Decode endpoints to try after the first, for the same reason."
    )
    budget: BudgetSpec = Field(default_factory=BudgetSpec, description="Bounds on the colocated rung.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [
            (("ladder", i), f"is {rung} a second time; list it once")
            for i, rung in enumerate(self.ladder)
            if rung in self.ladder[:i]
        ]
        if faults:
            raise FaultsError(faults)
        return self


class SloSpec(Spec):
    """Objectives; a choice that is predicted to miss them loses to one that is not."""

    ttft_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = Field(
        default=None, description="Time to the first token, in ms."
    )
    tpot_ms: Annotated[float, Field(gt=0, le=3_600_000)] | None = Field(
        default=None, description="Time per output token after the first, in ms."
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
