"""What single paths carry: what makes one slow, and that it is tried again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.core import bandwidths
from pdcoord.core.bandwidths import STALE_S, PathBandwidths
from pdcoord.core.costs import PathFigures
from pdcoord.core.fleet import EndpointId
from pdcoord.core.paths import PathTable

A, B, C = EndpointId("a"), EndpointId("b"), EndpointId("c")
SEEDED = 1e10
FIGURES = PathFigures(0.002, SEEDED, 0.1)


def note(table: PathTable, bytes_per_s: float, count: int, now_s: float = 0.0) -> None:
    for _ in range(count):
        table.note_transfer((A, B), bytes_per_s, seeded_bytes_per_s=SEEDED, bytes_per_s_min=1e9, now_s=now_s)
        table.validate({A, B, C}, ())


def test_one_slow_transfer_shuts_no_path() -> None:
    table = PathTable()
    note(table, 1e7, 1)
    assert A not in table.troubled
    assert table.figures(A, B, FIGURES, 0.0).bandwidth_bytes_per_s > 0.7 * SEEDED


def test_delays_that_may_be_others_shut_no_path_whose_links_are_hardly_enough() -> None:
    table = PathTable()
    for _ in range(50):
        table.note_transfer((A, B), 6e9, seeded_bytes_per_s=SEEDED, bytes_per_s_min=9.5e9, now_s=0.0)
    assert table.figures(A, B, FIGURES, 1.0).bandwidth_bytes_per_s >= 9.5e9
    assert A not in table.troubled


def test_a_path_that_stays_slow_is_no_twin_and_costs_what_it_carries() -> None:
    table = PathTable()
    note(table, 5e8, 40)
    assert A in table.troubled
    assert B in table.troubled
    assert C not in table.troubled
    found = table.figures(A, B, FIGURES, 1.0)
    assert found.bandwidth_bytes_per_s == pytest.approx(5e8, rel=0.1)
    assert (found.latency_s, found.spread_share) == (0.002, 0.1)
    assert table.figures(A, C, FIGURES, 1.0) == FIGURES
    assert table.lets_pass(A, B, 1.0)


def test_a_good_path_costs_a_decision_nothing() -> None:
    table = PathTable()
    note(table, SEEDED, 10)
    assert not table.has_measured
    assert table.figures(A, B, FIGURES, 1.0) == FIGURES


def test_a_slow_path_is_tried_again_after_a_while_and_then_believed() -> None:
    table = PathTable()
    note(table, 5e8, 40)
    later_s = STALE_S + 1.0
    assert table.figures(A, B, FIGURES, later_s) == FIGURES
    note(table, SEEDED, 1, later_s)
    assert A not in table.troubled
    assert table.figures(A, B, FIGURES, later_s) == FIGURES


def test_a_path_that_recovers_is_good_at_once() -> None:
    table = PathTable()
    note(table, 5e8, 40)
    note(table, SEEDED, 6)
    assert A not in table.troubled


def test_an_endpoint_that_is_gone_takes_its_paths_along() -> None:
    table = PathTable()
    note(table, 5e8, 40)
    table.forget(B)
    assert A not in table.troubled
    assert not table.has_measured
    table.validate({A}, ())


def test_few_paths_are_remembered_and_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidths, "PATHS_MAX", 3)
    table = PathTable()
    ends = [EndpointId(f"e{index}") for index in range(10)]
    for end in ends:
        for _ in range(20):
            table.note_transfer((A, end), 5e8, seeded_bytes_per_s=SEEDED, bytes_per_s_min=1e9, now_s=0.0)
        table.validate({A, *ends}, ())
    assert ends[0] not in table.troubled
    assert ends[9] in table.troubled


names = st.sampled_from([A, B, C])


@given(
    st.lists(st.tuples(names, names, st.floats(1e-3, 1e15), st.floats(0, 50)), max_size=60),
    st.lists(names, max_size=2),
)
def test_no_order_of_events_loses_count(
    told: list[tuple[EndpointId, EndpointId, float, float]], gone: list[EndpointId]
) -> None:
    table, kept, now_s = PathTable(), PathBandwidths(), 0.0
    for prefill, decode, bytes_per_s, passed_s in told:
        now_s += passed_s
        path = (prefill, decode)
        table.note_transfer(path, bytes_per_s, seeded_bytes_per_s=SEEDED, bytes_per_s_min=0.0, now_s=now_s)
        kept.learn(path, bytes_per_s, seeded=SEEDED, bytes_per_s_min=0.0, now_s=now_s)
        table.validate({A, B, C}, ())
        kept.validate({A, B, C})
        assert 1.0 <= table.figures(*path, FIGURES, now_s).bandwidth_bytes_per_s <= SEEDED
    for endpoint_id in gone:
        table.forget(endpoint_id)
        table.validate({A, B, C}, ())
