"""Every expected end comes out once, whatever comes in."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from transfer.agent_state import Counters, Outcomes, Results
from transfer.backends.base import Region
from transfer.errors import Failure, FailureKind
from transfer.session.vocabulary import Report

STEPS = st.tuples(
    st.sampled_from(["open", "load", "free", "report", "drain", "close"]), st.sampled_from(["a", "b", "c"])
)


@given(st.lists(STEPS, max_size=40))
def test_each_request_ends_once_for_each_time_it_began(steps: list[tuple[str, str]]) -> None:
    results = Results()
    begun: dict[str, set[str]] = {"open": set(), "load": set()}
    told: list[Outcomes] = []
    expected_free: list[str] = []
    expected_reports: list[str] = []
    for step, name in steps:
        if step in begun:
            if name in begun[step]:
                continue
            (results.expect_blocks if step == "open" else results.expect_report)(name)
            begun[step].add(name)
            (expected_free if step == "open" else expected_reports).append(name)
        elif step == "free":
            results.free(name)
        elif step == "report":
            results.report(Report(name, None, 1))
        elif step == "drain":
            told.append(results.drain())
        else:
            results.close()
    results.close()
    told.append(results.drain())
    assert results.drain() == Outcomes()
    assert sorted(name for each in told for name in each.free_blocks) == sorted(expected_free)
    assert sorted(report.request for each in told for report in each.reports) == sorted(expected_reports)


def test_what_comes_after_the_end_is_told_as_closed() -> None:
    results = Results()
    assert results.wait_closed(0.0) is False
    results.close()
    assert results.wait_closed(0.0) is True
    results.expect_report("late")
    results.expect_blocks("blocks")
    [report] = (told := results.drain()).reports
    assert report.failure is not None
    assert report.failure.kind is FailureKind.CLOSED
    assert told.free_blocks == ("blocks",)


def test_counters_add_up_over_threads() -> None:
    counters = Counters()

    def count() -> None:
        for _ in range(200):
            counters.packed(10, 0.5)
            counters.read(7, 0.25)
            counters.unpacked(3, 0.125)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counters.loaded(Report("a", None, 5))
    counters.loaded(Report("b", Failure(FailureKind.PEER_LOST), 0))
    counters.ended(None)
    counters.ended(Failure(FailureKind.LEASE_EXPIRED))
    stats = counters.stats(11, Region(0, 99))
    assert (stats.packed_bytes, stats.read_bytes, stats.unpacked_bytes) == (6_000, 4_200, 1_800)
    assert (stats.pack_s, stats.read_s, stats.unpack_s) == (300.0, 150.0, 75.0)
    assert (stats.loads, stats.loaded_bytes, stats.load_failures) == (2, 5, {"peer-lost": 1})
    assert (stats.offers, stats.offer_failures) == (2, {"lease-expired": 1})
    assert (stats.staging_used_bytes, stats.staging_bytes) == (11, 99)
