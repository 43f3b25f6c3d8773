"""Conversion in torch against the numpy reference, to the bit, with and without torch's own fp8 types."""

import numpy as np
import pytest
from numpy.typing import NDArray

from transfer.layout import KvDtype
from transfer.repack import numbers

torch = pytest.importorskip("torch", reason="torch is not installed")
torch_numbers = pytest.importorskip("transfer.repack.torch_numbers")

SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}
SCALES = [(1.0, 1.0), (0.37, 1.0), (1.0, 0.013), (2.0, 0.7), (0.37, 0.37)]


def samples(dtype: KvDtype) -> NDArray[np.unsignedinteger]:
    """Every number of a small type; of float32 many, with those between two fp8 numbers among them."""
    if dtype is not KvDtype.FLOAT32:
        return np.arange(1 << 8 * dtype.item_bytes, dtype=numbers.bits_type(dtype))
    random = np.random.default_rng(0)
    found = [(random.standard_normal(20_000) * 10.0 ** random.integers(-12, 12, 20_000)).astype(np.float32)]
    for fp8 in (each for each in KvDtype if each.is_fp8):
        finite = np.unique(numbers.decode_table(fp8)[np.isfinite(numbers.decode_table(fp8))])
        halves = (finite[:-1] + finite[1:]) / 2
        found += [halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, -np.float32(np.inf))]
    found.append(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42], np.float32))
    return np.concatenate(found).astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("use_tables", [False, True])
@pytest.mark.parametrize("target", list(KvDtype))
@pytest.mark.parametrize("source", list(KvDtype))
def test_it_converts_as_the_reference_does(source: KvDtype, target: KvDtype, use_tables: bool) -> None:
    convert = torch_numbers.Converter("cpu", use_tables=use_tables)
    stored = samples(source)
    for scales in SCALES:
        expected = numbers.convert(stored, source, target, *scales)
        given = torch.from_numpy(stored.view(SIGNED[source.item_bytes]).copy())
        found = convert(given, source, target, *scales).numpy().view(numbers.bits_type(target))
        are_nan = np.isnan(numbers.decode(expected, target)) & np.isnan(numbers.decode(found, target))
        assert np.array_equal(found[~are_nan], expected[~are_nan])


def test_what_needs_no_conversion_is_not_copied() -> None:
    given = torch.zeros(4, dtype=torch.int16)
    convert = torch_numbers.Converter("cpu")
    assert convert(given, KvDtype.BFLOAT16, KvDtype.BFLOAT16, 2.0, 2.0) is given
