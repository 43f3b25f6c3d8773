"""The bytes of every element type as numbers and back, with numpy alone: the reference for conversions.

Numbers are held as the unsigned integers of their size, so that what is only moved keeps every bit. In
between they are float32, which holds each of the types exactly.

    fp8_e4m3fn    1-4-3, bias 7, no infinity, NaN at 0x7f and 0xff, up to 448 (OCP OFP8 1.0)
    fp8_e4m3fnuz  1-4-3, bias 8, no infinity and no minus zero, NaN at 0x80, up to 240 (AMD gfx94x)
    fp8_e5m2      1-5-2, bias 15, infinities and NaN as in IEEE 754, up to 57344 (OCP OFP8 1.0)
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer.layout import KvDtype

Bits = NDArray[np.unsignedinteger[Any]]
Floats = NDArray[np.float32]

_EXPONENT_BITS = {KvDtype.FP8_E4M3FN: 4, KvDtype.FP8_E4M3FNUZ: 4, KvDtype.FP8_E5M2: 5}
_BIAS = {KvDtype.FP8_E4M3FN: 7, KvDtype.FP8_E4M3FNUZ: 8, KvDtype.FP8_E5M2: 15}
_NAN_CODES = {
    KvDtype.FP8_E4M3FN: (0x7F, 0xFF),
    KvDtype.FP8_E4M3FNUZ: (0x80,),
    KvDtype.FP8_E5M2: (0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF),
}
_BFLOAT16_NAN = 0x7FC0


def bits_type(dtype: KvDtype) -> np.dtype[np.unsignedinteger[Any]]:
    """The unsigned integer that holds one element."""
    return np.dtype(f"u{dtype.item_bytes}")


@cache
def decode_table(dtype: KvDtype) -> Floats:
    """The value of each of the 256 codes of an fp8 type."""
    exponent_bits, bias = _EXPONENT_BITS[dtype], _BIAS[dtype]
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    magnitude = np.where(
        exponent == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1.0 + fraction, exponent - bias)
    )
    table = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    if dtype is KvDtype.FP8_E5M2:
        table[[0x7C, 0xFC]] = np.inf, -np.inf
    table[list(_NAN_CODES[dtype])] = np.nan
    table.flags.writeable = False
    return table


def largest(dtype: KvDtype) -> float:
    """The greatest finite number of an fp8 type, where encoding saturates."""
    table = decode_table(dtype)
    return float(table[np.isfinite(table)].max())


@cache
def encode_table(dtype: KvDtype) -> NDArray[np.uint8]:
    """The fp8 code for each upper half of a float32, whose lowest bit says whether anything lies below.

    Seven bits of mantissa, of which fp8 keeps at most three, and that sticky bit are enough to round to the
    nearest, ties to even, as if from the whole float32.
    """
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    # With the sticky bit set, the number lies between this value and the next, on no tie: its middle stands
    # for it.
    halves = np.arange(1 << 16, dtype=np.uint32)
    values = np.where(halves & 1, ((halves << 16) | 0x4000).view(np.float32), values)
    decoded = decode_table(dtype)
    positive = np.flatnonzero(np.isfinite(decoded[:0x80]))
    known = decoded[positive].astype(np.float64)
    magnitude = np.minimum(np.abs(np.where(np.isnan(values), 0.0, values)).astype(np.float64), known[-1])
    upper = np.searchsorted(known, magnitude)
    lower = np.maximum(upper - 1, 0)
    above, below = known[upper] - magnitude, magnitude - known[lower]
    is_upper = (above < below) | ((above == below) & (positive[upper] % 2 == 0))
    codes = np.where(is_upper, positive[upper], positive[lower])
    is_nan, is_minus = np.isnan(values), np.signbit(values)
    if dtype is KvDtype.FP8_E4M3FNUZ:
        codes = np.where(is_minus & (codes != 0), codes | 0x80, codes)
        codes = np.where(is_nan, 0x80, codes)
    else:
        codes = np.where(is_nan, 0x7F, codes) | np.where(is_minus, 0x80, 0)
    table: NDArray[np.uint8] = codes.astype(np.uint8)
    table.flags.writeable = False
    return table


def decode(bits: Bits, dtype: KvDtype) -> Floats:
    """The values of stored elements, exactly; `bits` holds unsigned integers of the type's size."""
    if dtype.is_fp8:
        return np.take(decode_table(dtype), bits)
    if dtype is KvDtype.BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype is KvDtype.FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def encode(values: Floats, dtype: KvDtype) -> Bits:
    """The stored elements nearest to some values, ties to even.

    fp8 saturates, infinities included; float16 and bfloat16 go to infinity as IEEE 754 has it. NaN stays NaN.
    """
    words = np.ascontiguousarray(values).view(np.uint32)
    if dtype is KvDtype.FLOAT32:
        return words
    if dtype is KvDtype.FLOAT16:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(np.float16).view(np.uint16)
    upper = words >> 16
    if dtype is KvDtype.BFLOAT16:
        rounded = (words + (0x7FFF + (upper & 1)).astype(np.uint32)) >> 16
        kept: Bits = np.where(np.isnan(values), _BFLOAT16_NAN, rounded).astype(np.uint16)
        return kept
    codes: Bits = np.take(encode_table(dtype), upper | (words << 16 != 0))
    return codes


def convert(
    bits: Bits, source: KvDtype, target: KvDtype, source_scale: float = 1.0, target_scale: float = 1.0
) -> Bits:
    """Stored elements as another engine stores them: `stored * scale` is the number meant.

    With equal types and scales the bits are returned as they are. Otherwise the value is multiplied by the
    source's scale and divided by the target's, each rounded once to float32 and left out where the scale is
    1 or both are equal, and then rounded to the target: nothing is lost where the target can hold it.
    """
    if source is target and source_scale == target_scale:
        return bits
    values = decode(bits, source)
    if source_scale != target_scale:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if source_scale != 1.0:
                values = values * np.float32(source_scale)
            if target_scale != 1.0:
                values = values / np.float32(target_scale)
    return encode(values, target)
