"""Speed as the policy seeds it: the figures written there, used as they are."""

from collections.abc import Collection, Mapping

from pdcoord.core.costs import PathFigures
from pdcoord.core.fleet import Endpoint, EndpointId, ModelName
from pdcoord.core.observations import Observation, ObservationKind, StepsSeen

PATH_LATENCY_S = 0.002
"""Asking for KV until its first byte: upper end of RDMA set-up (0.5-2 ms, llm-d latency profiles)."""


class SeededSpeed:
    """A SpeedModel that believes the policy and learns nothing."""

    @property
    def unlike(self) -> Collection[EndpointId]:
        return ()

    @property
    def left_out(self) -> Mapping[ObservationKind, int]:
        return {}

    def prefill_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:
        return endpoint.pool.speed.prefill_s(uncached_tokens)

    def prefill_spread_s(self, endpoint: Endpoint, uncached_tokens: int) -> float:  # noqa: ARG002  # the port's
        return 0.0

    def step_s(self, endpoint: Endpoint, batch: int, context_tokens: int) -> float:
        return endpoint.pool.speed.step_s(batch, context_tokens)

    def path(self, prefill: Endpoint, decode: Endpoint) -> PathFigures:
        """The slower of the two links; unknown (0.0) if either is."""
        return PathFigures(PATH_LATENCY_S, min(prefill.pool.link_bytes_per_s, decode.pool.link_bytes_per_s))

    def output_tokens(self, model: ModelName, tenant: str) -> float | None:  # noqa: ARG002  # the port's
        return None

    def pace(self, seen: StepsSeen) -> float | None:  # noqa: ARG002  # the port's
        return None

    def learn(self, observation: Observation) -> None:
        """Believe the policy all the same."""

    def forget(self, endpoint_id: EndpointId) -> None:
        """Nothing was kept."""

    def validate(self) -> None:
        """Nothing can be wrong."""
