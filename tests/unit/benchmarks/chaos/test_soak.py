"""What counts as flat."""

import random

from benchmarks.chaos.soak import Series

MIB = float(1 << 20)


def series(figure: str, slope: float, noise: float = 0.0, start: float = 0.0) -> Series:
    rng = random.Random(1)
    points = [(t * 2.0, start + slope * t * 2.0 + rng.uniform(-noise, noise)) for t in range(450)]
    return Series(figure, points)


def is_flat(made: Series) -> bool:
    found = made.rise()
    assert found is not None
    return found[0] <= found[1]


def test_memory_may_wander_and_not_climb() -> None:
    assert is_flat(series("rss_bytes", 0.0, noise=5 * MIB, start=100 * MIB))
    assert not is_flat(series("rss_bytes", 0.05 * MIB, noise=2 * MIB, start=100 * MIB))
    assert is_flat(series("rss_bytes", -0.05 * MIB, start=100 * MIB))


def test_a_climb_before_the_warm_up_is_over_does_not_count() -> None:
    made = series("rss_bytes", 0.0, start=150 * MIB)
    made.points[:100] = [(t, 50 * MIB + i * MIB) for i, (t, _) in enumerate(made.points[:100])]
    assert is_flat(made)


def test_leases_that_pile_up_are_found() -> None:
    assert is_flat(series("leases", 0.0, noise=3.0, start=4.0))
    assert not is_flat(series("leases", 0.05, noise=1.0))


def test_tasks_that_nobody_ends_are_found() -> None:
    assert is_flat(series("tasks", 0.0, noise=10.0, start=20.0))
    assert not is_flat(series("tasks", 0.05, noise=10.0, start=20.0))


def test_a_short_life_tells_nothing() -> None:
    assert Series("threads", [(t * 2.0, 5.0) for t in range(20)]).rise() is None
