import pytest

from pdcoord.sim.routers.llmdscorers import (
    AffinityFilter,
    SaturationDetector,
    active_request_scores,
    kv_scores,
    no_hit_lru_scores,
    prefix_scores,
    queue_scores,
    token_load_scores,
)


def test_prefix_is_the_share_of_blocks() -> None:
    assert prefix_scores([0, 3, 4], 4) == [0.0, 0.75, 1.0]
    assert prefix_scores([0, 0], 0) == [0.0, 0.0]


def test_queue_is_min_max_inverted() -> None:
    assert queue_scores([2, 4, 10]) == [1.0, 0.75, 0.0]
    assert queue_scores([7, 7]) == [1.0, 1.0]


def test_kv_is_what_is_free_and_absurd_usage_is_clamped() -> None:
    assert kv_scores([0.25, 1.0, 1.5, -1.0]) == [0.75, 0.0, 0.0, 1.0]


def test_active_requests_are_scaled_by_the_busiest() -> None:
    assert active_request_scores([0, 1, 4]) == [1.0, 0.75, 0.0]
    assert active_request_scores([2, 1, 4], idle_max=1, busy_score_max=0.5) == [0.25, 1.0, 0.0]
    assert active_request_scores([0, 0]) == [1.0, 1.0]


def test_token_load_is_absolute() -> None:
    assert token_load_scores([0, 1_048_576, 4_194_304, 9_000_000]) == [1.0, 0.75, 0.0, 0.0]


def test_cold_calls_go_to_whom_they_went_least_recently() -> None:
    assert no_hit_lru_scores([2, 0, 1], is_cold=True) == [0.0, 1.0, 0.5]
    assert no_hit_lru_scores([2, 0, 1], is_cold=False) == [0.5, 0.5, 0.5]
    assert no_hit_lru_scores([0], is_cold=True) == [1.0]


@pytest.mark.parametrize(
    ("matches", "tokens", "kept"),
    [
        ([0.9, 0.8, 0.7], [0, 0, 0], [10, 11]),
        ([0.5, 0.7, 0.0], [0, 0, 0], [10, 11, 12]),
        # 18 s at 15,928 tokens/s are 286,704 tokens more than on the idle one.
        ([1.0, 0.0, 0.0], [286_704, 0, 5_000], [10]),
        ([1.0, 0.0, 0.0], [286_705, 0, 5_000], [10, 11, 12]),
        ([1.0, 1.0, 0.0], [286_705, 0, 5_000], [10, 11]),
        ([1.0, 1.0, 1.0], [999_999, 0, 0], [10, 11, 12]),
    ],
)
def test_affinity_keeps_the_holders_unless_they_are_far_busier(
    matches: list[float], tokens: list[int], kept: list[int]
) -> None:
    assert AffinityFilter()([10, 11, 12], matches, tokens) == kept


def test_affinity_at_any_price() -> None:
    assert AffinityFilter(ttft_penalty_s_max=0.0)([10, 11], [1.0, 0.0], [10**9, 0]) == [10]


def test_saturation_is_a_plain_mean_of_the_worse_signal() -> None:
    detector = SaturationDetector()
    assert detector.saturation([5, 0], [0.0, 0.4]) == pytest.approx(0.75)
    assert detector.saturation([], []) == 1.0
