"""The pages of vLLM's CPU backend, written by its own operation, are recognised; needs vLLM installed."""

import importlib.util
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from transfer.layout import KvDtype, KvLayout, KvSplit, Order

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: run it in its environment",
    ),
    # vLLM and torch warn of each other.
    pytest.mark.filterwarnings("ignore"),
]
HEADS = 2
BLOCKS = 4


def vllm_config(tensor: Any, module: Any) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layers.0.attn": module}),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: SimpleNamespace(name="LBHNC")),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS, model="tiny"),
    )


def kv_cache_config(block_tokens: int, dim: int) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(
        block_size=block_tokens, num_kv_heads=HEADS, head_size=dim, dtype=torch.bfloat16, max_tp_shards=None
    )
    group = SimpleNamespace(layer_names=["layers.0.attn"], kv_cache_spec=spec)
    return SimpleNamespace(transfer_groups=(group,), transfer_group_ids=(0,))


def attention(isa: str, tensor: Any) -> Any:
    """An attention layer in what its backend's writing needs of it."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    own = SimpleNamespace(attn_type="decoder", kv_cache_dtype="auto")
    impl = SimpleNamespace(do_kv_cache_update=partial(CPUAttentionBackendImpl.do_kv_cache_update, own))
    return SimpleNamespace(
        impl=impl, isa=isa, kv_cache=tensor, kv_cache_dtype="auto", _k_scale_float=1.0, _v_scale_float=1.0
    )


@pytest.mark.parametrize("block_tokens", [32, 64, 128])
@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize(
    ("isa", "dtype", "tiling"),
    [
        ("vec", KvDtype.BFLOAT16, "cpu-vec"),
        ("vec", KvDtype.FLOAT16, "cpu-vec"),
        ("vec", KvDtype.FLOAT32, "cpu-vec"),
        ("amx", KvDtype.BFLOAT16, "cpu-amx"),
    ],
)
def test_a_page_is_recognised_and_left_clean(
    isa: str, dtype: KvDtype, tiling: str, dim: int, block_tokens: int
) -> None:
    import torch

    from transfer.engines.vllm.memory import learn_memory

    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has no AMX")
    kind = getattr(torch, str(dtype))
    tensor = torch.zeros((BLOCKS, HEADS, block_tokens, 2 * dim), dtype=kind)
    module = attention(isa, tensor)
    found = learn_memory(vllm_config(tensor, module), kv_cache_config(block_tokens, dim), {}, 0)
    assert found.layout.layout == KvLayout(
        block_tokens, Order.HND, dtype, tiling=tiling, split=KvSplit.HALVED
    )
    assert found.layout.groups[0].key_dim == found.layout.groups[0].value_dim == dim
    assert found.tables.tables(((5, 0),)) == ((5, 0),)
    assert not tensor.any()


def test_kernel_blocks_smaller_than_the_schedulers_are_counted() -> None:
    import torch

    from transfer.engines.vllm.memory import learn_memory

    tensor = torch.zeros((BLOCKS, HEADS, 32, 64))
    found = learn_memory(vllm_config(tensor, attention("vec", tensor)), kv_cache_config(128, 32), {}, 0)
    assert found.layout.layout.block_tokens == 32
    assert found.tables.tables(((2, 0),)) == ((8, 9, 10, 11, 0, 0, 0, 0),)
