"""How real attention backends store KV, by name, each with its source and with how far it was verified."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from transfer.layout import KvLayout, KvSplit, Order


class Evidence(StrEnum):
    """How it is known that engines store KV so.

    "verified" means that an engine ran on such hardware, its pages were compared with what the layout says,
    and it answered from KV that was put there so.
    """

    READ_FROM_SOURCE = "read from source"
    VERIFIED_ON_CPU = "verified on CPU"
    VERIFIED_ON_GPU = "verified on a GPU"


@dataclass(frozen=True, slots=True)
class Preset:
    """A backend's layout at its own defaults: bfloat16, one rank, the backend's preferred block size.

    Attributes:
        source: file and version that say so.
        note: what differs where, for a person who writes a policy.
    """

    name: str
    layout: KvLayout
    source: str
    evidence: Evidence
    note: str


_VLLM = "vLLM 0.32, vllm/v1/attention/backends"
_CPU_NOTE = "K is stored transposed over the whole page, so the block size changes where everything stands"
_FP8_NOTE = "on gfx94x fp8 is fp8_e4m3fnuz"


def _cpu(name: str, evidence: Evidence, note: str) -> Preset:
    layout = KvLayout(128, Order.HND, split=KvSplit.HALVED, tiling=name)
    return Preset(name, layout, f"{_VLLM}/cpu_attn.py, _get_attn_isa", evidence, note)


def _rocm_tiled(name: str, tiling: str, file: str, note: str) -> Preset:
    layout = KvLayout(16, Order.LHBNC, split=KvSplit.HALVED, tiling=tiling)
    return Preset(name, layout, f"{_VLLM}/{file}", Evidence.READ_FROM_SOURCE, note)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                "nvidia-flash-attn",
                KvLayout(16, Order.NHD),
                f"{_VLLM}/flash_attn.py and utils.py, _DEFAULT_LAYOUT_PREFERENCE",
                Evidence.READ_FROM_SOURCE,
                "any multiple of 16; order HND where VLLM_KV_CACHE_LAYOUT or the connector asks for it, "
                "as NixlConnector does",
            ),
            Preset(
                "nvidia-flashinfer",
                KvLayout(16, Order.HND),
                f"{_VLLM}/flashinfer.py, supported_kv_cache_layouts",
                Evidence.READ_FROM_SOURCE,
                "HND always on Blackwell, elsewhere as for nvidia-flash-attn; blocks of 16, 32 or 64, larger "
                "on Blackwell",
            ),
            Preset(
                "amd-aiter",
                KvLayout(16, Order.HND),
                f"{_VLLM}/rocm_aiter_fa.py, supported_kv_cache_layouts",
                Evidence.READ_FROM_SOURCE,
                f"ROCM_AITER_FA without shuffled pages; blocks of 16 or 32; {_FP8_NOTE}",
            ),
            Preset(
                "amd-aiter-unified",
                KvLayout(64, Order.HND),
                f"{_VLLM}/rocm_aiter_unified_attn.py, get_preferred_block_size",
                Evidence.READ_FROM_SOURCE,
                f"ROCM_AITER_UNIFIED_ATTN; any multiple of 16, HND only with a KV connector; {_FP8_NOTE}",
            ),
            _rocm_tiled(
                "amd-aiter-shuffle",
                "rocm-aiter-shuffle",
                "rocm_aiter_fa.py, reshape_and_cache_shuffle_kernel",
                f"ROCM_AITER_FA with shuffled pages; K and V are two slots of a block; {_FP8_NOTE}",
            ),
            _rocm_tiled(
                "amd-rocm-attn",
                "rocm-attn",
                "rocm_attn.py, and ops/paged_attn.py, split_kv_cache",
                "ROCM_ATTN, which vLLM 0.32 does not run with a KV connector; K and V are two slots of a "
                f"block; {_FP8_NOTE}",
            ),
            Preset(
                "intel-gaudi",
                KvLayout(128, Order.NHD, split=KvSplit.SEPARATE),
                "vllm-gaudi, vllm_gaudi/attention/ops/hpu_paged_attn.py, get_kv_cache_shape "
                "(for vLLM commit 61c9ef98)",
                Evidence.READ_FROM_SOURCE,
                "K and V are two tensors of a layer; blocks of 16, 128, 528 or 768",
            ),
            Preset(
                "intel-xpu",
                KvLayout(64, Order.NHD),
                f"{_VLLM}/flash_attn.py, get_supported_kernel_block_sizes",
                Evidence.READ_FROM_SOURCE,
                "any multiple of 64; order as for nvidia-flash-attn",
            ),
            _cpu(
                "cpu-vec",
                Evidence.VERIFIED_ON_CPU,
                f"x86 without AMX, or another type than bfloat16; blocks of a multiple of 32; {_CPU_NOTE}",
            ),
            _cpu(
                "cpu-vec16",
                Evidence.READ_FROM_SOURCE,
                "head sizes of a multiple of 16 but not 32; its writer was seen to store so on a CPU, no "
                f"engine was run with it; {_CPU_NOTE}",
            ),
            _cpu(
                "cpu-amx",
                Evidence.READ_FROM_SOURCE,
                "bfloat16 on x86 with AMX; blocks of a multiple of 32; its writer was seen to store so on a "
                "CPU without AMX, attention was not run",
            ),
        )
    }
)
"""Presets by the name that a policy and `pdcoord paths --layouts` give."""
