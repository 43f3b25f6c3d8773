"""What one probe says: whether it counts, for how long, and how slow is slow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core.costs import PathFigures
from pdcoord.core.probes import SLOW_SHARE, STALE_INTERVALS, Probe
from transfer.errors import FailureKind

rates = st.floats(0.0, 1e12)


def probe(**more: object) -> Probe:
    return Probe(at_s=100.0, interval_s=10.0, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(FailureKind))
def test_every_failure_is_a_fault_and_some_tell_nothing_of_the_path(kind: FailureKind) -> None:
    assert probe(failure=kind).fault == kind
    is_overload = kind in {"overloaded", "staging-full", "staging-timeout", "cancelled", "closed"}
    assert probe(failure=kind).tells_nothing is is_overload


@pytest.mark.parametrize(
    ("verdict", "fault"),
    [("", ""), ("native", ""), ("regroup", ""), ("convert", ""), ("impossible", "impossible")],
)
def test_an_impossible_verdict_is_a_fault(verdict: str, fault: str) -> None:
    assert probe(verdict=verdict).fault == fault
    assert not probe(verdict=verdict).tells_nothing


def test_a_probe_is_fresh_for_some_intervals() -> None:
    assert probe().is_fresh(100.0 + 10.0 * STALE_INTERVALS - 0.001)
    assert not probe().is_fresh(100.0 + 10.0 * STALE_INTERVALS)


@given(measured=st.none() | rates, seeded=rates, least=rates)
def test_slow_is_far_below_the_links_or_below_what_is_used(
    measured: float | None, seeded: float, least: float
) -> None:
    is_slow = probe(bandwidth_bytes_per_s=measured).is_slow(seeded, least)
    if measured is None or measured >= seeded:
        assert not is_slow
    else:
        assert is_slow == (measured < SLOW_SHARE * seeded or measured < least)


@given(bandwidth=st.none() | rates, latency=st.none() | st.floats(0.0, 10.0))
def test_figures_are_capped_never_bettered(bandwidth: float | None, latency: float | None) -> None:
    seeded = PathFigures(0.002, 1e10)
    capped = probe(bandwidth_bytes_per_s=bandwidth, latency_s=latency).cap(seeded)
    assert capped.latency_s == max(0.002, latency or 0.0)
    assert capped.bandwidth_bytes_per_s == (1e10 if bandwidth is None else min(1e10, bandwidth))
