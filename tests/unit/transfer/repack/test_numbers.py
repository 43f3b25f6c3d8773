"""Conversions against an exhaustive search, against torch, and against their own rules."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from transfer.layout import KvDtype
from transfer.repack.numbers import bits_type, convert, decode, decode_table, encode, encode_table, largest

UNTIMED = settings(deadline=None)

FP8 = [KvDtype.FP8_E4M3FN, KvDtype.FP8_E4M3FNUZ, KvDtype.FP8_E5M2]
WIDE = [KvDtype.BFLOAT16, KvDtype.FLOAT16, KvDtype.FLOAT32]
EVERY_FLOAT = st.integers(0, 2**32 - 1)


def floats(words: list[int]) -> NDArray[np.float32]:
    return np.array(words, np.uint32).view(np.float32)


def nearest(value: float, dtype: KvDtype) -> set[float]:
    """The finite numbers of a type nearest to a value, by looking at all of them."""
    known = [float(number) for number in decode_table(dtype) if math.isfinite(number)]
    bounded = max(-largest(dtype), min(largest(dtype), value))
    least = min(abs(number - bounded) for number in known)
    return {number for number in known if abs(number - bounded) == least}


@pytest.mark.parametrize(
    ("dtype", "code", "value"),
    [
        (KvDtype.FP8_E4M3FN, 0x7E, 448.0),
        (KvDtype.FP8_E4M3FN, 0x01, 2.0**-9),
        (KvDtype.FP8_E4M3FN, 0x38, 1.0),
        (KvDtype.FP8_E4M3FN, 0xB8, -1.0),
        (KvDtype.FP8_E4M3FNUZ, 0x7F, 240.0),
        (KvDtype.FP8_E4M3FNUZ, 0x01, 2.0**-10),
        (KvDtype.FP8_E4M3FNUZ, 0x38, 0.5),
        (KvDtype.FP8_E5M2, 0x7B, 57344.0),
        (KvDtype.FP8_E5M2, 0x01, 2.0**-16),
        (KvDtype.FP8_E5M2, 0xFC, -math.inf),
    ],
)
def test_codes_mean_what_the_formats_say(dtype: KvDtype, code: int, value: float) -> None:
    assert decode_table(dtype)[code] == value


@pytest.mark.parametrize(("dtype", "bound"), list(zip(FP8, [448.0, 240.0, 57344.0], strict=True)))
def test_what_is_too_large_saturates(dtype: KvDtype, bound: float) -> None:
    values = np.array([1e30, -1e30, np.inf, -np.inf, bound * 1.2, bound], np.float32)
    assert decode(encode(values, dtype), dtype).tolist() == [bound, -bound, bound, -bound, bound, bound]


@pytest.mark.parametrize("dtype", [*FP8, *WIDE])
def test_nan_stays_nan(dtype: KvDtype) -> None:
    values = floats([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF])
    assert np.isnan(decode(encode(values, dtype), dtype)).all()


@pytest.mark.parametrize("dtype", [*FP8, KvDtype.BFLOAT16, KvDtype.FLOAT16])
def test_every_number_of_a_type_survives_a_round_trip(dtype: KvDtype) -> None:
    codes = np.arange(1 << 8 * dtype.item_bytes, dtype=bits_type(dtype))
    values = decode(codes, dtype)
    finite = np.isfinite(values) if dtype.is_fp8 else ~np.isnan(values)
    assert np.array_equal(encode(values, dtype)[finite], codes[finite])


@UNTIMED
@given(st.lists(EVERY_FLOAT, min_size=1, max_size=20), st.sampled_from(FP8))
def test_fp8_is_the_nearest_number(words: list[int], dtype: KvDtype) -> None:
    values = floats(words)
    codes = encode(values, dtype)
    for value, code in zip(values.tolist(), codes.tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(decode_table(dtype)[code])
            continue
        candidates = nearest(value, dtype)
        assert float(decode_table(dtype)[code]) in candidates
        assert len(candidates) == 1 or code % 2 == 0, "a tie goes to the even code"


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_rounds_right_at_and_beside_every_tie(dtype: KvDtype) -> None:
    table = decode_table(dtype)
    known = np.unique(table[np.isfinite(table)]).astype(np.float64)
    middles = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    for values in (
        middles,
        np.nextafter(middles, np.float32(np.inf)),
        np.nextafter(middles, -np.float32(np.inf)),
    ):
        for value, code in zip(values.tolist(), encode(values, dtype).tolist(), strict=True):
            candidates = nearest(value, dtype)
            assert float(table[code]) in candidates
            assert len(candidates) == 1 or code % 2 == 0


TIES = st.builds(lambda upper, rest: upper << 16 | rest, st.integers(0, 0xFFFF), st.integers(0x7FFF, 0x8001))


@UNTIMED
@given(st.lists(EVERY_FLOAT | TIES, min_size=1, max_size=50))
def test_bfloat16_rounds_to_the_nearest_even(words: list[int]) -> None:
    values = floats(words)
    codes = encode(values, KvDtype.BFLOAT16)
    for value, word, code in zip(values.tolist(), words, codes.tolist(), strict=True):
        if math.isnan(value):
            continue
        low, rest = word >> 16, word & 0xFFFF
        assert code == low + (rest > 0x8000 or (rest == 0x8000 and low % 2 == 1))


@pytest.mark.parametrize(("source", "target"), list(itertools.product([*FP8, *WIDE], repeat=2)))
def test_nothing_is_lost_where_the_target_is_wider(source: KvDtype, target: KvDtype) -> None:
    codes = np.arange(256).astype(bits_type(source))
    if not source.is_fp8:
        codes = encode(np.arange(-128, 128).astype(np.float32) / 8, source)
    if target.item_bytes <= source.item_bytes and source is not target:
        return
    values = decode(codes, source)
    back = convert(convert(codes, source, target), target, source)
    kept = np.isfinite(values)
    assert np.array_equal(decode(back, source)[kept], values[kept])


@pytest.mark.parametrize("dtype", [*FP8, *WIDE])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_equal_types_and_scales_keep_every_bit(dtype: KvDtype, scale: float) -> None:
    codes = np.arange(1 << min(16, 8 * dtype.item_bytes)).astype(bits_type(dtype)) * (
        65537 if dtype.item_bytes == 4 else 1
    )
    assert np.array_equal(convert(codes, dtype, dtype, scale, scale), codes)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3.0])
def test_a_doubled_scale_carries_e4m3fn_into_fnuz_without_loss(scale: float) -> None:
    codes = np.arange(256, dtype=np.uint8)
    made = convert(codes, KvDtype.FP8_E4M3FN, KvDtype.FP8_E4M3FNUZ, scale, 2 * scale)
    due = codes.copy()
    due[0x80] = 0x00
    due[[0x7F, 0xFF]] = 0x80
    assert np.array_equal(made, due)
    back = convert(made, KvDtype.FP8_E4M3FNUZ, KvDtype.FP8_E4M3FN, 2 * scale, scale)
    kept = np.setdiff1d(codes, [0x7F, 0x80, 0xFF])
    assert np.array_equal(back[kept], codes[kept])


def test_equal_scales_carry_e4m3fn_into_fnuz_by_value() -> None:
    codes = encode(np.array([1.0, -2.5, 240.0, 300.0, 2.0**-9, 448.0], np.float32), KvDtype.FP8_E4M3FN)
    made = convert(codes, KvDtype.FP8_E4M3FN, KvDtype.FP8_E4M3FNUZ)
    assert decode(made, KvDtype.FP8_E4M3FNUZ).tolist() == [1.0, -2.5, 240.0, 240.0, 2.0**-9, 240.0]
    assert not np.array_equal(made, codes)


def test_scales_multiply_on_the_way_in_and_divide_on_the_way_out() -> None:
    stored = encode(np.array([3.0, -8.0], np.float32), KvDtype.FP8_E5M2)
    wide = convert(stored, KvDtype.FP8_E5M2, KvDtype.FLOAT32, 0.25, 1.0)
    assert decode(wide, KvDtype.FLOAT32).tolist() == [0.75, -2.0]
    assert np.array_equal(convert(wide, KvDtype.FLOAT32, KvDtype.FP8_E5M2, 1.0, 0.25), stored)


def test_float16_goes_to_infinity_without_a_warning() -> None:
    made = decode(encode(np.array([1e6, -1e6, 1e-12], np.float32), KvDtype.FLOAT16), KvDtype.FLOAT16)
    assert made.tolist() == [math.inf, -math.inf, 0.0]


@pytest.mark.parametrize("dtype", [*FP8, KvDtype.BFLOAT16, KvDtype.FLOAT16])
def test_tables_are_torchs(dtype: KvDtype) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: its own tables cannot be compared")
    name = {KvDtype.FP8_E4M3FN: "float8_e4m3fn", KvDtype.FP8_E4M3FNUZ: "float8_e4m3fnuz"}.get(dtype)
    theirs = getattr(torch, name or {KvDtype.FP8_E5M2: "float8_e5m2"}.get(dtype) or str(dtype))
    count = 1 << 8 * dtype.item_bytes
    codes = np.arange(count).astype(bits_type(dtype))
    integer = torch.uint8 if count == 256 else torch.int16
    given = torch.from_numpy(codes.view(np.int16) if count > 256 else codes).view(theirs)
    assert np.array_equal(decode(codes, dtype), given.to(torch.float32).numpy(), equal_nan=True)
    values = np.random.default_rng(5).integers(0, 1 << 32, 50_000, np.uint32).view(np.float32)
    small = np.random.default_rng(6).normal(0, 1, 50_000).astype(np.float32)
    values = np.concatenate([values, small, np.float32(2.0) ** np.arange(-30, 20, dtype=np.float32)])
    bound = largest(dtype) if dtype.is_fp8 else np.inf
    values = np.clip(values[~np.isnan(values)], -bound, bound)
    made = torch.from_numpy(values).to(theirs).view(integer).numpy().view(bits_type(dtype))
    assert np.array_equal(encode(values, dtype), made)


@pytest.mark.parametrize("dtype", FP8)
def test_tables_cannot_be_written(dtype: KvDtype) -> None:
    for table in (decode_table(dtype), encode_table(dtype)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1
