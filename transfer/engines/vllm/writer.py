"""The engine's own way to write KV into a block, for learning where its elements end up."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.errors import LayoutError

FIRST_BLOCK = 1
"""Block 0 is vLLM's null block; this one is written in learning, before the engine uses it, and zeroed."""


class EngineWriter:
    """Writes keys and values of a block through a layer's backend, and reads the block as it lies in memory.

    Source: vLLM 0.32 `unified_kv_cache_update` and `MLAAttention.do_kv_cache_update`, which call the
    backend's `do_kv_cache_update` in the same way for every request.

    Args:
        module: vLLM's attention layer.
        tensor: its KV cache, [block, head, token, content].
        key_dim: elements of a key; for MLA of the whole latent.

    Raises:
        LayoutError: if the layer has no such backend.
    """

    def __init__(self, module: Any, tensor: Any, key_dim: int) -> None:
        self._torch = importlib.import_module("torch")
        self._module = module
        self._tensor = tensor
        self._key_dim = key_dim
        self._block_tokens: int = tensor.shape[2]
        if not hasattr(getattr(module, "impl", None), "do_kv_cache_update"):
            raise LayoutError(
                "kv_cache", type(module).__name__, "a layer whose backend writes the KV cache by itself"
            )

    def __call__(self, keys: NDArray[np.float32], values: NDArray[np.float32] | None) -> list[bytes]:
        """See `transfer.repack.learned.Writer`."""
        self.clear()
        self._write(keys, values)
        return [self._read()]

    def _write(self, keys: NDArray[np.float32], values: NDArray[np.float32] | None) -> None:
        torch, module = self._torch, self._module
        first = FIRST_BLOCK * self._block_tokens
        slots = torch.arange(first, first + self._block_tokens, dtype=torch.int64, device=self._tensor.device)
        key_scale, value_scale = scales_of(module)
        key = self._given(keys, key_scale)
        if values is not None:
            module.impl.do_kv_cache_update(module, key, self._given(values, value_scale), self._tensor, slots)
            return
        rope = int(module.qk_rope_head_dim)
        module.impl.do_kv_cache_update(
            key[:, 0, : self._key_dim - rope].contiguous(),
            key[:, :, self._key_dim - rope :].contiguous(),
            self._tensor,
            slots,
            module.kv_cache_dtype,
            module._k_scale,  # noqa: SLF001  # as vLLM's own layer passes it
        )

    def _given(self, numbers: NDArray[np.float32], scale: float) -> Any:
        """As the model would give them: in its own number format, before scaling."""
        torch = self._torch
        kind = getattr(self._module, "dtype", None) or self._tensor.dtype
        if not kind.is_floating_point:
            kind = torch.get_default_dtype()
        return torch.from_numpy(numbers * np.float32(scale)).to(device=self._tensor.device, dtype=kind)

    def _read(self) -> bytes:
        """From the block's first element to its last, whatever lies between."""
        tensor = self._tensor
        sizes = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in sizes)
        offset = tensor.storage_offset() + FIRST_BLOCK * tensor.stride()[0]
        flat = tensor.as_strided((extent,), (1,), offset).cpu().contiguous()
        raw: bytes = flat.view(self._torch.uint8).numpy().tobytes()
        return raw

    def clear(self) -> None:
        """Leave the block as it was: zeros."""
        self._tensor[FIRST_BLOCK].zero_()


def scales_of(module: Any) -> tuple[float, float]:
    """Factors of a layer's stored keys and values; 1.0 where nothing is scaled.

    Raises:
        LayoutError: if heads have scales of their own.
    """
    found = []
    for name in ("_k_scale", "_v_scale"):
        scale = getattr(module, name, None)
        if scale is not None and scale.numel() != 1:
            raise LayoutError(
                name, scale.numel(), "one scale for a layer: those of single heads do not travel"
            )
        found.append(1.0 if scale is None else float(scale))
    return found[0], found[1]
