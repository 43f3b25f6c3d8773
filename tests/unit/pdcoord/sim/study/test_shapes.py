import pytest

from pdcoord.sim.profiles import PROFILES
from pdcoord.sim.study.shapes import GRANITE_8B, SARVAM_30B, reshaped


def test_kv_follows_from_the_shape() -> None:
    assert GRANITE_8B.kv_bytes_per_token == 2 * 40 * 8 * 128 * 2
    assert SARVAM_30B.kv_bytes_per_token == 2 * 19 * 4 * 64 * 2


def test_a_mixture_of_experts_prefills_fast_and_steps_slowly() -> None:
    base = PROFILES["nvidia-h100-8b"]
    moe = reshaped(base, SARVAM_30B)
    assert moe.speed.prefill_s_per_token < base.speed.prefill_s_per_token / 3
    assert moe.speed.step_base_s - base.speed.step_base_s == pytest.approx(44e9 / 3.35e12)
    assert moe.kv_bytes_per_token == SARVAM_30B.kv_bytes_per_token
    assert moe.layout == base.layout


def test_the_same_shape_is_nearly_the_same_profile() -> None:
    base = PROFILES["amd-mi300x-8b"]
    dense = reshaped(base, GRANITE_8B)
    assert dense.speed.prefill_s_per_token == pytest.approx(base.speed.prefill_s_per_token * 1.05)
    assert dense.block_total < base.block_total, "more layers hold fewer tokens"


def test_every_figure_says_what_was_done_to_it() -> None:
    for name, figure in reshaped(PROFILES["intel-gaudi3-8b"], SARVAM_30B).figures().items():
        assert figure.source, name


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="L40S"):
        reshaped(PROFILES["nvidia-l40s-8b"], SARVAM_30B)
