"""Vendor profiles of emulated engines: every figure with where it comes from."""

from dataclasses import dataclass, fields, replace
from typing import Any

from pdcoord.core.costs import SpeedFigures
from transfer.layout import KvLayout, Order
from transfer.presets import PRESETS

# Llama-3.1-8B in bfloat16: 32 layers, 4,096 wide, 8 KV heads of 128 (its published config.json).
PARAMETER_COUNT = 8.0e9
LAYER_COUNT = 32
HIDDEN_SIZE = 4_096
KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2
_WEIGHT_BYTES = 2 * PARAMETER_COUNT
_FLOPS_PER_TOKEN = 2 * PARAMETER_COUNT
# Causal attention: QK and AV are each 2 * n * n / 2 * hidden FLOPs a layer.
_ATTENTION_FLOPS_PER_TOKEN_SQUARED = 2 * HIDDEN_SIZE * LAYER_COUNT
# Kernels rarely pass half of a data sheet's dense peak; used where no published figure is at hand.
_SHARE_OF_PEAK = 0.5
_ACTIVATION_BYTES = 4e9
_MEMORY_SHARE = 0.9  # vLLM's --gpu-memory-utilization

_LATENCY_TABLE = (
    "llm-d-inference-sim, docs/latency-profiles.md, 8B, FP16, batch 1; the middle of the published range "
    "{low}-{high}, there marked approximate"
)
_SCALED_PREFILL = (
    "estimate, not measured: the H100's published prefill time times the ratio of dense BF16 peaks "
    "({h100:g} / {own:g} TFLOPS)"
)
_SCALED_STEP = (
    "estimate, not measured: the H100's published inter-token latency times the ratio of memory "
    "bandwidths ({h100:g} / {own:g} TB/s)"
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a data sheet says; the strengths that decide which phase a vendor is good at.

    Attributes:
        bf16_tflops: dense peak; bounds prefill.
        memory_gb: decimal gigabytes.
        memory_tb_per_s: peak bandwidth; bounds decode.
    """

    name: str
    bf16_tflops: Figure
    memory_gb: Figure
    memory_tb_per_s: Figure


@dataclass(frozen=True, slots=True)
class Profile:
    """An accelerator serving an 8B model in bfloat16 with vLLM, one device, no tensor parallelism.

    Attributes:
        strength: why this vendor suits the role it suits.
        prefill_base_ms to step_ns_per_context_token: as `speed` in a policy.
        kv_pool_tokens: tokens that fit beside the weights.
        layout_source: of block size and order.
    """

    name: str
    vendor: str
    accelerator: Accelerator
    strength: str
    prefill_base_ms: Figure
    prefill_ms_per_token: Figure
    prefill_ns_per_token_squared: Figure
    step_base_ms: Figure
    step_us_per_sequence: Figure
    step_ns_per_context_token: Figure
    kv_pool_tokens: Figure
    link_gbit_per_s: Figure
    layout: KvLayout
    layout_source: str
    kv_bytes_per_token: int = KV_BYTES_PER_TOKEN

    @property
    def speed(self) -> SpeedFigures:
        """The figures in seconds."""
        return SpeedFigures(
            prefill_base_s=self.prefill_base_ms.value / 1e3,
            prefill_s_per_token=self.prefill_ms_per_token.value / 1e3,
            prefill_s_per_token_squared=self.prefill_ns_per_token_squared.value / 1e9,
            step_base_s=self.step_base_ms.value / 1e3,
            step_s_per_sequence=self.step_us_per_sequence.value / 1e6,
            step_s_per_context_token=self.step_ns_per_context_token.value / 1e9,
        )

    @property
    def block_total(self) -> int:
        """Blocks of the KV pool."""
        return int(self.kv_pool_tokens.value) // self.layout.block_tokens

    def figures(self) -> dict[str, Figure]:
        """Every sourced number by name, the accelerator's too."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        mine |= {f.name: getattr(self.accelerator, f.name) for f in fields(self.accelerator)}
        return {name: value for name, value in mine.items() if isinstance(value, Figure)}


def policy_speed(profile: Profile) -> dict[str, float]:
    """The `speed:` block that a policy would give a pool of these engines."""
    return {
        name: float(f"{getattr(profile, name).value:.4g}")
        for name in (
            "prefill_base_ms",
            "prefill_ms_per_token",
            "prefill_ns_per_token_squared",
            "step_base_ms",
            "step_us_per_sequence",
            "step_ns_per_context_token",
        )
    }


def policy_layout(layout: KvLayout) -> dict[str, Any]:
    """The `layout:` block that a policy would give a pool of these engines."""
    return {
        "block_tokens": layout.block_tokens,
        "order": layout.order.value,
        "dtype": layout.dtype.value,
        "tensor_parallel": layout.tensor_parallel,
        "tiling": layout.tiling,
        "split": layout.split.value,
        "head_dim_multiple": layout.head_dim_multiple,
    }


_H100 = Accelerator(
    "NVIDIA H100 SXM 80 GB",
    Figure(989.4, "NVIDIA H100 Tensor Core GPU data sheet, BF16 without sparsity"),
    Figure(80.0, "NVIDIA H100 Tensor Core GPU data sheet"),
    Figure(3.35, "NVIDIA H100 Tensor Core GPU data sheet"),
)
_A100 = Accelerator(
    "NVIDIA A100 SXM 80 GB",
    Figure(312.0, "NVIDIA A100 Tensor Core GPU data sheet, BF16 without sparsity"),
    Figure(80.0, "NVIDIA A100 Tensor Core GPU data sheet"),
    Figure(2.039, "NVIDIA A100 Tensor Core GPU data sheet"),
)
_L40S = Accelerator(
    "NVIDIA L40S 48 GB",
    Figure(362.05, "NVIDIA L40S data sheet, BF16 without sparsity"),
    Figure(48.0, "NVIDIA L40S data sheet"),
    Figure(0.864, "NVIDIA L40S data sheet"),
)
_MI300X = Accelerator(
    "AMD Instinct MI300X 192 GB",
    Figure(1307.4, "AMD Instinct MI300X data sheet, BF16 without sparsity"),
    Figure(192.0, "AMD Instinct MI300X data sheet"),
    Figure(5.3, "AMD Instinct MI300X data sheet"),
)
_GAUDI3 = Accelerator(
    "Intel Gaudi 3 128 GB",
    Figure(1835.0, "Intel at Hot Chips 2024, BF16 matrix peak"),
    Figure(128.0, "Intel at Hot Chips 2024"),
    Figure(3.67, "Intel at Hot Chips 2024"),
)
_GAUDI2 = Accelerator(
    "Intel Gaudi 2 96 GB",
    Figure(432.0, "Intel at Hot Chips 2024, BF16 matrix peak"),
    Figure(96.0, "Intel at Hot Chips 2024"),
    Figure(2.46, "Intel at Hot Chips 2024"),
)

_BASE = Figure(5.0, "estimate, not measured: scheduling, launch and sampling of one step")
_LINK = Figure(
    100.0,
    "the 100 G RoCE of llm-d's published three-vendor run; the card is the server's, not the "
    "accelerator's, so set link_gbit_per_s for each engine",
)


def _published(low: float, high: float) -> Figure:
    return Figure((low + high) / 2, _LATENCY_TABLE.format(low=low, high=high))


_H100_PREFILL = _published(0.15, 0.30)
_H100_STEP = _published(10.0, 15.0)


def _scaled(accelerator: Accelerator) -> tuple[Figure, Figure]:
    """Prefill and step of an accelerator without published figures, from the H100's."""
    compute, bandwidth = accelerator.bf16_tflops.value, accelerator.memory_tb_per_s.value
    h100_compute, h100_bandwidth = _H100.bf16_tflops.value, _H100.memory_tb_per_s.value
    return (
        Figure(
            _H100_PREFILL.value * h100_compute / compute,
            _SCALED_PREFILL.format(h100=h100_compute, own=compute),
        ),
        Figure(
            _H100_STEP.value * h100_bandwidth / bandwidth,
            _SCALED_STEP.format(h100=h100_bandwidth, own=bandwidth),
        ),
    )


def _derived(accelerator: Accelerator) -> dict[str, Figure]:
    """What follows from the data sheet alone."""
    flops_per_s = accelerator.bf16_tflops.value * 1e12 * _SHARE_OF_PEAK
    pool_bytes = _MEMORY_SHARE * accelerator.memory_gb.value * 1e9 - _WEIGHT_BYTES - _ACTIVATION_BYTES
    return {
        "prefill_ns_per_token_squared": Figure(
            _ATTENTION_FLOPS_PER_TOKEN_SQUARED / flops_per_s * 1e9,
            "estimate, not measured: causal attention's FLOPs at half of the BF16 peak",
        ),
        "step_us_per_sequence": Figure(
            _FLOPS_PER_TOKEN / flops_per_s * 1e6,
            "estimate, not measured: one token's FLOPs at half of the BF16 peak",
        ),
        "step_ns_per_context_token": Figure(
            KV_BYTES_PER_TOKEN / (accelerator.memory_tb_per_s.value * 1e12) * 1e9,
            "estimate, not measured: one token's KV read at the peak memory bandwidth",
        ),
        "kv_pool_tokens": Figure(
            pool_bytes // KV_BYTES_PER_TOKEN,
            "90 % of the memory less 16 GB of weights and 4 GB of activations",
        ),
    }


def _profile(
    name: str,
    vendor: str,
    accelerator: Accelerator,
    timed: tuple[Figure, Figure],
    described: tuple[KvLayout, str, str],
) -> Profile:
    prefill, step = timed
    layout, layout_source, strength = described
    derived = _derived(accelerator)
    return Profile(
        name=name,
        vendor=vendor,
        accelerator=accelerator,
        strength=strength,
        prefill_base_ms=_BASE,
        prefill_ms_per_token=prefill,
        step_base_ms=step,
        link_gbit_per_s=_LINK,
        layout=layout,
        layout_source=layout_source,
        prefill_ns_per_token_squared=derived["prefill_ns_per_token_squared"],
        step_us_per_sequence=derived["step_us_per_sequence"],
        step_ns_per_context_token=derived["step_ns_per_context_token"],
        kv_pool_tokens=derived["kv_pool_tokens"],
    )


_CUDA = (
    replace(PRESETS["nvidia-flash-attn"].layout, order=Order.HND),
    "vLLM 0.32: default block of 16; HND is what NixlConnector asks for",
)
_ROCM = (
    PRESETS["amd-aiter-unified"].layout,
    "vLLM 0.32: ROCM_AITER_UNIFIED_ATTN prefers blocks of 64, HND only with a KV connector",
)
_HPU = (PRESETS["intel-gaudi"].layout, "vllm-gaudi: default block of 128, tokens before heads, K and V apart")

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        _profile(
            "nvidia-h100-8b",
            "nvidia",
            _H100,
            (_H100_PREFILL, _H100_STEP),
            (*_CUDA, "balanced: least inter-token latency at batch 1 of the published figures"),
        ),
        _profile(
            "nvidia-a100-8b",
            "nvidia",
            _A100,
            (_published(0.30, 0.55), _published(15.0, 25.0)),
            (*_CUDA, "older: half of the H100's prefill, 60 % of its bandwidth"),
        ),
        _profile(
            "nvidia-l40s-8b",
            "nvidia",
            _L40S,
            (_published(0.65, 1.0), _published(25.0, 35.0)),
            (*_CUDA, "compute strong for its bandwidth: 16 % more BF16 than an A100, 42 % of its bandwidth"),
        ),
        _profile(
            "amd-mi300x-8b",
            "amd",
            _MI300X,
            (_published(0.11, 0.23), _published(12.0, 18.0)),
            (*_ROCM, "bandwidth and memory strong: 58 % more bandwidth than an H100, 3 times its KV pool"),
        ),
        _profile(
            "intel-gaudi3-8b",
            "intel-gaudi",
            _GAUDI3,
            _scaled(_GAUDI3),
            (*_HPU, "compute strong: 85 % more BF16 than an H100 at 10 % more bandwidth"),
        ),
        _profile(
            "intel-gaudi2-8b",
            "intel-gaudi",
            _GAUDI2,
            _scaled(_GAUDI2),
            (*_HPU, "bandwidth strong for its compute: 44 % of an H100's BF16, 73 % of its bandwidth"),
        ),
    )
}
"""Profiles by the name that a fleet file gives."""
