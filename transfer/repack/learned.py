"""Learns where an engine's own writer puts each element of a block, and finds the known tiling that it is.

The writer is given numbers that tell every element from every other, in a few passes of small whole numbers
that each element type holds exactly. What comes back must be a bijection; else nothing can be said.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from transfer.errors import LayoutError
from transfer.layout import LEARNED_PREFIX, PLAIN_TILING, GroupShape, KvDtype, KvLayout, KvSplit
from transfer.repack.arrangement import AnyArrangement, Arrangement, Axis, Digit, Learned, Side
from transfer.repack.numbers import bits_type, decode
from transfer.repack.tables import Positions, learned_side, table_of
from transfer.repack.tilings import KNOWN_TILINGS, Strides, arrangement_of, padded

Writer = Callable[[NDArray[np.float32], NDArray[np.float32] | None], Sequence[bytes]]
"""Stores the keys (or latents) and values (None for MLA) of one whole block, each `[token][head][element]`,
through the engine's own writer, all scales 1, into a block that held zeros. Returns for each tensor its raw
memory from the block's start, as far as the block reaches; what is not the block's must be zeros."""

SYMBOLS = 8
"""Each pass writes 1 .. SYMBOLS: fp8 e5m2 holds whole numbers exactly up to 8; 0 means untouched."""

NAME_BYTES = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found.

    Attributes:
        tiling: a known one, or LEARNED_PREFIX and a hash of the positions.
        split: that of the matching known pages; the declared one if none matches.
        arrangement: by digits wherever digits describe it.
    """

    tiling: str
    split: KvSplit
    arrangement: AnyArrangement


def learn(
    layout: KvLayout, shape: GroupShape, head_count: int, strides: tuple[Strides, ...], write: Writer
) -> Finding:
    """Probe one block of a group.

    Args:
        layout: what is known; its tiling and split are tried first.
        strides: of the engine's tensors, as for `tilings.arrangement_of`.

    Raises:
        LayoutError: if the writer loses, repeats or changes elements.
    """
    probed = _probe(layout, shape, head_count, tuple(tensor.block for tensor in strides), write)
    tables = [table_of(side) for side in probed.sides]
    for candidate in _candidates(layout):
        try:
            known = arrangement_of(candidate, shape, head_count, strides)
        except LayoutError:
            continue  # Such pages cannot have that tiling.
        if _is_same(known, probed, tables):
            return Finding(candidate.tiling, candidate.split, known)
    return Finding(_name([probed]), layout.split, _fitted(layout, probed, tables) or probed)


def layout_of(layout: KvLayout, findings: Sequence[Finding]) -> KvLayout:
    """The layout of a rank whose groups were probed; unlike groups get a name of their own together."""
    tilings = {(finding.tiling, finding.split) for finding in findings}
    if len(tilings) == 1:
        tiling, split = tilings.pop()
        return replace(layout, tiling=tiling, split=split)
    return replace(layout, tiling=_name([finding.arrangement for finding in findings]))


def _candidates(layout: KvLayout) -> Iterator[KvLayout]:
    if not layout.tiling.startswith(LEARNED_PREFIX):
        yield layout
    for tiling in KNOWN_TILINGS:
        for split in KvSplit:
            if split is KvSplit.HALVED or tiling == PLAIN_TILING:
                yield replace(layout, tiling=tiling, split=split)


def _is_same(known: Arrangement, probed: Learned, tables: Sequence[Positions]) -> bool:
    return len(known.sides) == len(probed.sides) and all(
        side.tensor == found.tensor and np.array_equal(table_of(side), table)
        for side, found, table in zip(known.sides, probed.sides, tables, strict=True)
    )


def _name(arrangements: Sequence[AnyArrangement]) -> str:
    hasher = hashlib.blake2b(digest_size=NAME_BYTES)
    for arrangement in arrangements:
        for side in arrangement.sides:
            table = table_of(side)
            hasher.update(repr((side.tensor, table.shape)).encode())
            hasher.update(table.astype("<i8").tobytes())
    return LEARNED_PREFIX + hasher.hexdigest()


