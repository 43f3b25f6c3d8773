"""Whole deployments in virtual time, each from a seed: pods die, links break, pods drain, clients leave."""

import os
from dataclasses import replace

import pytest

from pdcoord.core.events import Outcome
from pdcoord.core.fleet import Role
from pdcoord.core.model import LegOrder
from pdcoord.protocol.errors import RefuseReason
from pdcoord.protocol.plans import Mode
from pdcoord.sim.scenario import Fault, FaultKind, draw
from pdcoord.sim.simulation import Result, Simulation

SEED_COUNT = int(os.environ.get("PDCOORD_SIMULATION_SEEDS", "40"))


def run(seed: int) -> Result:
    return Simulation(draw(seed)).run()


@pytest.mark.parametrize("seed", range(SEED_COUNT))
def test_every_request_ends_once_and_nothing_is_left_behind(seed: int) -> None:
    """The simulation itself checks, at each event: plans, accounts, answers' tokens, KV blocks."""
    scenario = draw(seed)
    result = Simulation(scenario).run()
    assert sum(result.outcomes.values()) == len(scenario.arrivals), f"replay: draw({seed})"


@pytest.mark.parametrize("seed", range(max(SEED_COUNT // 2, 1)))
def test_so_does_every_request_whose_legs_go_at_once(seed: int) -> None:
    scenario = draw(seed)
    rules = replace(scenario.model.disaggregation, order=LegOrder.CONCURRENT)
    scenario = replace(scenario, model=replace(scenario.model, disaggregation=rules))
    result = Simulation(scenario).run()
    assert sum(result.outcomes.values()) == len(scenario.arrivals), f"replay: draw({seed}), concurrent"


@pytest.mark.parametrize("seed", range(max(SEED_COUNT // 4, 1)))
def test_so_do_long_streams_that_are_struck_in_their_middle(seed: int) -> None:
    scenario = draw(seed, request_count=30, output_tokens_max=120)
    result = Simulation(scenario).run()
    assert sum(result.outcomes.values()) == len(scenario.arrivals), f"replay: draw({seed}), long"


@pytest.mark.parametrize("is_resumed_by_sidecar", [False, True])
@pytest.mark.parametrize("seed", [1, 3])
def test_streams_go_on_elsewhere_when_their_engines_die(seed: int, is_resumed_by_sidecar: bool) -> None:
    scenario = draw(seed, request_count=30, output_tokens_max=300)
    engines = [endpoint.id for endpoint in scenario.endpoints if endpoint.pool.role is not Role.PREFILL]
    faults = tuple(Fault(1.0 + 0.6 * at, FaultKind.KILL, each, None, 0.5) for at, each in enumerate(engines))
    scenario = replace(scenario, faults=faults, is_resumed_by_sidecar=is_resumed_by_sidecar)
    result = Simulation(scenario).run()
    assert sum(result.outcomes.values()) == len(scenario.arrivals)
    assert result.resumed_count >= 4, result


def test_the_seeds_reach_every_kind_of_trouble() -> None:
    assert {fault.kind for seed in range(8) for fault in draw(seed).faults} == set(FaultKind)


@pytest.mark.parametrize("seed", [3, 18])
def test_a_seed_gives_the_same_run_again(seed: int) -> None:
    assert run(seed) == run(seed)


def test_the_seeds_reach_what_they_are_for() -> None:
    """Among the first seeds there is every mode, most fallbacks, refusals and broken streams."""
    results = [run(seed) for seed in range(20)]
    modes = {mode for result in results for mode in result.modes}
    outcomes = {outcome for result in results for outcome in result.outcomes}
    reasons = {reason for result in results for reason in result.rungs}
    assert modes == set(Mode)
    assert {Outcome.OK, Outcome.CLIENT_GONE, Outcome.REFUSED, Outcome.UPSTREAM_ERROR} <= outcomes
    assert len(reasons) >= 5, reasons
    refusals = {reason for result in results for reason in result.refusals}
    shed = {RefuseReason.QUEUE_FULL, RefuseReason.WAITED_TOO_LONG, RefuseReason.DEADLINE, RefuseReason.SHED}
    assert shed <= refusals, refusals
    assert sum(result.wait_count for result in results) >= 50
