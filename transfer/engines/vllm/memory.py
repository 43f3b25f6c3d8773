"""vLLM's KV tensors as the agent's memory, with a layout that the engine's own writing has confirmed.

torch and vLLM's objects are taken as they come; nothing is imported from vLLM.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transfer.engines.vllm.support import group_shapes
from transfer.engines.vllm.worker_side import TableShape
from transfer.engines.vllm.writer import EngineWriter, scales_of
from transfer.errors import LayoutError
from transfer.layout import GroupShape, KvDtype, KvLayout, LayerScales, Order, RankLayout, heads_of_rank
from transfer.repack.learned import Finding, layout_of, learn
from transfer.repack.tilings import Strides
from transfer.repack.torch_memory import TorchGroup

ORDERS = {"LBHNC": Order.HND, "LBNHC": Order.NHD} | {
    order.value: order for order in (Order.LHBNC, Order.BLHNC, Order.BLNHC, Order.BHLNC)
}
"""By the name of vLLM's KVCacheLayout."""

DTYPES = {
    "torch.bfloat16": KvDtype.BFLOAT16,
    "torch.float16": KvDtype.FLOAT16,
    "torch.float32": KvDtype.FLOAT32,
}
PADDINGS = (1, 8, 16, 32, 64, 128, 256)
"""What backends pad a head's elements to; 1 for those that do not."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention layer: vLLM's module, and its KV cache as the kernels see it.

    Attributes:
        tensor: [block, head, token, content], in whatever order of memory.
    """

    name: str
    module: Any
    tensor: Any


def layers_of(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any]
) -> tuple[tuple[Layer, ...], ...]:
    """For each transferred group its layers, in the model's order, which both sides must agree on.

    Raises:
        LayoutError: if a layer's cache is not one tensor of four axes.
    """
    modules = vllm_config.compilation_config.static_forward_context
    found = []
    for group in kv_cache_config.transfer_groups:
        layers = []
        for name in sorted(group.layer_names, key=_place):
            tensor = modules[name].kv_cache if name in modules else kv_caches[name]
            if len(getattr(tensor, "shape", ())) != 4:
                raise LayoutError("kv_cache", name, "one tensor [block, head, token, content] for each layer")
            layers.append(Layer(name, modules.get(name), tensor))
        found.append(tuple(layers))
    return tuple(found)


def _place(name: str) -> tuple[tuple[int, ...], str]:
    return tuple(int(number) for number in re.findall(r"\d+", name)), name


def table_shape(kv_cache_config: Any, groups: Sequence[Sequence[Layer]]) -> TableShape:
    """How the scheduler's blocks are made of the kernels' blocks.

    Raises:
        LayoutError: if a scheduler's block is not a whole number of kernels' blocks.
    """
    counts = []
    for group, layers in zip(kv_cache_config.transfer_groups, groups, strict=True):
        block_tokens = group.kv_cache_spec.block_size
        kernel_tokens = layers[0].tensor.shape[2]
        if block_tokens % kernel_tokens:
            raise LayoutError("block_size", block_tokens, f"a multiple of the kernels' {kernel_tokens}")
        counts.append(block_tokens // kernel_tokens)
    return TableShape(tuple(kv_cache_config.transfer_group_ids), tuple(counts))


@dataclass(frozen=True, slots=True)
class Memory:
    """What a repacker and an agent need to know of a worker's KV caches.

    Attributes:
        groups: for each transferred group its tensors and where a block's elements stand in them.
        tables: how the scheduler's block ids become those of the tensors.
    """

    layout: RankLayout
    groups: tuple[TorchGroup, ...]
    tables: TableShape
    device: str


def learn_memory(vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any], rank: int) -> Memory:
    """Describe a worker's KV caches, after writing a block of each group through the engine's own operation.

    Raises:
        LayoutError: if the caches cannot be described, or keys and values are not where the description says.
    """
    shapes = group_shapes(vllm_config, kv_cache_config)
    groups = layers_of(vllm_config, kv_cache_config, kv_caches)
    order = ORDERS[vllm_config.cache_config.get_resolved_kv_cache_layout().name]
    ranks = vllm_config.parallel_config.tensor_parallel_size
    bases = {_declared(layers, shape, order, ranks) for layers, shape in zip(groups, shapes, strict=True)}
    if len(bases) > 1:
        raise LayoutError("layout", sorted(map(str, bases)), "one layout for all KV cache groups of a rank")
    base = bases.pop()
    findings = [
        _learned(layers[0], shape, base, heads_of_rank(shape.kv_heads, ranks, rank).count)
        for layers, shape in zip(groups, shapes, strict=True)
    ]
    layout = layout_of(base, findings)
    scales = tuple(tuple(_scales(layer) for layer in layers) for layers in groups)
    return Memory(
        layout=RankLayout(
            layout=layout,
            rank=rank,
            groups=shapes,
            scales=scales if layout.dtype.is_fp8 else (),
            model=str(vllm_config.model_config.model),
        ),
        groups=tuple(
            TorchGroup(finding.arrangement, tuple((layer.tensor,) for layer in layers))
            for finding, layers in zip(findings, groups, strict=True)
        ),
        tables=table_shape(kv_cache_config, groups),
        device=str(groups[0][0].tensor.device),
    )


def _declared(layers: Sequence[Layer], shape: GroupShape, order: Order, ranks: int) -> KvLayout:
    """What vLLM tells of a group's layout; where keys and values stand in a block it does not tell."""
    first = layers[0]
    for other in layers[1:]:
        same = (other.tensor.shape, other.tensor.stride(), other.tensor.dtype)
        if same != (first.tensor.shape, first.tensor.stride(), first.tensor.dtype):
            raise LayoutError("kv_cache", other.name, f"a tensor of the same shape as {first.name}'s")
    return KvLayout(
        block_tokens=first.tensor.shape[2],
        order=order,
        dtype=_dtype(first),
        tensor_parallel=ranks,
        head_dim_multiple=_multiple(shape, first.tensor.shape[3]),
    )


def _learned(layer: Layer, shape: GroupShape, base: KvLayout, heads: int) -> Finding:
    writer = EngineWriter(layer.module, layer.tensor, shape.key_dim)
    try:
        return learn(base, shape, heads, (Strides(*layer.tensor.stride()),), writer)
    finally:
        writer.clear()


def _multiple(shape: GroupShape, content: int) -> int:
    """What a head's elements are padded to, so that a token's key and value fill the tensor's last axis."""
    for multiple in PADDINGS:
        room = sum(-(-dim // multiple) * multiple for dim in (shape.key_dim, shape.value_dim))
        if room == content:
            return multiple
    raise LayoutError("kv_cache", content, f"room for {shape.row_elements} elements of a token and head")


def _dtype(layer: Layer) -> KvDtype:
    """The number format, which a tensor of bytes does not tell."""
    found = DTYPES.get(str(layer.tensor.dtype))
    if found is not None:
        return found
    name = str(layer.module.kv_cache_dtype)
    if layer.tensor.element_size() != 1 or not name.startswith("fp8") or "inc" in name:
        raise LayoutError("kv_cache_dtype", name, "bfloat16, float16, float32, fp8_e4m3 or fp8_e5m2")
    if name == "fp8_e5m2":
        return KvDtype.FP8_E5M2
    platforms = importlib.import_module("vllm.platforms")
    return KvDtype.FP8_E4M3FNUZ if platforms.current_platform.is_fp8_fnuz() else KvDtype.FP8_E4M3FN


def _scales(layer: Layer) -> LayerScales:
    return LayerScales(*scales_of(layer.module))
