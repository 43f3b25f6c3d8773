"""A pool as written, compiled to the pool and the endpoints that the core knows."""

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolLimits, PoolName
from pdcoord.policy.poolschema import PoolSpec, SpeedSpec
from pdcoord.protocol.headers import HostPort
from transfer.verdict import Side

BYTES_PER_GBIT = 125_000_000.0
SGLANG_BOOTSTRAP_PORT = 8998
"""SGLang 0.5.23, --disaggregation-bootstrap-port."""


def compile_pool(spec: PoolSpec, model: ModelName) -> Pool:
    """Compile a pool; a link that is not given becomes 0.0, which the core reads as unknown."""
    return Pool(
        name=PoolName(spec.name),
        model=model,
        role=spec.role,
        vendor=spec.vendor,
        engine=spec.engine,
        side=Side(spec.connector, None if spec.layout is None else spec.layout.compiled()),
        speed=_compile_speed(spec.speed),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        link_bytes_per_s=(spec.link_gbit_per_s or 0.0) * BYTES_PER_GBIT,
        cost_per_hour=spec.cost_per_hour,
        priority_max=spec.priority_max,
        limits=PoolLimits(spec.limits.in_flight_max, spec.limits.context_tokens_max),
    )


def _compile_speed(spec: SpeedSpec) -> SpeedFigures:
    return SpeedFigures(
        prefill_base_s=(spec.prefill_base_ms or 0.0) / 1e3,
        prefill_s_per_token=(spec.prefill_ms_per_token or 0.0) / 1e3,
        prefill_s_per_token_squared=(spec.prefill_ns_per_token_squared or 0.0) / 1e9,
        step_base_s=(spec.step_base_ms or 0.0) / 1e3,
        step_s_per_sequence=(spec.step_us_per_sequence or 0.0) / 1e6,
        step_s_per_context_token=(spec.step_ns_per_context_token or 0.0) / 1e9,
    )


def make_endpoint(
    pool: Pool,
    address: HostPort,
    name: str | None,
    bootstrap_port: int | None,
    *,
    kv_port: int | None = None,
    metrics_port: int | None = None,
    kv_events_port: int | None = None,
    kv_events_replay_port: int | None = None,
) -> Endpoint:
    """One endpoint of a pool, its id being `<pool>/<name>` and its name by default the address."""
    needs_bootstrap = pool.engine is EngineKind.SGLANG and pool.can_prefill
    if bootstrap_port is None and needs_bootstrap:
        bootstrap_port = SGLANG_BOOTSTRAP_PORT
    id_ = EndpointId(f"{pool.name}/{name or address}")
    return Endpoint(
        id_,
        pool,
        address,
        bootstrap_port,
        kv_port,
        metrics_port,
        kv_events_port=kv_events_port,
        kv_events_replay_port=kv_events_replay_port,
    )
