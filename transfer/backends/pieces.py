"""The pieces of a read as arrays: checked against both regions, neighbours merged, series as strides."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transfer.backends.base import Piece
from transfer.errors import BackendError

PIECES_MAX = 1 << 20
"""Most pieces of one read."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Merged pieces: three int64 arrays of one length, which is 0 for a read of nothing."""

    remote: NDArray[np.int64]
    local: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def total_bytes(self) -> int:
        return int(self.lengths.sum())


def runs_of(pieces: Sequence[Piece], *, local_bytes: int, remote_bytes: int) -> Runs:
    """Pieces without the empty ones, neighbours on both sides merged, order kept.

    Raises:
        BackendError: if there are too many, or one is outside of a region.
    """
    if len(pieces) > PIECES_MAX:
        raise BackendError(f"a read has {len(pieces)} pieces, at most {PIECES_MAX} are taken")
    flat = [number for p in pieces for number in (p.remote_offset, p.local_offset, p.length_bytes)]
    try:
        table = np.array(flat, dtype=np.int64).reshape(-1, 3)
    except OverflowError:
        raise BackendError("a piece has an offset past any region") from None
    remote, local, lengths = table[:, 0], table[:, 1], table[:, 2]
    _check("the peer's", remote, lengths, remote_bytes)
    _check("the own", local, lengths, local_bytes)
    is_full = lengths > 0
    remote, local, lengths = remote[is_full], local[is_full], lengths[is_full]
    if not len(lengths):
        return Runs(remote, local, lengths)
    is_first = np.ones(len(lengths), dtype=np.bool_)
    is_first[1:] = (remote[1:] != (remote + lengths)[:-1]) | (local[1:] != (local + lengths)[:-1])
    starts = np.flatnonzero(is_first)
    return Runs(remote[starts], local[starts], np.add.reduceat(lengths, starts))


def _check(whose: str, offsets: NDArray[np.int64], lengths: NDArray[np.int64], region_bytes: int) -> None:
    # Compared without adding: a hostile sum could wrap.
    is_outside = (offsets < 0) | (lengths < 0) | (lengths > region_bytes) | (offsets > region_bytes - lengths)
    if is_outside.any():
        index = int(np.flatnonzero(is_outside)[0])
        raise BackendError(
            f"piece {index} has {int(lengths[index])} bytes at {int(offsets[index])}, outside of {whose}"
            f" region of {region_bytes} bytes"
        )


def descriptor_rows(
    offsets: NDArray[np.int64], lengths: NDArray[np.int64], base_address: int, device_index: int
) -> NDArray[np.uint64]:
    """Rows for NIXL 1.5's prep_xfer_dlist: (address, length, device), or with (stride, count) added.

    The five-column form, in which one row stands for a whole regular series, is used where it is a
    quarter as long at most; both expand to the same descriptors in the same order.
    """
    addresses = offsets.astype(np.uint64) + np.uint64(base_address)
    plain = np.empty((len(lengths), 3), dtype=np.uint64)
    plain[:, 0], plain[:, 1], plain[:, 2] = addresses, lengths, device_index
    starts = _series(offsets, lengths)
    if 4 * len(starts) > len(lengths):
        return plain
    counts = np.diff(np.append(starts, len(lengths)))
    # A series of one has no stride of its own; its length is a valid one.
    second = np.minimum(starts + 1, len(lengths) - 1)
    strides = np.where(counts > 1, offsets[second] - offsets[starts], lengths[starts])
    return np.column_stack([plain[starts], strides.astype(np.uint64), counts.astype(np.uint64)])


def _series(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices at which a series of equal lengths at a growing, equal distance begins."""
    if len(lengths) < 3:
        return np.arange(len(lengths))
    steps = np.diff(offsets)
    continues = np.zeros(len(lengths), dtype=np.bool_)
    continues[2:] = (
        (steps[1:] == steps[:-1])
        & (steps[1:] >= lengths[1:-1])
        & (lengths[2:] == lengths[1:-1])
        & (lengths[1:-1] == lengths[:-2])
    )
    # An index that does not continue the two before it may still be the second of the series that they begin.
    starts: list[int] = []
    index = 0
    breaks = np.flatnonzero(~continues)
    position = 0
    while index < len(lengths):
        starts.append(index)
        # The series from `index` holds index + 1 where that one is regular, and goes on while `continues`.
        end = index + 1
        if end < len(lengths) and lengths[end] == lengths[index] and steps[index] >= lengths[index]:
            position = int(np.searchsorted(breaks, index + 2))
            end = int(breaks[position]) if position < len(breaks) else len(lengths)
        index = end
    return np.array(starts, dtype=np.int64)
