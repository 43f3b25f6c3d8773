"""Sound policy documents to the core's models, and to where each pool's endpoints come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdcoord.core.fleet import Endpoint, ModelName, Pool
from pdcoord.core.model import AdmissionRules, CanaryRules, Disaggregation, Fallback, Model, Slo, Tokenizing
from pdcoord.policy.advice import warnings_of
from pdcoord.policy.errors import Problem
from pdcoord.policy.fallbackschema import FallbackSpec
from pdcoord.policy.load import PolicyDocument, parts_of
from pdcoord.policy.pools import BYTES_PER_GBIT, compile_pool, make_endpoint
from pdcoord.policy.poolschema import PoolSpec
from pdcoord.policy.schema import (
    AdmissionSpec,
    CanarySpec,
    DisaggregationSpec,
    PoolPolicy,
    SloSpec,
    TokenizerSpec,
)


@dataclass(frozen=True, slots=True)
class PoolBinding:
    """Where the endpoints of one pool come from: one of the two, never both.

    Attributes:
        endpoints: those that the policy lists.
        match_labels: labels of the pool's entries in an endpoints file; None where they are listed.
    """

    pool: Pool
    endpoints: tuple[Endpoint, ...]
    match_labels: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A whole policy file, ready for the core.

    Attributes:
        bindings: one for each pool of each model, in the order of the file.
        warnings: what may not have been meant; nothing in it stops the policy.
    """

    models: tuple[Model, ...]
    bindings: tuple[PoolBinding, ...]
    warnings: tuple[Problem, ...]


def compile_policy(documents: Sequence[PolicyDocument]) -> CompiledPolicy:
    """Compile what `load_policies` accepted; this cannot fail."""
    models: list[Model] = []
    bindings: list[PoolBinding] = []
    for document in documents:
        name = ModelName(document.spec.model.name)
        bound = [_bind(spec, compile_pool(spec, name)) for spec in document.spec.pools]
        models.append(_compile_model(document.spec, tuple(binding.pool for binding in bound)))
        bindings += bound
    warnings = warnings_of(parts_of(document) for document in documents)
    return CompiledPolicy(tuple(models), tuple(bindings), tuple(warnings))


def _bind(spec: PoolSpec, pool: Pool) -> PoolBinding:
    endpoints = tuple(
        make_endpoint(
            pool,
            endpoint.address,
            endpoint.name,
            endpoint.bootstrap_port,
            kv_port=endpoint.kv_port,
            metrics_port=endpoint.metrics_port,
            kv_events_port=endpoint.kv_events_port,
            kv_events_replay_port=endpoint.kv_events_replay_port,
        )
        for endpoint in spec.endpoints or ()
    )
    return PoolBinding(pool, endpoints, None if spec.selector is None else dict(spec.selector.match_labels))


def _compile_model(spec: PoolPolicy, pools: tuple[Pool, ...]) -> Model:
    return Model(
        name=ModelName(spec.model.name),
        pools=pools,
        aliases=spec.model.aliases,
        adapters=spec.model.adapters,
        disaggregation=_compile_disaggregation(spec.disaggregation),
        fallback=_compile_fallback(spec.fallback),
        slo=_compile_slo(spec.slo),
        admission=_compile_admission(spec.admission),
        canary=_compile_canary(spec.canary),
        bytes_per_token=spec.model.bytes_per_token,
        prefix_block_tokens=spec.model.prefix.block_tokens,
        prefix_blocks_per_endpoint_max=spec.model.prefix.blocks_per_endpoint_max,
        prefix_mode=spec.model.prefix.mode,
        precise_block_tokens=spec.model.prefix.precise_block_tokens,
        precise_blocks_max=spec.model.prefix.precise_blocks_max,
        tokenizing=_compile_tokenizer(spec.model.tokenizer or TokenizerSpec()),
    )


def _compile_tokenizer(spec: TokenizerSpec) -> Tokenizing:
    return Tokenizing(file=spec.file, render=spec.render, deadline_s=spec.deadline_ms / 1e3)


def _compile_disaggregation(spec: DisaggregationSpec) -> Disaggregation:
    return Disaggregation(
        mode=spec.mode,
        uncached_tokens_min=spec.uncached_tokens_min,
        saving_s_min=spec.saving_ms_min / 1e3,
        prefill_deadline_s=spec.prefill_deadline_ms / 1e3,
        transfer_deadline_s=spec.transfer_deadline_ms / 1e3,
        bandwidth_bytes_per_s_min=spec.bandwidth_gbit_per_s_min * BYTES_PER_GBIT,
        order=spec.order,
    )


def _compile_fallback(spec: FallbackSpec) -> Fallback:
    return Fallback(
        rungs=spec.ladder,
        other_prefill_max=spec.other_prefill_max,
        other_decode_max=spec.other_decode_max,
        colocated_share_max=spec.budget.colocated_share_max,
        decode_kv_usage_max=spec.budget.decode_kv_usage_max,
        window=spec.budget.window_requests,
        resume_tries_max=spec.resume.tries_max,
        resume_age_s_max=spec.resume.age_s_max,
        resume_stall_s_min=spec.resume.stall_ms_min / 1e3,
        hedge_share_max=spec.hedge.share_max,
        hedge_after_s_min=spec.hedge.after_ms_min / 1e3,
        quarantine_share_max=spec.quarantine.share_max,
    )


def _compile_admission(spec: AdmissionSpec) -> AdmissionRules:
    return AdmissionRules(
        queue_s_max=spec.queue_ms_max / 1e3,
        wait_s_max=spec.wait_ms_max / 1e3,
        requests_max=spec.requests_max,
        deadline_excess_max=spec.deadline_excess_max,
        low_share_min=spec.low_share_min,
        objectives=dict(spec.objectives),
    )


def _compile_canary(spec: CanarySpec) -> CanaryRules:
    return CanaryRules(
        mode=spec.mode,
        interval_s=spec.interval_s,
        timeout_s=spec.timeout_ms / 1e3,
        prompt_tokens=spec.prompt_tokens,
        output_tokens=spec.output_tokens,
        logprob_tolerance=spec.logprob_tolerance,
    )


def _compile_slo(spec: SloSpec) -> Slo:
    return Slo(
        ttft_s=None if spec.ttft_ms is None else spec.ttft_ms / 1e3,
        tpot_s=None if spec.tpot_ms is None else spec.tpot_ms / 1e3,
    )
