"""What a sidecar says it did with a plan, as evidence for and against the paths it took."""

from pdcoord.core.fleet import Endpoint, EndpointId, EndpointState, Fleet
from pdcoord.core.paths import PathTable
from pdcoord.core.plan import Plan
from pdcoord.core.silent import SilentFailures
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import Mode, ServedHeader


def target_of(plan: Plan, address: HostPort) -> Endpoint | None:
    """The prefill endpoint of this plan with that address."""
    for endpoint in (plan.prefill, *(rung.prefill for rung in plan.rungs)):
        if endpoint is not None and endpoint.address == address:
            return endpoint
    return None


class PathEvidence:
    """Holds no state of its own."""

    def __init__(self, fleet: Fleet, paths: PathTable, silent: SilentFailures) -> None:
        self._fleet = fleet
        self._paths = paths
        self._silent = silent

    def state_of(self, endpoint: Endpoint) -> EndpointState | None:
        """The endpoint of a plan as it is now; None if it is gone or is another process by now."""
        state = self._fleet.get(endpoint.id)
        return state if state is not None and state.endpoint.address == endpoint.address else None

    def take(self, plan: Plan, served: ServedHeader | None, now_s: float) -> None:
        """A plan's first leg is over, one way or another.

        Args:
            served: None where nobody said what was done: that speaks neither for nor against its path.
        """
        if self.state_of(plan.decode) is None:
            return  # Its breakers went with it.
        request_id = plan.request_id
        judged: set[EndpointId] = set()
        if served is not None:
            for taken in served.rungs:
                prefill = target_of(plan, taken.target)
                if prefill is not None and self.state_of(prefill) is not None:
                    judged.add(prefill.id)
                    self._paths.fail((prefill.id, plan.decode.id), taken.reason, request_id, now_s)
            used = target_of(plan, served.prefill) if served.prefill is not None else None
            if served.mode is Mode.SPLIT and used is not None and self.state_of(used) is not None:
                judged.add(used.id)
                self._paths.succeed(used.id, plan.decode.id)
                moved_tokens = plan.chosen.figures.transfer_bytes // max(1, used.pool.kv_bytes_per_token)
                self._silent.answered(used.id, plan.decode.id, moved_tokens)
        if plan.prefill is not None and plan.prefill.id not in judged:
            self._paths.abandon(plan.prefill.id, plan.decode.id, request_id)
