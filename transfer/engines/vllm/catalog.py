"""The metrics that the connector adds to a vLLM server's own; names and meanings only, without vLLM."""

from dataclasses import dataclass

# From a prompt of one block on one host to a long one over a slow path, past the default deadline of a load.
_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class ConnectorMetric:
    """One metric of the connector.

    Attributes:
        name: as vLLM is given it; a counter is shown with `_total` behind.
        kind: counter, gauge or histogram.
        labels: beside vLLM's own `model_name` and `engine`.
        action: what a person does when it moves.
    """

    name: str
    kind: str
    meaning: str
    action: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


LOAD_SECONDS = ConnectorMetric(
    "vllm:pdcoord_load_seconds",
    "histogram",
    "Time from the order to load a prompt's KV to its last block in place.",
    "Growing alone: the link is slow or shared, or the producer is late; compare GET /paths of the sidecar.",
    buckets=_SECONDS_BUCKETS,
)
LOADED_BYTES = ConnectorMetric(
    "vllm:pdcoord_loaded_bytes",
    "counter",
    "Bytes of KV loaded from other engines.",
    "Standing still while requests are split: see pdcoord_failures.",
)
FAILURES = ConnectorMetric(
    "vllm:pdcoord_failures",
    "counter",
    "Prompts computed here because their KV could not be loaded, by kind.",
    "overloaded, staging-full, staging-timeout: give the producer more staging. cancelled, closed: clients "
    "left. Any other kind is a path that fails; docs/transfer.md has the list.",
    labels=("kind",),
)
STAGING_BYTES = ConnectorMetric(
    "vllm:pdcoord_staging_bytes",
    "gauge",
    "Staging memory in use, all ranks together.",
    "Near the configured size: prompts wait for room or are computed here; raise the staging size.",
)
METRICS = (LOAD_SECONDS, LOADED_BYTES, FAILURES, STAGING_BYTES)
