"""Engines of known layouts with KV in torch tensors, and the jobs that fill and empty them."""

from dataclasses import dataclass
from typing import Any

import torch

from transfer.canonical import Form, PartShape, TokenRange, part_bytes
from transfer.layout import GroupShape, HeadRange, KvLayout, KvSplit, Order, RankLayout
from transfer.repack.tilings import CPU_AMX, CPU_VEC, ROCM_AITER_SHUFFLE, arrangement_of, dense_tensors
from transfer.repack.torch_memory import TorchGroup
from transfer.repack.torch_repacker import TorchRepacker
from transfer.session.vocabulary import Slot, Tables, Unpack

KV_HEADS, HEAD_DIM, LATENT_DIM = 8, 128, 576
SPARE_BLOCKS = 2
_ELEMENTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Case:
    """A layout to be measured.

    Attributes:
        ratio_min: the least speed, in plain copies of the same bytes on one core of a host.
    """

    name: str
    layout: KvLayout
    ratio_min: float
    is_mla: bool = False

    def shape(self, layer_count: int) -> GroupShape:
        if self.is_mla:
            return GroupShape(layer_count, 1, LATENT_DIM, 0)
        return GroupShape(layer_count, KV_HEADS, HEAD_DIM, HEAD_DIM)


PLAIN, TILED = 0.5, 0.25


def cases(block_tokens: int) -> list[Case]:
    """What is measured; vLLM's CPU pages hold at least 32 tokens."""
    cpu_tokens = max(block_tokens, 32)

    def halved(tiling: str, tokens: int, order: Order = Order.HND) -> KvLayout:
        return KvLayout(tokens, order, split=KvSplit.HALVED, tiling=tiling)

    return [
        Case("nvidia NHD", KvLayout(block_tokens), PLAIN),
        Case("nvidia HND", KvLayout(block_tokens, Order.HND), PLAIN),
        Case("gaudi separate", KvLayout(block_tokens, split=KvSplit.SEPARATE), PLAIN),
        Case("mla", KvLayout(block_tokens), PLAIN, is_mla=True),
        Case(CPU_VEC, halved(CPU_VEC, cpu_tokens), TILED),
        Case(CPU_AMX, halved(CPU_AMX, cpu_tokens), TILED),
        Case(ROCM_AITER_SHUFFLE, halved(ROCM_AITER_SHUFFLE, block_tokens, Order.LHBNC), TILED),
    ]


class Engine:
    """One rank's KV, all layers in one allocation as in vLLM 0.32, with a prompt in scattered blocks."""

    def __init__(self, case: Case, layer_count: int, token_count: int, device: str, staging: Any) -> None:
        layout, shape = case.layout, case.shape(layer_count)
        block_count = -(-token_count // layout.block_tokens)
        ids = torch.randperm(block_count, generator=torch.Generator().manual_seed(0)) + 1
        self.tables: Tables = (tuple(ids.tolist()),)
        heads = shape.kv_heads
        tensors = dense_tensors(layout, shape, heads, block_count + SPARE_BLOCKS)
        kind = _ELEMENTS[layout.dtype.item_bytes]
        flats = [torch.ones(tensor.element_count, dtype=kind, device=device) for tensor in tensors]
        layers = tuple(
            tuple(flat[layer * t.layer_stride :] for flat, t in zip(flats, tensors, strict=True))
            for layer in range(layer_count)
        )
        arrangement = arrangement_of(layout, shape, heads, tuple(tensor.strides for tensor in tensors))
        self.layout = RankLayout(layout, 0, (shape,))
        self.repacker = TorchRepacker(self.layout, [TorchGroup(arrangement, layers)], staging)
        self.part = PartShape(Form.TOKENS, 0, self.layout.heads(0), TokenRange(0, token_count))
        self.length_bytes = part_bytes(self.part, shape, layout)

    @staticmethod
    def bytes_of(case: Case, layer_count: int, token_count: int) -> int:
        """Size of the part that holds such a prompt."""
        shape = case.shape(layer_count)
        part = PartShape(Form.TOKENS, 0, HeadRange(0, shape.kv_heads), TokenRange(0, token_count))
        return part_bytes(part, shape, case.layout)

    def pack(self) -> bytes:
        return self.repacker.pack([self._slot], self.tables)[0]

    def pack_only(self) -> None:
        """Without the digest."""
        self.repacker.fill([self._slot], self.tables)

    def unpack(self, digest: bytes) -> None:
        if not self.repacker.unpack(self._order(digest)):
            raise RuntimeError("the digest of a part that was just packed is wrong")

    def unpack_only(self) -> None:
        """Without the digest."""
        self.repacker.spread(self._order(b""))

    @property
    def _slot(self) -> Slot:
        return Slot(self.part, 0, self.length_bytes)

    def _order(self, digest: bytes) -> Unpack:
        return Unpack(
            request="",
            part=0,
            shape=self.part,
            source=self.layout,
            landing=0,
            length_bytes=self.length_bytes,
            digest=digest,
            tables=self.tables,
            tokens=self.part.tokens,
        )
