"""Presets name real backends, say where that is from, and claim no more than was seen."""

import pytest

from transfer.layout import GroupShape, KvDtype, KvSplit, Order
from transfer.presets import PRESETS, Evidence, Preset
from transfer.repack.arrangement import check
from transfer.repack.tilings import arrangement_of, dense_tensors
from transfer.verdict import tiling_fault


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_has_a_source_with_a_version_and_a_page_that_can_be_unpacked(preset: Preset) -> None:
    assert ".py" in preset.source
    assert any(character.isdigit() for character in preset.source)
    assert preset.note
    assert tiling_fault(preset.layout) is None
    assert PRESETS[preset.name] is preset
    shape = GroupShape(2, 8, 128, 128)
    strides = tuple(tensor.strides for tensor in dense_tensors(preset.layout, shape, 8, 3))
    check(arrangement_of(preset.layout, shape, 8, strides), 3)


def test_every_vendor_that_is_promised_is_there() -> None:
    assert set(PRESETS) == {
        "nvidia-flash-attn",
        "nvidia-flashinfer",
        "amd-aiter",
        "amd-aiter-unified",
        "amd-aiter-shuffle",
        "amd-rocm-attn",
        "intel-gaudi",
        "intel-xpu",
        "cpu-vec",
        "cpu-vec16",
        "cpu-amx",
    }


def test_nothing_claims_a_gpu_that_it_was_not_run_on() -> None:
    """tests/gpu is what may change this; a claim without a result in benchmarks/results is none."""
    evidence = {name: preset.evidence for name, preset in PRESETS.items()}
    assert {name for name, mark in evidence.items() if mark is not Evidence.READ_FROM_SOURCE} == {"cpu-vec"}
    assert evidence["cpu-vec"] is Evidence.VERIFIED_ON_CPU


def test_gaudi_has_two_tensors_and_cpu_pages_two_halves() -> None:
    gaudi, vec = PRESETS["intel-gaudi"].layout, PRESETS["cpu-vec"].layout
    assert (gaudi.block_tokens, gaudi.order, gaudi.split) == (128, Order.NHD, KvSplit.SEPARATE)
    assert (vec.order, vec.split, vec.tiling) == (Order.HND, KvSplit.HALVED, "cpu-vec")
    assert vec.dtype is KvDtype.BFLOAT16


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["cpu-vec"]  # type: ignore[index]
