"""A climb ends when the best has been seen, or when its trace ends."""

import pytest

from benchmarks.policies.climb import STEPS_MAX, Climb
from benchmarks.policies.jobs import Done, Job


def figure(done: Done) -> float:
    return float(done.summary["figure"])


def rates_of(found: list[float], workload: str = "chat", seconds: float = 20.0) -> list[float]:
    """The rates that are tried when goodput is as given, from 1 and by doubling."""
    climb = Climb(Job("ABC", "llama", "llm-d", workload, 1.0, 0, seconds), 2.0)
    rates: list[float] = []
    while (rate := climb.next_rate(figure)) is not None:
        rates.append(rate)
        value = found[len(climb.done)]
        climb.done.append(
            Done(Job("ABC", "llama", "llm-d", workload, rate, 0, seconds), {"figure": value}, 0.0)
        )
    return rates


@pytest.mark.parametrize(
    ("found", "tried"),
    [
        ([1, 2, 4, 3, 3, 9], 5),  # two rates that were worse
        ([1, 2, 4, 1.9, 9], 4),  # one that was less than half
        ([1, 2, 4, 3, 5, 4, 4, 9], 7),  # one that was worse, then a better one
        ([4, 4.01, 4.02, 9], 3),  # gains within noise are none
        ([0, 0, 0, 1, 0.9, 0.8, 9], 6),  # nothing at first is no decline
    ],
)
def test_where_a_climb_ends(found: list[float], tried: int) -> None:
    assert rates_of(found) == [2.0**index for index in range(tried)]


def test_a_climb_that_never_declines_is_bounded() -> None:
    assert len(rates_of([2.0**index for index in range(40)])) == STEPS_MAX


def test_a_trace_is_not_speeded_up_past_its_end() -> None:
    rising = [float(index) for index in range(1, 40)]
    assert rates_of(rising, "azure", 20.0) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert rates_of(rising, "azure", 400.0) == [1, 2, 4, 8]
