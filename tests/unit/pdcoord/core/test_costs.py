"""What work costs: zero for nothing, and never less for more."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import PathFigures, SpeedFigures

seconds = st.floats(0.0, 1.0)
small = st.floats(0.0, 1e-3)
tokens = st.integers(0, 200_000)
speeds = st.builds(SpeedFigures, seconds, small, seconds, small, small, small)


@given(speeds, tokens, tokens)
def test_more_tokens_never_prefill_faster(speed: SpeedFigures, one: int, two: int) -> None:
    assert speed.prefill_s(min(one, two)) <= speed.prefill_s(max(one, two))


@given(speeds, st.integers(0, 512), st.integers(0, 512), tokens, tokens)
def test_a_bigger_batch_or_context_never_steps_faster(
    speed: SpeedFigures, batch: int, more: int, context: int, longer: int
) -> None:
    assert speed.step_s(batch, context) <= speed.step_s(batch + more, context + longer)


def test_the_forms_are_those_documented() -> None:
    speed = SpeedFigures(0.01, 0.001, 0.02, 0.0001, 0.00002, 0.003)
    assert speed.prefill_s(10) == pytest.approx(0.01 + 0.01 + 0.01)
    assert speed.step_s(4, 1000) == pytest.approx(0.02 + 0.02 + 0.012)


def test_nothing_left_to_compute_costs_nothing() -> None:
    speed = SpeedFigures(0.01, 0.001, 0.02)
    assert speed.prefill_s(0) == 0.0
    assert speed.prefill_s(-5) == 0.0


def test_a_transfer_waits_behind_what_is_under_way() -> None:
    path = PathFigures(0.002, 1e9)
    assert path.transfer_s(0, 0) == 0.002
    assert path.transfer_s(500_000_000, 0) == pytest.approx(0.502)
    assert path.transfer_s(500_000_000, 1_000_000_000) == pytest.approx(1.502)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0])
def test_a_path_of_unknown_bandwidth_has_no_cost(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="bandwidth_bytes_per_s"):
        PathFigures(0.002, bandwidth).transfer_s(1, 0)
