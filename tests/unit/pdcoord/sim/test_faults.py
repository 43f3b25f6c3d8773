"""Failures that can be switched on."""

import json
from random import Random
from typing import Any

import pytest

from pdcoord.sim.faults import FaultKind, FaultsBodyError, FaultSet, parse_faults


def fault_set(*faults: dict[str, Any], now_s: float = 0.0, seed: int = 1) -> FaultSet:
    made = FaultSet(Random(seed))
    made.replace(parse_faults(json.dumps({"faults": faults}).encode()), now_s)
    return made


def test_a_failure_strikes_always_unless_it_says_otherwise() -> None:
    faults = fault_set({"kind": "stall"})
    assert all(faults.strike(FaultKind.STALL, 0.0) for _ in range(10))
    assert faults.strike(FaultKind.ERROR, 0.0) is None


def test_a_count_is_used_up() -> None:
    faults = fault_set({"kind": "error", "count": 2, "status": 503})
    struck = [faults.strike(FaultKind.ERROR, 0.0) for _ in range(4)]
    assert [each.status if each else None for each in struck] == [503, 503, None, None]
    assert faults.state(0.0) == []


def test_a_probability_is_drawn_from_the_seed() -> None:
    def story(seed: int) -> list[bool]:
        faults = fault_set({"kind": "reset", "probability": 0.3}, seed=seed)
        return [faults.strike(FaultKind.RESET, 0.0) is not None for _ in range(200)]

    assert story(1) == story(1) != story(2)
    assert 30 < sum(story(1)) < 90


def test_a_duration_ends() -> None:
    faults = fault_set({"kind": "refuse", "duration_s": 5.0}, {"kind": "stall"}, now_s=10.0)
    assert faults.next_end_s(10.0) == 15.0
    assert faults.active(FaultKind.REFUSE, 14.9) is not None
    assert faults.active(FaultKind.REFUSE, 15.0) is None
    assert faults.next_end_s(15.0) is None
    assert [each["kind"] for each in faults.state(20.0)] == ["stall"]


def test_a_new_set_takes_the_place_of_the_old() -> None:
    faults = fault_set({"kind": "stall"})
    faults.replace(parse_faults(b'{"faults": [{"kind": "lost_ticket"}]}'), 0.0)
    assert faults.active(FaultKind.STALL, 0.0) is None
    assert faults.active(FaultKind.LOST_TICKET, 0.0) is not None


def test_the_state_is_what_was_given_and_what_came_of_it() -> None:
    faults = fault_set({"kind": "reset", "after_tokens": 4, "count": 3, "duration_s": 9.0})
    faults.strike(FaultKind.RESET, 1.0)
    assert faults.state(1.0) == [
        {"kind": "reset", "after_tokens": 4, "count": 3, "duration_s": 9.0, "befallen": 1, "ends_in_s": 8.0}
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "not JSON"),
        ("[]", "mapping"),
        ('{"faults": [], "extra": 1}', "extra: is not a known key"),
        ('{"faults": [{"kind": "explode"}]}', "faults[0].kind"),
        ('{"faults": [{"kind": "error", "status": 99}]}', "from 400 to 599"),
        ('{"faults": [{"kind": "error", "probability": 2}]}', "faults[0].probability"),
        ('{"faults": [{"kind": "crash", "probability": 0.5}]}', "no meaning with kind crash"),
        ('{"faults": [{"kind": "slow_link"}]}', "factor: is missing"),
        ('{"faults": [{"kind": "slow"}]}', "factor: is missing"),
        ('{"faults": [{"kind": "lying_metrics", "count": 2}]}', "no meaning with kind lying_metrics"),
        ('{"faults": [{"kind": "stall"}, {"kind": "stall"}]}', "in the list already"),
        ('{"faults": [' + ",".join(['{"kind": "stall"}'] * 65) + "]}", "faults: is a list of 65"),
    ],
)
def test_a_body_that_is_refused_names_the_key_and_the_remedy(body: str, message: str) -> None:
    with pytest.raises(FaultsBodyError) as caught:
        parse_faults(body.encode())
    assert message in str(caught.value)
    assert "body" not in str(caught.value) or message == "not JSON"


def test_a_stall_comes_before_the_answer_unless_it_says_after_how_many_tokens() -> None:
    stall, reset = (fault_set({"kind": kind}).active(FaultKind(kind), 0.0) for kind in ("stall", "reset"))
    late = fault_set({"kind": "stall", "after_tokens": 0}).active(FaultKind.STALL, 0.0)
    assert [each and each.is_before_answer for each in (stall, reset, late)] == [True, False, False]


def test_what_is_left_of_a_speed() -> None:
    faults = fault_set({"kind": "slow", "factor": 0.25, "duration_s": 5.0})
    assert faults.factor(FaultKind.SLOW, 4.9) == 0.25
    assert faults.factor(FaultKind.SLOW, 5.0) == 1.0
    assert faults.factor(FaultKind.SLOW_LINK, 0.0) == 1.0
