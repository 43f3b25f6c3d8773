"""Set-ups that are refused, with what to change, and shapes read off vLLM's specs."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from transfer.engines.vllm.support import check_supported, group_shapes, has_windows, settings_of
from transfer.layout import GroupShape


@dataclass
class FullAttentionSpec:
    """Like vLLM's in what is read of it."""

    num_kv_heads: int = 4
    head_size: int = 32
    head_size_v: int = 32
    tokens_per_state: int = 1
    max_tp_shards: int | None = None
    kv_quant_mode: Any = field(default_factory=lambda: SimpleNamespace(name="NONE"))


class MLAAttentionSpec(FullAttentionSpec):
    model_version: str | None = None


@dataclass
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int = 1024


@dataclass
class ChunkedLocalAttentionSpec(FullAttentionSpec):
    attention_chunk_size: int = 8192


class MambaSpec(FullAttentionSpec):
    pass


def group(spec: Any, layer_count: int = 2) -> Any:
    names = [f"model.layers.{index}.attn" for index in range(layer_count)]
    return SimpleNamespace(kv_cache_spec=spec, layer_names=names)


def cache(*specs: Any) -> Any:
    return SimpleNamespace(transfer_groups=tuple(group(spec) for spec in specs))


def engine(
    *, policy: str = "recompute", ranks: int = 1, heads: int = 4, port: int = 14579, **parallel: Any
) -> Any:
    sizes = {
        "tensor_parallel_size": ranks,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_index": 0,
    }
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_load_failure_policy=policy, kv_port=port, kv_connector_extra_config={}
        ),
        parallel_config=SimpleNamespace(**sizes | parallel),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: heads),
    )


def test_a_plain_engine_is_supported() -> None:
    check_supported(engine(), cache(FullAttentionSpec()))


@pytest.mark.parametrize(
    ("vllm_config", "kv_cache_config", "named"),
    [
        (engine(policy="fail"), cache(FullAttentionSpec()), '"recompute"'),
        (engine(pipeline_parallel_size=2), cache(FullAttentionSpec()), "pipeline_parallel_size is 2"),
        (engine(decode_context_parallel_size=2), cache(FullAttentionSpec()), "decode_context"),
        (engine(prefill_context_parallel_size=2), cache(FullAttentionSpec()), "prefill_context"),
        (engine(), cache(), "no KV cache"),
        (engine(), cache(FullAttentionSpec(), MambaSpec()), "MambaSpec"),
        (engine(), cache(FullAttentionSpec(tokens_per_state=4)), "FullAttentionSpec"),
        (
            engine(),
            cache(FullAttentionSpec(kv_quant_mode=SimpleNamespace(name="NVFP4"))),
            "nvfp4",
        ),
        (engine(ranks=3), cache(FullAttentionSpec(head_size=0)), "key_dim"),
    ],
)
def test_what_cannot_work_is_refused_by_name(vllm_config: Any, kv_cache_config: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_supported(vllm_config, kv_cache_config)


@pytest.mark.parametrize(
    ("vllm_config", "spec", "shape"),
    [
        (engine(), FullAttentionSpec(), GroupShape(2, 4, 32, 32)),
        (engine(ranks=2), FullAttentionSpec(num_kv_heads=2), GroupShape(2, 4, 32, 32)),
        (engine(ranks=8, heads=4), FullAttentionSpec(num_kv_heads=1), GroupShape(2, 4, 32, 32)),
        # Layers with fewer heads than the model's own count.
        (engine(ranks=2, heads=8), FullAttentionSpec(num_kv_heads=1), GroupShape(2, 2, 32, 32)),
        (engine(ranks=4, heads=9), FullAttentionSpec(1, max_tp_shards=2), GroupShape(2, 2, 32, 32)),
        (engine(ranks=4), MLAAttentionSpec(1, 576, 0), GroupShape(2, 1, 576, 0)),
        (engine(), SlidingWindowSpec(), GroupShape(2, 4, 32, 32, 1024)),
        (engine(), ChunkedLocalAttentionSpec(), GroupShape(2, 4, 32, 32, 8192)),
    ],
)
def test_shapes_are_those_of_the_whole_model(vllm_config: Any, spec: Any, shape: GroupShape) -> None:
    assert group_shapes(vllm_config, cache(spec)) == (shape,)


def test_a_group_with_a_spec_for_each_layer_must_have_one_shape() -> None:
    alike = SimpleNamespace(kv_cache_specs={"a": FullAttentionSpec(), "b": FullAttentionSpec()})
    assert group_shapes(engine(), cache(alike)) == (GroupShape(2, 4, 32, 32),)
    unlike = SimpleNamespace(kv_cache_specs={"a": FullAttentionSpec(), "b": FullAttentionSpec(head_size=64)})
    with pytest.raises(ValueError, match="unlike heads"):
        group_shapes(engine(), cache(unlike))


def test_windows_are_seen() -> None:
    assert not has_windows(cache(FullAttentionSpec()))
    assert has_windows(cache(FullAttentionSpec(), SlidingWindowSpec()))


def test_the_port_is_vllms_and_follows_data_parallel_engines() -> None:
    assert settings_of(engine(port=7000), {}).port == 7000
    assert settings_of(engine(port=7000, ranks=4, data_parallel_index=2), {}).port == 7008
    assert settings_of(engine(port=0, data_parallel_index=2), {}).port == 0


def test_a_wrong_setting_is_a_value_error_that_names_it() -> None:
    config = engine()
    config.kv_transfer_config.kv_connector_extra_config = {"lease": 3}
    with pytest.raises(ValueError, match="lease"):
        settings_of(config, {})
