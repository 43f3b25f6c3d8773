"""A decode engine whose pulls fail and that says nothing of it: its counters shut the path."""

from dataclasses import replace

from pdcoord.core.fleet import Role
from pdcoord.core.model import Disaggregation, Fallback, Model, Slo, SplitMode
from pdcoord.core.paths import BreakerState
from pdcoord.sim.scenario import Arrival, Fault, FaultKind, Scenario, draw
from pdcoord.sim.settings import LoadFailurePolicy
from pdcoord.sim.simulation import Simulation

CUT_S, END_S = 2.0, 20.0


def scenario() -> Scenario:
    """One prefill and one decode endpoint whose connectors fit; requests of 900 tokens all the time."""
    for seed in range(200):
        drawn = draw(seed)
        ends = [
            next((e for e in drawn.endpoints if e.pool.role is role and e.pool.engine == "vllm"), None)
            for role in (Role.PREFILL, Role.DECODE)
        ]
        prefill, decode = ends
        if prefill and decode and prefill.pool.side == decode.pool.side:
            break
    settings = {
        end.id: replace(
            drawn.settings[end.id],
            load_failure_policy=LoadFailurePolicy.RECOMPUTE,
            handshake_s=0.01,
            running_max=64,
            queued_max=64,
            # Nobody tells the producer that its KV will not be fetched: it keeps it until the lease ends.
            block_total=4_096,
            lease_s=2.0,
        )
        for end in (prefill, decode)
    }
    model = Model(
        name=drawn.model.name,
        pools=(prefill.pool, decode.pool),
        disaggregation=Disaggregation(
            mode=SplitMode.ALWAYS, uncached_tokens_min=0, prefill_deadline_s=2.0, transfer_deadline_s=5.0
        ),
        fallback=Fallback(),
        slo=Slo(),
        prefix_block_tokens=32,
    )
    count = int((END_S - 0.5) / 0.25)
    arrivals = tuple(
        Arrival(
            at_s=0.5 + 0.25 * index,
            prompt=tuple((index + place) % 256 for place in range(900)),
            output_tokens=2,
            choice_count=1,
            leaves_after_s=None,
        )
        for index in range(count)
    )
    cut = Fault(at_s=CUT_S, kind=FaultKind.CUT_KV, endpoint=prefill.id, other=decode.id, ends_after_s=None)
    return Scenario(1, model, (prefill, decode), settings, arrivals, (cut,))


def test_a_path_whose_pulls_fail_silently_is_shut_and_tried_ever_less() -> None:
    simulation = Simulation(scenario())
    prefill, decode = simulation.scenario.endpoints
    simulation.run()
    paths = simulation.coordinator.paths
    assert paths.state(prefill.id, decode.id, simulation.loop.now_s) is not BreakerState.CLOSED
    assert simulation.result.rungs == {}
    split, together = (simulation.result.modes[mode] for mode in ("split", "colocated"))
    # Six before the cut, three until it is noticed, then one for each time the path is tried.
    assert split < 25, simulation.result
    assert together > 40
