import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.backends.ucx_messages import (
    ASK_PIECES_MAX,
    DATA_TAG_BIT,
    Ask,
    UcxMetadata,
    decode_control,
    decode_metadata,
    pack_table,
    unpack_table,
)
from transfer.errors import BackendError


def ask(pieces: list[tuple[int, int]], first_tag: int = DATA_TAG_BIT) -> Ask:
    table = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    return Ask(b"t" * 16, b"c" * 8, b"worker", first_tag, pack_table(table[:, 0], table[:, 1]))


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 100)), min_size=1, max_size=20))
def test_a_table_comes_back(pieces: list[tuple[int, int]]) -> None:
    there = decode_control(msgspec.msgpack.encode(ask(pieces)))
    assert isinstance(there, Ask)
    assert unpack_table(there, 1_000) == pieces


@pytest.mark.parametrize(
    "piece", [(-1, 5), (0, 0), (0, -1), (996, 5), ((1 << 63) - 1, 5), (5, (1 << 63) - 1)]
)
def test_a_piece_outside_is_refused(piece: tuple[int, int]) -> None:
    with pytest.raises(BackendError):
        unpack_table(ask([(0, 1), piece]), 1_000)


def test_malformed_tables_and_tags_are_refused() -> None:
    good = ask([(0, 1), (1, 1)])
    for table in (b"", good.table[:-1], good.table * ASK_PIECES_MAX):
        with pytest.raises(BackendError):
            unpack_table(msgspec.structs.replace(good, table=table), 1_000)
    for tag in (0, DATA_TAG_BIT - 1, (1 << 64) - 1):
        with pytest.raises(BackendError):
            unpack_table(msgspec.structs.replace(good, first_tag=tag), 1_000)


@given(st.binary(max_size=200))
def test_other_bytes_are_no_message(data: bytes) -> None:
    for decode in (decode_control, decode_metadata):
        try:
            decode(data)
        except BackendError:
            continue


def test_metadata_names_a_region() -> None:
    good = UcxMetadata(b"w", b"t" * 16, 5)
    assert decode_metadata(msgspec.msgpack.encode(good)) == good
    for bad in ({"worker": b""}, {"token": b"t"}, {"length_bytes": -1}, {"worker": b"w" * 70_000}):
        with pytest.raises(BackendError):
            decode_metadata(msgspec.msgpack.encode(msgspec.structs.replace(good, **bad)))
