"""The engines' own metrics that pdcoord reads, shows on its dashboards or emulates: names, meanings, use.

The page docs/metrics-engine.md is made from this and from the connector's table:
`python -m pdcoord.sim.engine_metrics > that file`. Sources: vLLM 0.32 and SGLang 0.5.23.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from transfer.engines.vllm import catalog as connector

VLLM_LABELS = ("model_name", "engine")
SGLANG_LABELS = ("model_name", "engine_type", "tp_rank")


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """One metric of an engine.

    Attributes:
        name: as /metrics shows it, `_total` of a counter included.
        labels: beside those that every metric of the engine has.
        use: what pdcoord or a reader makes of it.
        is_emulated: the emulator shows it.
    """

    name: str
    kind: str
    meaning: str
    use: str
    labels: tuple[str, ...] = ()
    is_emulated: bool = True


def _gauge(name: str, meaning: str, use: str, *labels: str) -> EngineMetric:
    return EngineMetric(name, "gauge", meaning, use, labels)


def _counter(name: str, meaning: str, use: str, *labels: str) -> EngineMetric:
    return EngineMetric(f"{name}_total", "counter", meaning, use, labels)


def _histogram(name: str, meaning: str, use: str) -> EngineMetric:
    return EngineMetric(name, "histogram", meaning, use)


_ROUTING = "Routing reads it."
_BREAKERS = "Breakers read it: pulls that failed behind answers that look well."
_READ = "For dashboards."
_CACHE_INFO = ("block_size", "num_gpu_blocks", "cache_dtype", "kv_cache_layout", "enable_prefix_caching")

VLLM = (
    _gauge("vllm:num_requests_running", "Requests in the running batch.", _ROUTING),
    _gauge("vllm:num_requests_waiting", "Requests that wait for a place in it.", _ROUTING),
    _gauge(
        "vllm:num_requests_waiting_by_reason",
        "The same by reason: capacity, or deferred while their KV is on its way.",
        "Routing takes the deferred ones out of what waits.",
        "reason",
    ),
    _gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0..1.", _ROUTING),
    _gauge("vllm:engine_sleep_state", "Whether the engine sleeps.", _READ),
    _gauge(
        "vllm:cache_config_info", "1, with the size of the KV cache in its labels.", _ROUTING, *_CACHE_INFO
    ),
    _counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", _READ),
    _counter("vllm:prefix_cache_hits", "Those found.", _READ),
    _counter("vllm:external_prefix_cache_queries", "Prompt tokens asked of the KV connector.", _READ),
    _counter("vllm:external_prefix_cache_hits", "Those it could bring.", _READ),
    _counter("vllm:prompt_tokens", "Prompt tokens processed.", _READ),
    _counter("vllm:generation_tokens", "Tokens generated.", _READ),
    _counter(
        "vllm:num_preemptions", "Requests thrown out for lack of KV blocks.", "Above 0: too many at once."
    ),
    _counter(
        "vllm:prompt_tokens_by_source",
        "Prompt tokens by where their KV came from: computed, cached, or transferred.",
        _BREAKERS,
        "source",
    ),
    _counter("vllm:request_success", "Requests that ended, by reason.", _READ, "finished_reason"),
    _counter("vllm:admission_rejections", "Requests turned away, by reason.", _READ, "reason"),
    _histogram(
        "vllm:time_to_first_token_seconds",
        "From a request's arrival at the engine to its first token.",
        _READ,
    ),
    _histogram("vllm:inter_token_latency_seconds", "Time between tokens.", _READ),
    _histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _READ),
    _histogram("vllm:request_queue_time_seconds", "Time before a request was scheduled.", _READ),
    _histogram("vllm:request_prefill_time_seconds", "From scheduled to the first token.", _READ),
    _histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _READ),
    _histogram("vllm:nixl_xfer_time_seconds", "NixlConnector: time of one pull.", _BREAKERS),
    _histogram("vllm:nixl_post_time_seconds", "NixlConnector: time to post one pull.", _READ),
    _histogram("vllm:nixl_bytes_transferred", "NixlConnector: bytes of one pull.", _READ),
    _histogram("vllm:nixl_num_descriptors", "NixlConnector: descriptors of one pull.", _READ),
    _counter("vllm:nixl_num_failed_transfers", "NixlConnector: pulls that failed.", _BREAKERS),
    _counter("vllm:nixl_num_failed_notifications", "NixlConnector: producers that could not be told.", _READ),
    _counter(
        "vllm:nixl_num_kv_expired_reqs",
        "NixlConnector: leases that ran out with nobody having come for the KV.",
        "Orphans as the producer sees them.",
    ),
    _counter("vllm:nixl_num_notifications_after_expiry", "NixlConnector: pulls that came too late.", _READ),
)
SGLANG = (
    _gauge("sglang:num_running_reqs", "Requests in the running batch.", _ROUTING),
    _gauge("sglang:num_queue_reqs", "Requests that wait.", _ROUTING),
    _gauge("sglang:num_prefill_bootstrap_queue_reqs", "Prefills that wait for their decode side.", _READ),
    _gauge("sglang:num_prefill_inflight_queue_reqs", "Prefills whose KV is being sent.", _READ),
    _gauge("sglang:num_decode_transfer_queue_reqs", "Decodes that wait for KV.", _READ),
    _gauge("sglang:token_usage", "Share of the KV pool in use, 0..1.", _ROUTING),
    _gauge("sglang:cache_hit_rate", "Share of prompt tokens found in the prefix cache.", _READ),
    _counter("sglang:prompt_tokens", "Prompt tokens processed.", _READ),
    _counter("sglang:generation_tokens", "Tokens generated.", _READ),
    _counter("sglang:num_requests", "Requests that ended well.", _READ),
    _counter("sglang:num_transfer_failed_reqs", "Transfers that failed.", _BREAKERS),
    _counter("sglang:num_bootstrap_failed_reqs", "Rendezvous that failed.", _READ),
    _histogram("sglang:time_to_first_token_seconds", "From arrival to the first token.", _READ),
    _histogram("sglang:inter_token_latency_seconds", "Time between tokens.", _READ),
    _histogram("sglang:e2e_request_latency_seconds", "From arrival to the last token.", _READ),
    _histogram("sglang:queue_time_seconds", "Time before a request was scheduled.", _READ),
    EngineMetric(
        "sglang:max_total_num_tokens", "gauge", "Tokens that the KV pool holds.", _ROUTING, is_emulated=False
    ),
)
OURS = tuple(
    EngineMetric(
        each.name + ("_total" if each.kind == "counter" else ""),
        each.kind,
        each.meaning,
        each.action,
        each.labels,
        is_emulated=False,
    )
    for each in connector.METRICS
)


def labels_of(metric: EngineMetric) -> tuple[str, ...]:
    """All labels of a metric."""
    if metric.name == "vllm:cache_config_info":
        return ("engine", *metric.labels)
    usual = SGLANG_LABELS if metric.name.startswith("sglang:") else VLLM_LABELS
    return (*usual, *metric.labels)


def render_page() -> str:
    """docs/metrics-engine.md, whole."""
    return "\n".join(
        [
            _HEAD,
            "## Our connector in vLLM\n",
            *_table(OURS, "what to do when it moves"),
            "## vLLM 0.32\n",
            *_table(VLLM, "use"),
            "## SGLang 0.5.23\n",
            *_table(SGLANG, "use"),
        ]
    )


def _table(metrics: Iterable[EngineMetric], last: str) -> Iterable[str]:
    yield f"| metric | type | labels | meaning | {last} |"
    yield "|---|---|---|---|---|"
    for each in metrics:
        labels = ", ".join(f"`{label}`" for label in each.labels) or "-"
        yield f"| `{each.name}` | {each.kind} | {labels} | {each.meaning} | {each.use} |"
    yield ""


_HEAD = """\
# Metrics of the engines

`GET /metrics` on an engine's own port; a sidecar in front of it passes the question on. These are the
metrics that pdcoord reads, shows on its dashboards or emulates, not all that engines have. vLLM's carry the
labels `model_name` and `engine` (the data-parallel rank), SGLang's `model_name`, `engine_type` and `tp_rank`;
further labels are closed lists of the engine's. The emulator shows all of them under the same names, except
our connector's and `sglang:max_total_num_tokens`.
"""


if __name__ == "__main__":
    sys.stdout.write(render_page())
