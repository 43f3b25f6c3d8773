"""Conversion between the element types of KV in torch, on any device, with torch's own fp8 types or not."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from transfer.layout import KvDtype
from transfer.repack import numbers

_WIDE = {
    KvDtype.BFLOAT16: torch.bfloat16,
    KvDtype.FLOAT16: torch.float16,
    KvDtype.FLOAT32: torch.float32,
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}
_NATIVE_FP8 = {
    KvDtype.FP8_E4M3FN: "float8_e4m3fn",
    KvDtype.FP8_E4M3FNUZ: "float8_e4m3fnuz",
    KvDtype.FP8_E5M2: "float8_e5m2",
}
_NATIVE_FP8_DEVICES = frozenset({"cpu", "cuda"})
"""Devices whose torch rounds to its fp8 types; elsewhere tables do."""


class Converter:
    """Converts as `numbers.convert` does, to the bit but for the payload of a NaN. Threads may share it.

    Args:
        device: where the numbers are.
        use_tables: for fp8 even where torch has the types.
    """

    def __init__(self, device: Any, *, use_tables: bool = False) -> None:
        self._device = torch.device(device)
        self._use_tables = use_tables or self._device.type not in _NATIVE_FP8_DEVICES

    def __call__(
        self,
        stored: Any,
        source: KvDtype,
        target: KvDtype,
        source_scale: float = 1.0,
        target_scale: float = 1.0,
    ) -> Any:
        """Convert stored numbers.

        Args:
            stored: contiguous bits of `source`, as whole numbers of its size.
            source_scale: by which they are multiplied to give what is meant.
            target_scale: by which the result will be.

        Returns bits of `target`, as whole numbers of its size; not a copy if there is nothing to convert.
        """
        if source is target and source_scale == target_scale:
            return stored
        if source.is_fp8:
            codes = _recoded(source, target, source_scale, target_scale).to(self._device)
            return codes.index_select(0, stored.reshape(-1).to(torch.int32)).reshape(stored.shape)
        numbers_in = stored.view(_WIDE[source])
        if source_scale == target_scale and target in _WIDE:
            return numbers_in.to(_WIDE[target]).view(_INTEGERS[target.item_bytes])
        values = numbers_in.to(torch.float32)
        if source_scale != target_scale:
            if source_scale != 1.0:
                values = values * self._scale(source_scale)
            if target_scale != 1.0:
                values = values / self._scale(target_scale)
        return self._encoded(values, target)

    def _scale(self, scale: float) -> Any:
        # On the device: torch divides by a host number through its inverse, which rounds twice.
        return torch.full((), float(np.float32(scale)), dtype=torch.float32, device=self._device)

    def _encoded(self, values: Any, dtype: KvDtype) -> Any:
        if dtype in _WIDE:
            return values.to(_WIDE[dtype]).view(_INTEGERS[dtype.item_bytes])
        native = None if self._use_tables else getattr(torch, _NATIVE_FP8[dtype], None)
        if native is not None:
            largest = numbers.largest(dtype)
            return values.clamp(-largest, largest).to(native).view(torch.uint8)
        words = values.view(torch.int32)
        places = ((words >> 16) & 0xFFFF) | ((words & 0xFFFF) != 0).to(torch.int32)
        return _codes(dtype).to(self._device).index_select(0, places.reshape(-1)).reshape(values.shape)


@lru_cache(maxsize=1024)
def _recoded(source: KvDtype, target: KvDtype, source_scale: float, target_scale: float) -> Any:
    """What becomes of each code of an fp8 type."""
    codes = np.arange(256, dtype=np.uint8)
    found = numbers.convert(codes, source, target, source_scale, target_scale)
    return torch.from_numpy(found.view(_SIGNED[target.item_bytes]).copy())


@lru_cache(maxsize=8)
def _codes(dtype: KvDtype) -> Any:
    return torch.from_numpy(numbers.encode_table(dtype).copy())
