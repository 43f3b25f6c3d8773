import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.backends.base import Piece
from transfer.backends.pieces import descriptor_rows, runs_of
from transfer.errors import BackendError

REGION = 1_000
PIECES = st.lists(
    st.builds(
        Piece,
        remote_offset=st.integers(0, REGION - 20),
        local_offset=st.integers(0, REGION - 20),
        length_bytes=st.integers(0, 20),
    ),
    max_size=30,
)


def moved(triples: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(remote + i, local + i) for remote, local, length in triples for i in range(length)]


@given(PIECES)
def test_merging_moves_the_same_bytes_in_the_same_order(pieces: list[Piece]) -> None:
    runs = runs_of(pieces, local_bytes=REGION, remote_bytes=REGION)
    triples = [
        (int(r), int(o), int(n)) for r, o, n in zip(runs.remote, runs.local, runs.lengths, strict=True)
    ]
    given_triples = [(p.remote_offset, p.local_offset, p.length_bytes) for p in pieces]
    assert moved(triples) == moved(given_triples)
    assert runs.total_bytes == sum(p.length_bytes for p in pieces)
    for (remote, local, length), after in itertools.pairwise(triples):
        assert (remote + length, local + length) != after[:2]


@pytest.mark.parametrize(
    "piece",
    [
        Piece(990, 0, 11),
        Piece(0, 990, 11),
        Piece(-1, 0, 1),
        Piece(0, -1, 1),
        Piece(0, 0, -1),
        Piece(1 << 80, 0, 1),
        Piece((1 << 63) - 1, 0, 5),
        Piece(5, 0, (1 << 63) - 1),
        Piece(1_001, 0, 0),
    ],
)
def test_a_piece_outside_of_a_region_is_refused(piece: Piece) -> None:
    with pytest.raises(BackendError):
        runs_of([Piece(0, 0, 1), piece], local_bytes=REGION, remote_bytes=REGION)


SERIES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=5)


@given(SERIES, st.integers(0, 50))
def test_rows_expand_to_the_descriptors_in_order(series: list[tuple[int, int, int]], gap: int) -> None:
    expected: list[tuple[int, int]] = []
    offset = 0
    for count, length, more in series:
        for _ in range(count):
            expected.append((offset, length))
            offset += length + more
        offset += gap
    offsets = np.array([o for o, _ in expected], dtype=np.int64)
    lengths = np.array([n for _, n in expected], dtype=np.int64)
    rows = descriptor_rows(offsets, lengths, 10_000, 3)
    assert set(rows[:, 2].tolist()) == {3}
    if rows.shape[1] == 3:
        found = [(int(a) - 10_000, int(n)) for a, n, _ in rows]
    else:
        found = [(int(a) - 10_000 + i * int(s), int(n)) for a, n, _, s, c in rows for i in range(int(c))]
    assert found == expected


def test_a_regular_read_takes_one_row() -> None:
    offsets = np.arange(16_384, dtype=np.int64) * 8_192
    rows = descriptor_rows(offsets, np.full(16_384, 4_096), 1 << 40, 0)
    assert rows.tolist() == [[1 << 40, 4_096, 0, 8_192, 16_384]]
