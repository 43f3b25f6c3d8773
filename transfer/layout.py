"""How a rank stores its KV cache, as far as pairing engines needs to know it."""

from dataclasses import dataclass, fields
from enum import StrEnum

from transfer.errors import LayoutError


class Order(StrEnum):
    """Order of heads (H), tokens in a block (N) and head dimension (D) inside a block.

    Source: vLLM 0.32 `KVCacheLayout`, where LBHNC is called HND and LBNHC is called NHD.
    """

    HND = "HND"
    NHD = "NHD"


class KvDtype(StrEnum):
    """Element type of a stored key or value.

    The two e4m3 flavours are different number formats: e4m3fnuz (AMD gfx94x) reads the bytes of
    e4m3fn at half their value.
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FP8_E4M3FN = "fp8_e4m3fn"
    FP8_E4M3FNUZ = "fp8_e4m3fnuz"
    FP8_E5M2 = "fp8_e5m2"


PLAIN_TILING = "plain"


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Memory layout of one rank's paged KV cache.

    Attributes:
        block_tokens: tokens in one block, at least 1.
        order: order of the axes inside a block.
        dtype: element type.
        tensor_parallel: ranks over which the KV heads of a layer are split, at least 1.
        tiling: id of a vendor-private arrangement inside a page; PLAIN_TILING where there is none.

    Raises:
        LayoutError: if a size is not positive or the tiling id is empty.
    """

    block_tokens: int
    order: Order = Order.NHD
    dtype: KvDtype = KvDtype.BFLOAT16
    tensor_parallel: int = 1
    tiling: str = PLAIN_TILING

    def __post_init__(self) -> None:
        for name in ("block_tokens", "tensor_parallel"):
            size = getattr(self, name)
            if size < 1:
                raise LayoutError(name, size, "a positive whole number")
        if not self.tiling:
            raise LayoutError("tiling", self.tiling, 'a tiling id such as "plain"')

    def differences(self, other: "KvLayout") -> list[str]:
        """Names of the fields in which the two layouts differ, in declaration order."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
