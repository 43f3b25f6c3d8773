from collections.abc import Callable
from dataclasses import replace

import pytest

from pdcoord.sim.study.differences import changes, differences, totals
from pdcoord.sim.study.lines import encode_result
from pdcoord.sim.study.results import CallResult, Fate
from pdcoord.sim.study.trafficlog import read_traffic

MakeResult = Callable[..., CallResult]


def test_a_replay_is_compared_request_by_request(make_result: MakeResult) -> None:
    before = [make_result(number) for number in range(4)]
    log = read_traffic(b"\n".join(map(encode_result, before)))
    after = [
        before[0],
        replace(before[1], prefill="p/1", decode="d/3"),
        replace(before[2], prefill="d/0", decode="d/0", why="colocated-faster", first_s=2.5),
        replace(before[3], fate=Fate.SHED, first_s=None, prefill="", decode="", why="full"),
    ]
    found = differences(log.recorded, reversed(after))
    assert [each.is_changed for each in found] == [False, False, True, True]
    assert found[2].gained_s == pytest.approx(0.5)
    assert found[3].gained_s is None
    listed = [(change.before, change.after, change.why, change.count) for change in changes(found)]
    assert listed == [("p -> d", "- (shed)", "full", 1), ("p -> d", "d", "colocated-faster", 1)]


def test_totals_are_of_each_side(make_result: MakeResult) -> None:
    before = [make_result(number, cached_tokens=100) for number in range(4)]
    log = read_traffic(b"\n".join(map(encode_result, before)))
    found = differences(log.recorded, [replace(result, prefill="d/0", first_s=None) for result in before[:3]])
    assert len(found) == 3, "a call without a result is left out"
    old, new = totals([each.before for each in found]), totals([each.after for each in found])
    assert (old.split, new.split) == (3, 0)
    assert (old.ttft.count, new.ttft.count) == (3, 0)
    assert old.cached_tokens == 300
    assert old.fates == {"ok": 3}
