"""Decisions as JSON: predictions in milliseconds, endpoints by their ids, nothing that says nothing."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from pdcoord.core.plan import DropReason, Plan
from pdcoord.gateway.decisionviews import FiguresView, candidate_view, drop_counts, planned_rungs


def test_seconds_are_milliseconds_and_the_rest_is_as_it_is(plan: Callable[..., Plan]) -> None:
    chosen = plan("r", is_split=True).chosen
    shown = msgspec.structs.asdict(candidate_view(chosen).figures)
    for field in msgspec.structs.fields(FiguresView):
        name = field.name
        if name.endswith("_ms"):
            seconds = getattr(chosen.figures, name.removesuffix("_ms") + "_s")
            assert shown[name] == pytest.approx(seconds * 1e3), name
        else:
            assert shown[name] == getattr(chosen.figures, name), name


def test_a_candidate_is_named_by_its_endpoints_and_verdict(plan: Callable[..., Plan]) -> None:
    split, alone = (candidate_view(plan("r", is_split=is_split).chosen) for is_split in (True, False))
    assert (split.mode, split.prefill, split.decode) == ("split", "p/p0", "d/10.0.0.2")
    assert (split.verdict, split.verdict_reason) == ("native", "layouts are equal")
    assert (alone.mode, alone.prefill, alone.verdict, alone.verdict_reason) == ("colocated", None, None, None)


def test_rungs_are_told_in_their_order_with_whom_they_would_ask(plan: Callable[..., Plan]) -> None:
    rungs = planned_rungs(plan("r", is_split=True))
    assert [(rung.rung, rung.target) for rung in rungs] == [("other-prefill", "p/p1"), ("colocated", None)]


def test_drops_are_told_most_frequent_first_and_none_that_dropped_nothing(plan: Callable[..., Plan]) -> None:
    drops = {DropReason.DRAINING: 1, DropReason.AT_LIMIT: 0, DropReason.NOT_READY: 7}
    found = drop_counts(replace(plan("r"), drops=drops))
    assert list(found.items()) == [("not-ready", 7), ("draining", 1)]
