"""The paged memory of one emulated engine, in its vendor's layout, with the KV of its prompts in it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdcoord.sim.kvcontents import SHAPE, kv_of
from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.digest import part_digest
from transfer.layout import KvDtype, KvLayout, RankLayout
from transfer.repack.numbers import bits_type, convert
from transfer.repack.reference import GroupMemory, NumpyRepacker
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.session.vocabulary import Slot, Tables, Unpack

_PLAIN = RankLayout(KvLayout(1, dtype=KvDtype.FLOAT32), 0, (SHAPE,))


class KvStore:
    """Blocks `1 .. block_total`; block 0 stands for none, as in vLLM.

    Attributes:
        layout: as a peer sees it; one rank holds all heads.
        memory: what a repacker works on.

    Raises:
        LayoutError: if such pages cannot hold the emulated model's KV.
    """

    def __init__(self, layout: KvLayout, block_total: int, model_seed: int) -> None:
        self.layout = RankLayout(layout, 0, (SHAPE,))
        self._model_seed = model_seed
        tensors = dense_tensors(layout, SHAPE, SHAPE.kv_heads, block_total + 1)
        arrangement = arrangement_of(
            layout, SHAPE, SHAPE.kv_heads, tuple(tensor.strides for tensor in tensors)
        )
        # Zeros cost nothing until they are written.
        whole = [np.zeros(tensor.element_count, dtype=bits_type(layout.dtype)) for tensor in tensors]
        layers = tuple(
            tuple(flat[layer * tensor.layer_stride :] for flat, tensor in zip(whole, tensors, strict=True))
            for layer in range(SHAPE.layer_count)
        )
        self.memory = (GroupMemory(layers, arrangement),)

    def write(self, prompt: Sequence[int], blocks: Sequence[int]) -> None:
        """Put a prompt's KV into the pool's blocks, as if it had been computed."""
        numbers = kv_of(prompt, self._model_seed).view(np.uint8).reshape(-1)
        shape = _shape(TokenRange(0, len(prompt)))
        order = Unpack(
            request="",
            part=0,
            shape=shape,
            source=_PLAIN,
            landing=0,
            length_bytes=len(numbers),
            digest=part_digest(numbers.data),
            tables=tables(blocks),
            tokens=shape.tokens,
        )
        is_right = NumpyRepacker(self.layout, self.memory, numbers).unpack(order)
        assert is_right, "a digest of the same bytes differs"

    def digest(self, tokens: TokenRange, blocks: Sequence[int]) -> str:
        """What stands in the blocks for these tokens, as 32 hex digits that no layout changes."""
        shape = _shape(tokens)
        length_bytes = part_bytes(shape, SHAPE, self.layout.layout)
        packed = np.empty(length_bytes, dtype=np.uint8)
        slot = Slot(shape, 0, length_bytes)
        NumpyRepacker(self.layout, self.memory, packed).pack((slot,), tables(blocks))
        dtype = self.layout.layout.dtype
        return _hex(convert(packed.view(bits_type(dtype)), dtype, KvDtype.FLOAT32))

    def expected(self, prompt: Sequence[int], tokens: TokenRange) -> str:
        """`digest` of the right KV for these tokens."""
        numbers = kv_of(prompt[: tokens.end], self._model_seed)[:, tokens.first :]
        return _hex(np.ascontiguousarray(numbers))


def tables(blocks: Sequence[int]) -> Tables:
    """A pool's block numbers as a transfer knows them: of one KV group."""
    return (tuple(blocks),)


def _shape(tokens: TokenRange) -> PartShape:
    return PartShape(Form.TOKENS, 0, _PLAIN.heads(0), tokens)


def _hex(numbers: NDArray[np.generic]) -> str:
    return part_digest(np.ascontiguousarray(numbers).view(np.uint8).reshape(-1).data).hex()
