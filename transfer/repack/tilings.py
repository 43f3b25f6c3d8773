"""The pages of known engines as arrangements: plain ones in every order, and vendors' own tilings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transfer.errors import LayoutError
from transfer.layout import LEARNED_PREFIX, PLAIN_TILING, GroupShape, KvLayout, KvSplit, Order
from transfer.repack.arrangement import Arrangement, Axis, Digit, Side

CPU_VEC = "cpu-vec"
CPU_VEC16 = "cpu-vec16"
CPU_AMX = "cpu-amx"
ROCM_ATTN = "rocm-attn"
ROCM_AITER_SHUFFLE = "rocm-aiter-shuffle"

VECTOR_BYTES = 16
"""ROCm's pages keep this many bytes of a head (or of tokens) side by side."""

HEAD_MAJOR = frozenset({Order.HND, Order.LHBNC, Order.BLHNC, Order.BHLNC})
"""Orders in which the tokens of one head stand side by side."""

_PHYSICAL = {Order.HND: "LBHNC", Order.NHD: "LBNHC"}


class Strides(NamedTuple):
    """Strides, in elements, of the tensor `[block, head, token, content]` of one layer.

    Content is [K | V] of a token for `packed` and for `halved` in a head-major order (where the engine then
    puts all keys of a block and head before all its values), K or V for `separate`, the latent for MLA.
    Where K and V are two slots of a block, the head axis counts those two and content is all heads of a
    token: the tensor `[block, 2, token, heads * dim]` (see `is_slotted`).
    """

    block: int
    head: int
    token: int
    content: int


class DenseTensor(NamedTuple):
    """One tensor of a group as an engine that adds no room of its own allocates it.

    Attributes:
        strides: of one layer's tensor.
        layer_stride: elements from a layer's first element to the next layer's.
        element_count: of all layers and blocks.
    """

    strides: Strides
    layer_stride: int
    element_count: int