def _probe(
    layout: KvLayout, shape: GroupShape, head_count: int, block_strides: tuple[int, ...], write: Writer
) -> Learned:
    """Write all passes and read off each element's place."""
    dims = [shape.key_dim] if shape.is_mla else [shape.key_dim, shape.value_dim]
    counts = [layout.block_tokens * head_count * dim for dim in dims]
    total = sum(counts)
    known: list[NDArray[np.int64]] = []
    touched: list[NDArray[np.bool_]] = []
    weight = 1
    while weight < total or not known:
        numbers = (np.arange(total) // weight % SYMBOLS + 1).astype(np.float32)
        ends = [
            part.reshape(layout.block_tokens, head_count, dim)
            for part, dim in zip(np.split(numbers, np.cumsum(counts)[:-1]), dims, strict=True)
        ]
        digits = [_digits(raw, layout.dtype) for raw in write(ends[0], ends[1] if len(ends) > 1 else None)]
        if not known:
            known = [np.zeros(len(digit), np.int64) for digit in digits]
            touched = [digit > 0 for digit in digits]
        if [len(digit) for digit in digits] != [len(ids) for ids in known]:
            raise LayoutError("block", [len(digit) for digit in digits], "the same memory after each write")
        if not all(np.array_equal(mask, digit > 0) for mask, digit in zip(touched, digits, strict=True)):
            raise LayoutError("block", layout.tiling, "a writer that touches the same places each time")
        known = [
            ids + np.where(mask, digit - 1, 0) * weight
            for ids, mask, digit in zip(known, touched, digits, strict=True)
        ]
        weight *= SYMBOLS
    if len(known) != len(block_strides):
        raise LayoutError("block", len(known), f"the memory of {len(block_strides)} tensors")
    places = _inverse(known, touched, total)
    sides = []
    for (tensors, positions), dim in zip(_parted(places, counts), dims, strict=True):
        if (tensors != tensors[0]).any():
            raise LayoutError("block", layout.tiling, "keys in one tensor, values in one tensor")
        table = positions.reshape(layout.block_tokens, head_count, dim)
        sides.append(learned_side(int(tensors[0]), table))
    return Learned(tuple(sides), block_strides)


def _digits(raw: bytes, dtype: KvDtype) -> NDArray[np.int64]:
    """What stands at each place of a tensor: 0 for nothing, else the symbol."""
    values = decode(np.frombuffer(raw, bits_type(dtype)), dtype)
    whole = np.where(np.isfinite(values), values, -1.0)
    digits = whole.astype(np.int64)
    wrong = (digits != whole) | (digits < 0) | (digits > SYMBOLS)
    if wrong.any():
        raise LayoutError(
            "block", float(values[np.argmax(wrong)]), f"whole numbers up to {SYMBOLS}, kept as they are"
        )
    return digits


def _inverse(
    known: Sequence[NDArray[np.int64]], touched: Sequence[NDArray[np.bool_]], total: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each element its tensor and its position, if each stands in exactly one place."""
    positions = [np.flatnonzero(mask) for mask in touched]
    ids = np.concatenate([found[place] for found, place in zip(known, positions, strict=True)])
    tensors = np.concatenate([np.full(len(place), index) for index, place in enumerate(positions)])
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], np.arange(total)):
        raise LayoutError("block", len(np.unique(ids)), f"a bijection: {total} elements, each in one place")
    return tensors[order], np.concatenate(positions)[order]


def _parted(
    places: tuple[NDArray[np.int64], NDArray[np.int64]], counts: Sequence[int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    cuts = np.cumsum(counts)[:-1]
    return zip(np.split(places[0], cuts), np.split(places[1], cuts), strict=True)


def _fitted(layout: KvLayout, probed: Learned, tables: Sequence[Positions]) -> Arrangement | None:
    """The same positions as digits, if each axis adds its own share and that is a sum of digits."""
    sides = []
    for side, table in zip(probed.sides, tables, strict=True):
        if padded(side.dim, layout) != side.dim:
            return None  # Where the padding stands cannot be learned.
        offset = int(table[0, 0, 0])
        shares = (table[:, 0, 0] - offset, table[0, :, 0] - offset, table[0, 0, :] - offset)
        whole = offset + shares[0][:, None, None] + shares[1][:, None] + shares[2]
        if not np.array_equal(whole, table):
            return None
        digits: list[Digit] = []
        for axis, share in zip(Axis, shares, strict=True):
            cut = _cut(axis, share)
            if cut is None:
                return None
            digits.extend(cut)
        sides.append(Side(side.tensor, offset, tuple(digits), side.dim))
    return Arrangement(tuple(sides), probed.block_strides)


def _cut(axis: Axis, share: NDArray[np.int64]) -> list[Digit] | None:
    """The digits of one axis, the most significant first; None if a stride would be negative or none fits."""
    if len(share) == 1:
        return [Digit(axis, 1, 1)]
    stride = int(share[1] - share[0])
    if stride < 1:
        return None
    for size in range(len(share), 1, -1):
        if len(share) % size:
            continue
        rows = share.reshape(-1, size)
        if np.array_equal(rows - rows[:, :1], np.broadcast_to(np.arange(size) * stride, rows.shape)):
            if len(rows) == 1:
                return [Digit(axis, size, stride)]
            upper = _cut(axis, rows[:, 0])
            return None if upper is None else [*upper, Digit(axis, size, stride)]
    return None
