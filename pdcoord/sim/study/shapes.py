"""Vendor profiles for other models than the one they were published for, scaled by the models' shapes."""

from dataclasses import dataclass, replace

from pdcoord.sim.profiles import (
    HIDDEN_SIZE,
    KV_BYTES_PER_TOKEN,
    LAYER_COUNT,
    PARAMETER_COUNT,
    Figure,
    Profile,
)

_MEMORY_SHARE = 0.9  # As profiles.py has it: vLLM's --gpu-memory-utilization.
_ACTIVATION_BYTES = 4e9


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its speed.

    Attributes:
        parameter_count: all weights, which memory holds and which a wide batch reads in each step.
        active_parameter_count: weights that one token is multiplied with; fewer in a mixture of experts.
        attention_size: query heads times their size.
    """

    name: str
    parameter_count: float
    active_parameter_count: float
    layer_count: int
    attention_size: int
    kv_heads: int
    head_dim: int
    source: str

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values in bfloat16."""
        return 2 * self.layer_count * self.kv_heads * self.head_dim * 2


GRANITE_8B = ModelShape(
    "ibm-granite/granite-4.1-8b",
    parameter_count=8.4e9,
    active_parameter_count=8.4e9,
    layer_count=40,
    attention_size=4_096,
    kv_heads=8,
    head_dim=128,
    source="Granite 4.1's published architecture: 40 layers, 4,096 wide, 32 heads of 128, 8 KV heads, "
    "MLP of 12,800",
)
SARVAM_30B = ModelShape(
    "sarvamai/sarvam-30b",
    parameter_count=30e9,
    active_parameter_count=2.4e9,
    layer_count=19,
    attention_size=4_096,
    kv_heads=4,
    head_dim=64,
    source="Sarvam-30B's published architecture: 30 B of which 2.4 B active, 19 layers, 4,096 wide, "
    "64 heads, 4 KV heads, 6 of 128 experts a token; that a head is 64 follows from width over heads",
)


def reshaped(profile: Profile, shape: ModelShape) -> Profile:
    """The same accelerator serving another model.

    An estimate throughout. Prefill and a sequence's share of a step scale with the active weights; the
    attention's share with layers and width; a step's base gains the time to read the weights that are
    more, all of them, at the peak bandwidth: a batch of 32 touches four fifths of the experts where each
    token has 6 of 128. That kernels for experts reach a lower share of the peak is not modelled.
    """
    accelerator = profile.accelerator
    active = shape.active_parameter_count / PARAMETER_COUNT
    attention = shape.layer_count * shape.attention_size / (LAYER_COUNT * HIDDEN_SIZE)
    more_bytes = 2 * (shape.parameter_count - PARAMETER_COUNT)
    more_ms = more_bytes / (accelerator.memory_tb_per_s.value * 1e12) * 1e3
    pool_bytes = (
        _MEMORY_SHARE * accelerator.memory_gb.value * 1e9 - 2 * shape.parameter_count - _ACTIVATION_BYTES
    )
    if pool_bytes <= 0:
        raise ValueError(
            f"{accelerator.name} holds {accelerator.memory_gb.value:g} GB, less than {shape.name} needs in "
            "bfloat16; choose another"
        )

    def scaled(figure: Figure, factor: float) -> Figure:
        return Figure(figure.value * factor, f"{figure.source}; times {factor:.3g} for {shape.name}")

    return replace(
        profile,
        name=f"{profile.name}:{shape.name}",
        prefill_ms_per_token=scaled(profile.prefill_ms_per_token, active),
        prefill_ns_per_token_squared=scaled(profile.prefill_ns_per_token_squared, attention),
        step_base_ms=Figure(
            profile.step_base_ms.value + more_ms,
            f"{profile.step_base_ms.source}; {more_ms:+.3g} ms to read the weights of {shape.name}",
        ),
        step_us_per_sequence=scaled(profile.step_us_per_sequence, active),
        step_ns_per_context_token=scaled(
            profile.step_ns_per_context_token, shape.kv_bytes_per_token / KV_BYTES_PER_TOKEN
        ),
        kv_pool_tokens=Figure(
            pool_bytes // shape.kv_bytes_per_token,
            f"90 % of the memory less the weights of {shape.name} and 4 GB",
        ),
        kv_bytes_per_token=shape.kv_bytes_per_token,
    )