def padded(dim: int, layout: KvLayout) -> int:
    """Elements that a head takes in memory."""
    return -(-dim // layout.head_dim_multiple) * layout.head_dim_multiple


def is_slotted(layout: KvLayout, shape: GroupShape) -> bool:
    """Whether K and V are two slots of a block, each with all heads: `[block, 2, token, heads * dim]`.

    Source: vLLM 0.32 `RocmAttentionBackend.customize_spec`, `AiterFlashAttentionBackend.customize_spec`.
    """
    if shape.is_mla:
        return False
    if layout.tiling in {ROCM_ATTN, ROCM_AITER_SHUFFLE}:
        return True
    return layout.split is KvSplit.HALVED and layout.order not in HEAD_MAJOR


def dense_tensors(
    layout: KvLayout, shape: GroupShape, head_count: int, block_count: int
) -> tuple[DenseTensor, ...]:
    """The tensors of a group with nothing between its elements; two for `separate`, else one."""
    dims = [padded(shape.key_dim, layout)]
    if not shape.is_mla:
        value_dim = padded(shape.value_dim, layout)
        dims = [dims[0], value_dim] if layout.split is KvSplit.SEPARATE else [dims[0] + value_dim]
    heads = head_count
    letters = _PHYSICAL.get(layout.order, str(layout.order))
    if is_slotted(layout, shape):
        # A slot holds all tokens of a block, whichever of token and head comes first in it.
        dims, heads, letters = [dims[0] // 2 * head_count], 2, letters.replace("NH", "HN")
    found = []
    for dim in dims:
        sizes = {
            "L": shape.layer_count,
            "B": block_count,
            "H": heads,
            "N": layout.block_tokens,
            "C": dim,
        }
        strides: dict[str, int] = {}
        step = 1
        for letter in reversed(letters):
            strides[letter] = step
            step *= sizes[letter]
        found.append(DenseTensor(Strides(*(strides[letter] for letter in "BHNC")), strides["L"], step))
    return tuple(found)


def arrangement_of(
    layout: KvLayout, shape: GroupShape, head_count: int, strides: tuple[Strides, ...] | None = None
) -> Arrangement:
    """Where a rank's keys and values of one layer stand.

    Args:
        head_count: KV heads of a layer on this rank.
        strides: of the engine's tensors, one for each; None for dense tensors of HND or NHD, one per layer.

    Raises:
        LayoutError: if the tiling is unknown, was learned (ask `learned.learn`), or cannot be in such a page.
    """
    _check_tiling(layout, shape)
    if strides is None:
        if layout.order not in _PHYSICAL:
            raise LayoutError("strides", strides, f"the tensors' strides, as the order is {layout.order}")
        strides = tuple(tensor.strides for tensor in dense_tensors(layout, shape, head_count, 1))
    tensor_count = 2 if layout.split is KvSplit.SEPARATE and not shape.is_mla else 1
    if len(strides) != tensor_count:
        raise LayoutError("strides", len(strides), f"strides of {tensor_count} tensors")
    page = _Page(
        tokens=layout.block_tokens,
        heads=head_count,
        key=padded(shape.key_dim, layout),
        value=padded(shape.value_dim, layout),
        vector=VECTOR_BYTES // layout.dtype.item_bytes,
    )
    if layout.tiling == PLAIN_TILING:
        ends = _plain(layout, shape, page, strides)
    else:
        ends = _halves(layout, shape, page, strides[0], _TILES[layout.tiling])
    dims = (shape.key_dim, shape.value_dim)
    sides = tuple(
        Side(tensor=end.tensor, offset=end.offset, digits=end.digits, dim=dim)
        for end, dim in zip(ends, dims, strict=False)
    )
    return Arrangement(sides, tuple(tensor.block for tensor in strides))


@dataclass(frozen=True, slots=True)
class _Page:
    """Sizes of a block: tokens, heads, padded key and value, elements of a vector."""

    tokens: int
    heads: int
    key: int
    value: int
    vector: int


class _End(NamedTuple):
    tensor: int
    offset: int
    digits: tuple[Digit, ...]


def _check_tiling(layout: KvLayout, shape: GroupShape) -> None:
    tiling = layout.tiling
    if tiling == PLAIN_TILING:
        return
    if tiling.startswith(LEARNED_PREFIX):
        raise LayoutError("tiling", tiling, "a known tiling; a learned one comes with its own arrangement")
    if tiling not in _TILES:
        raise LayoutError("tiling", tiling, f"one of {', '.join([PLAIN_TILING, *sorted(_TILES)])}")
    if shape.is_mla:
        raise LayoutError("tiling", tiling, f"{PLAIN_TILING}, as MLA has one latent and no such tiles")
    if layout.split is not KvSplit.HALVED:
        raise LayoutError("split", str(layout.split), f"{KvSplit.HALVED}, as in every {tiling} page")
    if tiling == CPU_AMX and layout.dtype.item_bytes != 2:
        raise LayoutError(
            "dtype", str(layout.dtype), f"an element of two bytes, as {tiling} puts two in a word"
        )
    if layout.order not in HEAD_MAJOR:
        raise LayoutError("order", str(layout.order), f"a head-major order, as in every {tiling} page")


def _plain(
    layout: KvLayout, shape: GroupShape, page: _Page, strides: tuple[Strides, ...]
) -> tuple[_End, ...]:
    first = strides[0]
    if shape.is_mla:
        return (_End(0, 0, _strided(page, page.key, first)),)
    if layout.split is KvSplit.SEPARATE:
        return (
            _End(0, 0, _strided(page, page.key, first)),
            _End(1, 0, _strided(page, page.value, strides[1])),
        )
    if layout.split is KvSplit.HALVED:
        return _halves(layout, shape, page, first, _ROWS)
    return (
        _End(0, 0, _strided(page, page.key, first)),
        _End(0, page.key * first.content, _strided(page, page.value, first)),
    )


def _strided(page: _Page, dim: int, strides: Strides) -> tuple[Digit, ...]:
    return (
        Digit(Axis.TOKEN, page.tokens, strides.token),
        Digit(Axis.HEAD, page.heads, strides.head),
        Digit(Axis.ELEMENT, dim, strides.content),
    )


def _halves(
    layout: KvLayout, shape: GroupShape, page: _Page, strides: Strides, tiles: "_Tiles"
) -> tuple[_End, ...]:
    """Pages in which all keys come before all values: of a head, or of a block where K and V are slots."""
    if is_slotted(layout, shape):
        _check_slots(page, strides)
        value_offset = strides.head
        head_stride = None
    else:
        if strides.content != 1 or strides.token != page.key + page.value:
            raise LayoutError(
                "strides", tuple(strides), "tokens of one head without gaps, as K and V share their room"
            )
        value_offset = page.tokens * page.key
        head_stride = strides.head
    return (
        _End(0, 0, tiles.key(page, page.key, head_stride)),
        _End(0, value_offset, tiles.value(page, page.value, head_stride)),
    )


def _check_slots(page: _Page, strides: Strides) -> None:
    if page.key != page.value:
        raise LayoutError("value_dim", page.value, f"{page.key} as for keys, as both are slots of one size")
    if strides.content != 1 or strides.token != page.heads * page.key:
        raise LayoutError("strides", tuple(strides), "tokens of one slot without gaps, all heads of each")


def _cut(name: str, length: int, by: int) -> int:
    if length % by:
        raise LayoutError(name, length, f"a multiple of {by}, as the tiling needs")
    return length // by


# Each of these takes the page, the padded dim and the distance of two heads: None where heads are in a slot.
_Maker = Callable[[_Page, int, int | None], tuple[Digit, ...]]


class _Tiles(NamedTuple):
    key: _Maker
    value: _Maker


def _rows(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[token][element] for each head, or [token][head][element] in a slot."""
    token = dim if head is not None else page.heads * dim
    return (
        Digit(Axis.TOKEN, page.tokens, token),
        Digit(Axis.HEAD, page.heads, dim if head is None else head),
        Digit(Axis.ELEMENT, dim, 1),
    )


def _columns(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[head][element][token]."""
    return (
        Digit(Axis.TOKEN, page.tokens, 1),
        Digit(Axis.HEAD, page.heads, page.tokens * dim if head is None else head),
        Digit(Axis.ELEMENT, dim, page.tokens),
    )


def _amx_key(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[token / 16][element / 2][16 tokens][2 elements] for each head."""
    return (
        Digit(Axis.TOKEN, _cut("block_tokens", page.tokens, 16), 16 * dim),
        Digit(Axis.TOKEN, 16, 2),
        Digit(Axis.HEAD, page.heads, page.tokens * dim if head is None else head),
        Digit(Axis.ELEMENT, _cut("key_dim", dim, 2), 32),
        Digit(Axis.ELEMENT, 2, 1),
    )


def _amx_value(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[element / 16][token / 2][16 elements][2 tokens] for each head."""
    return (
        Digit(Axis.TOKEN, _cut("block_tokens", page.tokens, 2), 32),
        Digit(Axis.TOKEN, 2, 1),
        Digit(Axis.HEAD, page.heads, page.tokens * dim if head is None else head),
        Digit(Axis.ELEMENT, _cut("value_dim", dim, 16), 16 * page.tokens),
        Digit(Axis.ELEMENT, 16, 2),
    )


def _vector_key(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[head][element / x][token][x elements]."""
    return (
        Digit(Axis.TOKEN, page.tokens, page.vector),
        Digit(Axis.HEAD, page.heads, page.tokens * dim if head is None else head),
        Digit(Axis.ELEMENT, _cut("key_dim", dim, page.vector), page.tokens * page.vector),
        Digit(Axis.ELEMENT, page.vector, 1),
    )


def _vector_value(page: _Page, dim: int, head: int | None) -> tuple[Digit, ...]:
    """[head][token / x][element][x tokens]."""
    return (
        Digit(Axis.TOKEN, _cut("block_tokens", page.tokens, page.vector), dim * page.vector),
        Digit(Axis.TOKEN, page.vector, 1),
        Digit(Axis.HEAD, page.heads, page.tokens * dim if head is None else head),
        Digit(Axis.ELEMENT, dim, page.vector),
    )


_ROWS = _Tiles(_rows, _rows)

# Sources: cpu-vec and cpu-vec16 observed with vLLM 0.32's `cpu_attn_reshape_and_cache`, cpu-amx read from
# vLLM's csrc/cpu/cpu_attn_amx.hpp; ROCm's read from vLLM 0.32, `PagedAttention.split_kv_cache` and
# `reshape_and_cache_shuffle_kernel`.
_TILES = {
    CPU_VEC: _Tiles(_columns, _rows),
    CPU_VEC16: _Tiles(_columns, _rows),
    CPU_AMX: _Tiles(_amx_key, _amx_value),
    ROCM_ATTN: _Tiles(_vector_key, _columns),
    ROCM_AITER_SHUFFLE: _Tiles(_vector_key, _vector_value),
}

KNOWN_TILINGS = (PLAIN_TILING, *_TILES)
"""What `arrangement_of` understands; anything else must be learned."""
