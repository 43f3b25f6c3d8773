"""How a rank stores its KV cache, as far as pairing engines and repacking need to know it."""

from dataclasses import dataclass, fields
from enum import StrEnum

from transfer.errors import LayoutError


class Order(StrEnum):
    """Physical order of layers (L), blocks (B), heads (H), tokens in a block (N) and content (C).

    Source: vLLM 0.32 `KVCacheLayout`, where LBHNC is called HND and LBNHC is called NHD.
    """

    HND = "HND"
    NHD = "NHD"
    LHBNC = "LHBNC"
    BLHNC = "BLHNC"
    BLNHC = "BLNHC"
    BHLNC = "BHLNC"


class KvSplit(StrEnum):
    """Where the keys and the values of a block stand.

    packed: each token's key and value side by side, [K | V] (vLLM 0.32). halved: all keys of a block and
    head, then all its values (vLLM's CPU and ROCm pages). separate: two tensors (Gaudi).
    """

    PACKED = "packed"
    HALVED = "halved"
    SEPARATE = "separate"


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

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self]

    @property
    def is_fp8(self) -> bool:
        return self.item_bytes == 1


_ITEM_BYTES = {
    KvDtype.BFLOAT16: 2,
    KvDtype.FLOAT16: 2,
    KvDtype.FLOAT32: 4,
    KvDtype.FP8_E4M3FN: 1,
    KvDtype.FP8_E4M3FNUZ: 1,
    KvDtype.FP8_E5M2: 1,
}

PLAIN_TILING = "plain"
LEARNED_PREFIX = "learned-"
"""Tiling ids with this prefix name a permutation learned at start-up, by its hash."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Memory layout of one rank's paged KV cache, whatever the model.

    Attributes:
        block_tokens: tokens in one block, at least 1.
        order: physical order of the axes.
        dtype: element type.
        tensor_parallel: ranks over which the KV heads of a layer are split, at least 1.
        tiling: id of a vendor-private arrangement inside a page; PLAIN_TILING where there is none.
        split: where keys and values stand; of no meaning for MLA, which has one latent per token.
        head_dim_multiple: a head's elements are padded with zeros to a multiple of this.

    Raises:
        LayoutError: if a size is not positive or the tiling id is empty.
    """

    block_tokens: int
    order: Order = Order.NHD
    dtype: KvDtype = KvDtype.BFLOAT16
    tensor_parallel: int = 1
    tiling: str = PLAIN_TILING
    split: KvSplit = KvSplit.PACKED
    head_dim_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("block_tokens", "tensor_parallel", "head_dim_multiple"):
            size = getattr(self, name)
            if size < 1:
                raise LayoutError(name, size, "a positive whole number")
        if not self.tiling:
            raise LayoutError("tiling", self.tiling, 'a tiling id such as "plain"')

    def differences(self, other: "KvLayout") -> list[str]:
        """Names of the fields in which the two layouts differ, in declaration order."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What the layers of one KV cache group hold per token, whoever stores it.

    Attributes:
        layer_count: layers of the group, in the model's order.
        kv_heads: KV heads of a layer before tensor parallelism; 1 for MLA.
        key_dim: elements of a head's key; for MLA of the whole latent (kv_lora_rank + rope).
        value_dim: elements of a head's value; 0 for MLA.
        window_tokens: sliding window; None for full attention.
    """

    layer_count: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("layer_count", "kv_heads", "key_dim"):
            size = getattr(self, name)
            if size < 1:
                raise LayoutError(name, size, "a positive whole number")
        if self.value_dim < 0:
            raise LayoutError("value_dim", self.value_dim, "0 for MLA, else a positive whole number")
        if self.value_dim == 0 and self.kv_heads != 1:
            raise LayoutError("kv_heads", self.kv_heads, "1 where value_dim is 0 (MLA)")
        if self.window_tokens is not None and self.window_tokens < 1:
            raise LayoutError("window_tokens", self.window_tokens, "None or a positive whole number")

    @property
    def is_mla(self) -> bool:
        return self.value_dim == 0

    @property
    def row_elements(self) -> int:
        """Elements of one token of one head in the canonical form: the key, then the value."""
        return self.key_dim + self.value_dim


@dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads `first .. first + count - 1` of the model.

    Replicated heads (more ranks than heads, MLA) are on several ranks.
    """

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count

    def overlap(self, other: "HeadRange") -> "HeadRange | None":
        first, end = max(self.first, other.first), min(self.end, other.end)
        return HeadRange(first, end - first) if first < end else None


def heads_of_rank(kv_heads: int, tensor_parallel: int, rank: int) -> HeadRange:
    """The heads that a rank holds, as vLLM and SGLang split them.

    Raises:
        LayoutError: if neither number divides the other, or there is no such rank.
    """
    if not 0 <= rank < tensor_parallel:
        raise LayoutError("rank", rank, f"a rank in 0..{tensor_parallel - 1}")
    if kv_heads % tensor_parallel == 0:
        count = kv_heads // tensor_parallel
        return HeadRange(rank * count, count)
    if tensor_parallel % kv_heads == 0:
        return HeadRange(rank * kv_heads // tensor_parallel, 1)
    raise LayoutError(
        "tensor_parallel", tensor_parallel, f"a divisor or a multiple of {kv_heads}, the model's KV heads"
    )


@dataclass(frozen=True, slots=True)
class LayerScales:
    """Factors by which a layer's stored fp8 numbers are multiplied to give the true ones."""

    key: float = 1.0
    value: float = 1.0


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Everything a peer must know of one rank's KV: what travels in a handshake.

    Attributes:
        layout: how the rank stores it.
        rank: its tensor-parallel rank.
        groups: one shape for each KV cache group, in the engine's order.
        scales: for each group one LayerScales a layer; empty where the dtype is not fp8.
        model: the model's name as the engine was started with; informs, is not compared.
    """

    layout: KvLayout
    rank: int
    groups: tuple[GroupShape, ...]
    scales: tuple[tuple[LayerScales, ...], ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        if not self.groups:
            raise LayoutError("groups", self.groups, "at least one KV cache group")
        for group in self.groups:
            heads_of_rank(group.kv_heads, self.layout.tensor_parallel, self.rank)
        if self.scales and [len(s) for s in self.scales] != [g.layer_count for g in self.groups]:
            raise LayoutError("scales", len(self.scales), "one entry for each layer of each group, or none")

    def heads(self, group: int) -> HeadRange:
        return heads_of_rank(self.groups[group].kv_heads, self.layout.tensor_parallel, self.rank)
