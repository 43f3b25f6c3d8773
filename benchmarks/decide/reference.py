"""What the choice is measured beside: taking turns, and weighing every pair one by one."""

from itertools import cycle, product

from benchmarks.decide.fleet import BenchFleet
from pdcoord.core.fleet import EndpointId
from pdcoord.core.objective import Objective, Rank
from pdcoord.core.request import Request
from pdcoord.core.speed import SeededSpeed


class RoundRobin:
    """The next healthy endpoint of each role: the least that a router can do."""

    def __init__(self, fleet: BenchFleet) -> None:
        names = [endpoint.id for endpoint in fleet.endpoints]
        self._fleet = fleet.coordinator.fleet
        self._prefills = cycle([name for name in names if name.startswith("prefill")])
        self._decodes = cycle([name for name in names if name.startswith("decode")])

    def pick(self) -> tuple[EndpointId, EndpointId]:
        return self._next(self._prefills), self._next(self._decodes)

    def _next(self, turns: "cycle[EndpointId]") -> EndpointId:
        for name in turns:
            state = self._fleet.get(name)
            if state is not None and state.is_eligible:
                return name
        raise RuntimeError("no healthy endpoint")


def best_of_all_pairs(fleet: BenchFleet, request: Request) -> tuple[Rank, EndpointId, EndpointId]:
    """The best pair by the same figures as the core's, from all pairs of a prompt that nobody has cached."""
    coordinator, speed, objective = fleet.coordinator, SeededSpeed(), Objective(fleet.model)
    states = [state for state in coordinator.fleet.states() if state.is_eligible]
    prefills = [state for state in states if state.endpoint.pool.can_prefill]
    decodes = [state for state in states if state.endpoint.pool.can_decode]
    best: tuple[Rank, EndpointId, EndpointId] | None = None
    for prefill, decode in product(prefills, decodes):
        worker, target = prefill.endpoint, decode.endpoint
        if not coordinator.paths.verdict(worker.pool, target.pool).is_possible:
            continue
        own, other = coordinator.ledger.load(worker.id), coordinator.ledger.load(target.id)
        prefill_s = speed.prefill_s(worker, request.prompt_tokens)
        queue_s = own.pending_prefill_s(fleet.now_s) + own.others(prefill.sample) * prefill_s
        batch = other.decode_count + other.others(decode.sample) + 1
        step_s = speed.step_s(target, batch, other.context_tokens + request.prompt_tokens)
        moved = request.prompt_tokens * worker.pool.kv_bytes_per_token
        in_flight = max(own.bytes_in_flight, other.bytes_in_flight)
        transfer_s = speed.path(worker, target).transfer_s(moved, in_flight)
        cost = prefill_s * worker.pool.cost_per_hour / 3600.0
        turn = own.begun_ordinal + other.begun_ordinal
        rank = objective.rank(queue_s + prefill_s + transfer_s + step_s, step_s, 0.0, cost, turn)
        if best is None or (rank, worker.id, target.id) < best:
            best = rank, worker.id, target.id
    if best is None:
        raise RuntimeError("no open pair")
    return best
