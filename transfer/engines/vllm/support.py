"""What the vLLM connector can serve: refuses other set-ups, and reads shapes and settings off vLLM's objects.

vLLM's objects are taken as they come, by the names of their attributes and classes in vLLM 0.32.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transfer.errors import LayoutError, SettingError
from transfer.layout import GroupShape
from transfer.settings import AgentSettings, settings_from_mapping

RECOMPUTE = "recompute"
ATTENTION = frozenset(
    {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
)
"""Kinds of KV that are tokens in blocks. Their subclasses for single models are not: they are refused."""

QUANTISED = frozenset({"NONE", "FP8_PER_TENSOR"})


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Make sure that this engine can be served.

    Raises:
        ValueError: saying what to change.
    """
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != RECOMPUTE:
        raise ValueError(
            f"kv_load_failure_policy is {policy!r}, and a failed transfer would fail its request: put "
            f'"kv_load_failure_policy": "{RECOMPUTE}" into --kv-transfer-config'
        )
    parallel = vllm_config.parallel_config
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name)
        if size != 1:
            raise ValueError(f"{name} is {size}: PdcoordConnector serves 1 only; use tensor parallelism")
    group_shapes(vllm_config, kv_cache_config)


def group_shapes(vllm_config: Any, kv_cache_config: Any) -> tuple[GroupShape, ...]:
    """The shapes of the groups that are transferred, in the engine's order.

    Raises:
        ValueError: if a group does not keep tokens in blocks of one shape.
    """
    if not kv_cache_config.transfer_groups:
        raise ValueError("the model has no KV cache that could be transferred: run it without a KV connector")
    ranks = vllm_config.parallel_config.tensor_parallel_size
    total = vllm_config.model_config.get_total_num_kv_heads()
    try:
        return tuple(_group_shape(group, ranks, total) for group in kv_cache_config.transfer_groups)
    except LayoutError as error:
        raise ValueError(f"the model's KV cache cannot be described: {error}") from error


def has_windows(kv_cache_config: Any) -> bool:
    """Whether a group gives blocks of a request back while it runs."""
    return any(
        _window(spec) is not None for group in kv_cache_config.transfer_groups for spec in specs(group)
    )


def specs(group: Any) -> tuple[Any, ...]:
    """The specs of a group's layers: one for all, or one for each."""
    own = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return (group.kv_cache_spec,) if own is None else tuple(own.values())


def _group_shape(group: Any, ranks: int, total_heads: int) -> GroupShape:
    for spec in specs(group):
        _check_spec(spec, group.layer_names)
    shapes = {
        GroupShape(
            layer_count=len(group.layer_names),
            kv_heads=_model_heads(spec, ranks, total_heads),
            key_dim=spec.head_size,
            value_dim=spec.head_size_v,
            window_tokens=_window(spec),
        )
        for spec in specs(group)
    }
    if len(shapes) > 1:
        raise ValueError(
            f"layers {_some(group.layer_names)} share a KV cache group with unlike heads, which "
            "PdcoordConnector cannot transfer: use another model, or another connector"
        )
    return shapes.pop()


def _check_spec(spec: Any, layer_names: Iterable[str]) -> None:
    kind = type(spec).__name__
    quantised = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    is_plain = (
        kind in ATTENTION
        and quantised in QUANTISED
        and spec.tokens_per_state == 1
        and getattr(spec, "model_version", None) is None
    )
    if not is_plain:
        raise ValueError(
            f"layers {_some(layer_names)} keep {kind} ({quantised.lower()}), which PdcoordConnector cannot "
            "transfer: use a model with plain attention layers only, or another connector"
        )


def _model_heads(spec: Any, ranks: int, total_heads: int) -> int:
    """KV heads of a layer before they are split over ranks.

    Replicated heads show in `max_tp_shards` where the model tells it, else in the model's own count.
    """
    own: int = spec.num_kv_heads
    if spec.head_size_v == 0:
        return 1
    if spec.max_tp_shards is not None:
        return own * min(ranks, int(spec.max_tp_shards))
    if own == max(1, total_heads // ranks):
        return total_heads
    return own * ranks


def _window(spec: Any) -> int | None:
    kind = type(spec).__name__
    if kind == "SlidingWindowSpec":
        return int(spec.sliding_window)
    return int(spec.attention_chunk_size) if kind == "ChunkedLocalAttentionSpec" else None


def _some(layer_names: Iterable[str]) -> str:
    names = list(layer_names)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def settings_of(vllm_config: Any, environ: Mapping[str, str]) -> AgentSettings:
    """The agent's settings: `kv_connector_extra_config`, with `kv_port` for the port.

    With data parallelism each engine's ranks follow those of the engine before.

    Raises:
        ValueError: naming the setting.
    """
    config = vllm_config.kv_transfer_config
    parallel = vllm_config.parallel_config
    port = config.kv_port
    if port:
        port += parallel.data_parallel_index * parallel.tensor_parallel_size
    try:
        return settings_from_mapping({"port": port, **config.kv_connector_extra_config}, environ)
    except SettingError as error:
        raise ValueError(f"kv_connector_extra_config: {error}") from error
