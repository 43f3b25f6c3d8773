"""Whose turn it is to be scraped."""

import pytest

from pdcoord.core.fleet import EndpointId
from pdcoord.feeds.scrapes import Round, ScrapeFailure, ScrapeLimits, failure_of
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.errors import (
    BodyTooLargeError,
    ConnectError,
    HeadTimeoutError,
    ResetError,
    StalledError,
    WireError,
)

LIMITS = ScrapeLimits(interval_s=1.0, backoff_s_max=6.0)
A, B = (EndpointId("a"), HostPort("a:1")), (EndpointId("b"), HostPort("b:1"))


@pytest.mark.parametrize(
    ("failures", "pause_s"), [(0, 1.0), (1, 2.0), (2, 4.0), (3, 6.0), (4, 6.0), (10**6, 6.0)]
)
def test_who_fails_is_asked_half_as_often_each_time_down_to_a_bound(failures: int, pause_s: float) -> None:
    assert LIMITS.pause_s(failures) == pause_s


def test_the_bound_is_never_below_the_interval() -> None:
    assert ScrapeLimits(interval_s=1.0, backoff_s_max=0.5).pause_s(3) == 1.0


def test_each_is_asked_once_an_interval_and_never_twice_at_a_time() -> None:
    turns = Round(LIMITS)
    turns.sync([A, B], 0.0)
    one, two = turns.take_due(0.0)
    assert turns.take_due(9.0) == []
    assert turns.done(one, 0.0, is_failure=False)
    assert turns.take_due(0.9) == []
    assert turns.take_due(1.0) == [one]
    assert turns.done(two, 0.0, is_failure=True)
    assert turns.take_due(1.9) == []
    assert turns.take_due(2.0) == [two]


def test_who_is_gone_or_moved_is_not_told_of() -> None:
    turns = Round(LIMITS)
    turns.sync([A, B], 0.0)
    gone, moved = turns.take_due(0.0)
    turns.sync([(B[0], HostPort("b:2"))], 0.5)
    assert not turns.done(gone, 0.0, is_failure=False)
    assert not turns.done(moved, 0.0, is_failure=False)
    (anew,) = turns.take_due(0.5)
    assert anew.address == "b:2"


def test_the_wait_is_between_a_tenth_of_an_interval_and_a_whole_one() -> None:
    turns = Round(LIMITS)
    assert turns.wait_s(0.0) == 1.0
    turns.sync([A], 0.0)
    assert turns.wait_s(0.0) == 0.1
    (target,) = turns.take_due(0.0)
    turns.done(target, 0.0, is_failure=False)
    assert turns.wait_s(0.5) == 0.5
    target.due_s = 50.0
    assert turns.wait_s(0.5) == 1.0


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (TimeoutError(), ScrapeFailure.TIMEOUT),
        (HeadTimeoutError("slow"), ScrapeFailure.TIMEOUT),
        (ConnectError("refused"), ScrapeFailure.UNREACHABLE),
        (BodyTooLargeError("long"), ScrapeFailure.TOO_LARGE),
        (ResetError("gone"), ScrapeFailure.BROKEN),
        (StalledError("silent"), ScrapeFailure.BROKEN),
    ],
)
def test_a_failure_is_named_by_how_far_the_request_came(
    error: TimeoutError | WireError, failure: ScrapeFailure
) -> None:
    assert failure_of(error) is failure
