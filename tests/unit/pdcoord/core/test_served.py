"""What a sidecar's report says for and against paths."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from pdcoord.core.fleet import Endpoint, EndpointSeen, Fleet
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Plan
from pdcoord.core.served import PathEvidence, target_of
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.errors import RungReason
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, RungKind, RungTaken, ServedHeader


@pytest.fixture
def split(plan: Callable[..., Plan]) -> Plan:
    return plan("r", is_split=True)


def evidence(split: Plan, *missing: Endpoint) -> tuple[PathEvidence, PathTable]:
    fleet, paths = Fleet(), PathTable()
    endpoints = [split.decode, split.prefill, *(rung.prefill for rung in split.rungs)]
    for endpoint in {each.id: each for each in endpoints if each is not None}.values():
        if endpoint not in missing:
            fleet.handle(EndpointSeen(endpoint))
    return PathEvidence(fleet, paths, SilentFailures()), paths


def gave_up(target: HostPort) -> ServedHeader:
    rung = RungTaken(rung=RungKind.COLOCATED, reason=RungReason.PREFILL_UNREACHABLE, target=target)
    return ServedHeader(mode=Mode.COLOCATED, rungs=(rung,))


def test_a_target_is_found_by_its_address(split: Plan) -> None:
    assert split.prefill is not None
    assert target_of(split, split.prefill.address) == split.prefill
    assert target_of(split, HostPort("elsewhere:1")) is None


def test_a_path_that_was_given_up_is_held_against_it(split: Plan) -> None:
    assert split.prefill is not None
    found, paths = evidence(split)
    paths.begin(split.prefill.id, split.decode.id, split.request_id)
    found.take(split, gave_up(split.prefill.address), 0.0)
    assert paths.breaker_count == 1


def test_a_path_of_which_nobody_tells_is_neither_praised_nor_blamed(split: Plan) -> None:
    assert split.prefill is not None
    found, paths = evidence(split)
    paths.begin(split.prefill.id, split.decode.id, split.request_id)
    found.take(split, None, 0.0)
    assert paths.breaker_count == 0


def test_who_is_gone_or_another_process_by_now_is_not_judged(split: Plan) -> None:
    assert split.prefill is not None
    for missing in (split.decode, split.prefill):
        found, paths = evidence(split, missing)
        assert found.state_of(missing) is None
        found.take(split, gave_up(split.prefill.address), 0.0)
        assert paths.breaker_count == 0
    other = replace(split.decode, address=HostPort("another:80"))
    assert evidence(split)[0].state_of(other) is None
