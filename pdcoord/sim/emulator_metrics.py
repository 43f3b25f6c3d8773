"""An emulated engine's /metrics, under the names that vLLM 0.32 or SGLang 0.5.23 gives them."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pdcoord.core.fleet import EngineKind
from pdcoord.sim.engine import EngineModel
from pdcoord.sim.engine_metrics import SGLANG, VLLM
from pdcoord.sim.live import State
from pdcoord.sim.messages import (
    EngineEffect,
    FinishReason,
    RejectReason,
    RequestDone,
    TokenOut,
    TransferDone,
)

# vLLM 0.32's own buckets.
_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
)  # fmt: skip
_XFER_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_BYTES_BUCKETS = tuple(float(2**power) for power in range(20, 41, 2))
_COUNT_BUCKETS = tuple(float(2**power) for power in range(0, 20, 2))
_FIRST_TOKENS_MAX = 65_536

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
_MEANINGS = {metric.name.removesuffix("_total"): metric.meaning for metric in (*VLLM, *SGLANG)}


def _meaning(name: str) -> str:
    return f"Emulated. {_MEANINGS[name]}"


class EngineMetrics:
    """One engine's metrics since its start; fed with its effects, read from its model.

    Attributes:
        shows_idle: whether every gauge is 0, whatever the engine does.
    """

    def __init__(self, model: EngineModel) -> None:
        self.shows_idle = False
        self._frozen: bytes | None = None
        self._model = model
        self._labels = {"model_name": model.settings.model, "engine": "0"}
        self._registry = CollectorRegistry()
        self._last_token_s: dict[str, float] = {}
        self._arrived_s: dict[str, float] = {}
        is_sglang = model.settings.engine is EngineKind.SGLANG
        if is_sglang:
            self._labels = {"model_name": model.settings.model, "engine_type": "unified", "tp_rank": "0"}
        prefix = "sglang:" if is_sglang else "vllm:"
        self._ttft = self._histogram(f"{prefix}time_to_first_token_seconds", _TTFT_BUCKETS)
        self._itl = self._histogram(f"{prefix}inter_token_latency_seconds", _ITL_BUCKETS)
        self._e2e = self._histogram(f"{prefix}e2e_request_latency_seconds", _REQUEST_BUCKETS)
        self._queue = self._histogram(
            f"{prefix}{'queue_time' if is_sglang else 'request_queue_time'}_seconds", _REQUEST_BUCKETS
        )
        self._registry.register(_Collected(self._sglang if is_sglang else self._vllm))
        if not is_sglang:
            self._prefill = self._histogram("vllm:request_prefill_time_seconds", _REQUEST_BUCKETS)
            self._decode = self._histogram("vllm:request_decode_time_seconds", _REQUEST_BUCKETS)
            self._xfer_s = self._histogram("vllm:nixl_xfer_time_seconds", _XFER_BUCKETS)
            self._post_s = self._histogram("vllm:nixl_post_time_seconds", _XFER_BUCKETS)
            self._xfer_bytes = self._histogram("vllm:nixl_bytes_transferred", _BYTES_BUCKETS)
            self._descriptors = self._histogram("vllm:nixl_num_descriptors", _COUNT_BUCKETS)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(
            name,
            _meaning(name),
            list(self._labels),
            registry=self._registry,
            buckets=buckets,
        )
        return made.labels(**self._labels)

    def arrived(self, request_id: str, at_s: float) -> None:
        """A request was submitted; its first token will be timed from here."""
        if len(self._arrived_s) < _FIRST_TOKENS_MAX:
            self._arrived_s[request_id] = at_s

    def left(self, request_id: str) -> None:
        """A request ended, however it did."""
        self._arrived_s.pop(request_id, None)
        self._last_token_s.pop(request_id, None)

    def observe(self, effect: EngineEffect) -> None:
        """Count what an engine did."""
        match effect:
            case TokenOut():
                last_s = self._last_token_s.get(effect.request_id)
                if last_s is not None:
                    self._itl.observe(effect.at_s - last_s)
                elif effect.request_id in self._arrived_s:
                    self._ttft.observe(effect.at_s - self._arrived_s[effect.request_id])
                self._last_token_s[effect.request_id] = effect.at_s
            case RequestDone():
                self._e2e.observe(effect.at_s - effect.arrived_s)
                self._queue.observe(effect.scheduled_s - effect.arrived_s)
                if self._model.settings.engine is EngineKind.VLLM:
                    self._prefill.observe(effect.first_token_s - effect.scheduled_s)
                    self._decode.observe(effect.at_s - effect.first_token_s)
            case TransferDone() if self._model.settings.engine is EngineKind.VLLM:
                self._xfer_s.observe(effect.transfer_s)
                self._post_s.observe(self._model.settings.pull_setup_s)
                self._xfer_bytes.observe(effect.transfer_bytes)
                self._descriptors.observe(effect.descriptor_count)
            case _:
                pass

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self._registry) if self._frozen is None else self._frozen

    def freeze(self, *, is_frozen: bool) -> None:
        """Show what is so now until this is called with False."""
        if not is_frozen:
            self._frozen = None
        elif self._frozen is None:
            self._frozen = generate_latest(self._registry)

    # Series that are read from the model when somebody asks.

    def _vllm(self) -> Iterator[Metric]:
        model, counted = self._model, self._model.counters
        waiting = model.count_in(State.WAITING)
        deferred = model.count_in(State.FETCHING, State.RENDEZVOUS)
        yield self._gauge("vllm:num_requests_running", model.running_count)
        yield self._gauge("vllm:num_requests_waiting", model.waiting_count)
        yield self._by(
            "vllm:num_requests_waiting_by_reason", "reason", {"capacity": waiting, "deferred": deferred}
        )
        yield self._gauge("vllm:kv_cache_usage_perc", model.pool.usage)
        yield self._gauge("vllm:engine_sleep_state", 0)
        yield self._cache_config()
        yield self._count("vllm:prefix_cache_queries", counted.cache_queried_tokens)
        yield self._count("vllm:prefix_cache_hits", counted.cache_hit_tokens)
        yield self._count("vllm:external_prefix_cache_queries", counted.external_queried_tokens)
        yield self._count("vllm:external_prefix_cache_hits", counted.external_hit_tokens)
        yield self._count("vllm:prompt_tokens", counted.prompt_tokens)
        yield self._count("vllm:generation_tokens", counted.generated_tokens)
        yield self._count("vllm:num_preemptions", counted.preemptions)
        sources = {
            "local_compute": counted.computed_tokens,
            "local_cache_hit": counted.cache_hit_tokens,
            "external_kv_transfer": counted.external_hit_tokens,
        }
        yield self._counts_by("vllm:prompt_tokens_by_source", "source", sources)
        yield self._counts_by("vllm:request_success", "finished_reason", self._finished())
        yield self._counts_by("vllm:admission_rejections", "reason", self._rejections())
        yield self._count("vllm:nixl_num_failed_transfers", counted.failed_transfers)
        yield self._count("vllm:nixl_num_failed_notifications", counted.failed_notifications)
        yield self._count("vllm:nixl_num_kv_expired_reqs", counted.expired_leases)
        yield self._count("vllm:nixl_num_notifications_after_expiry", counted.late_notifications)

    def _finished(self) -> dict[str, int]:
        counted = self._model.counters
        finished = {reason.value: counted.finished.get(reason, 0) for reason in FinishReason}
        return {**finished, "abort": counted.aborted, "error": sum(counted.failed.values())}

    def _rejections(self) -> dict[str, int]:
        return {"queue_full": self._model.counters.rejected.get(RejectReason.QUEUE_FULL, 0)}

    def _cache_config(self) -> Metric:
        settings = self._model.settings
        info = {
            "block_size": str(settings.layout.block_tokens),
            "num_gpu_blocks": str(settings.block_total),
            "cache_dtype": settings.layout.dtype.value,
            "kv_cache_layout": settings.layout.order.value,
            "enable_prefix_caching": str(settings.caches_prefixes),
            "engine": "0",
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", _meaning("vllm:cache_config_info"), labels=list(info)
        )
        family.add_metric(list(info.values()), 1)
        return family

    def _sglang(self) -> Iterator[Metric]:
        model, counted = self._model, self._model.counters
        queried = counted.cache_queried_tokens
        yield self._gauge("sglang:num_running_reqs", model.running_count)
        yield self._gauge("sglang:num_queue_reqs", model.count_in(State.WAITING))
        yield self._gauge("sglang:num_prefill_bootstrap_queue_reqs", model.count_in(State.RENDEZVOUS))
        yield self._gauge("sglang:num_prefill_inflight_queue_reqs", model.count_in(State.SENDING))
        yield self._gauge("sglang:num_decode_transfer_queue_reqs", model.count_in(State.FETCHING))
        yield self._gauge("sglang:token_usage", model.pool.usage)
        yield self._gauge("sglang:cache_hit_rate", counted.cache_hit_tokens / queried if queried else 0.0)
        yield self._count("sglang:prompt_tokens", counted.prompt_tokens)
        yield self._count("sglang:generation_tokens", counted.generated_tokens)
        yield self._count("sglang:num_requests", sum(counted.finished.values()))
        yield self._count("sglang:num_transfer_failed_reqs", counted.failed_transfers)
        yield self._count("sglang:num_bootstrap_failed_reqs", sum(counted.failed.values()))

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, _meaning(name), labels=list(self._labels))
        family.add_metric(list(self._labels.values()), 0 if self.shows_idle else value)
        return family

    def _by(self, name: str, label: str, values: dict[str, int]) -> Metric:
        family = GaugeMetricFamily(name, _meaning(name), labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], 0 if self.shows_idle else value)
        return family

    def _count(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(name, _meaning(name), labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counts_by(self, name: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, _meaning(name), labels=[*self._labels, label])
        for key, value in values.items():
            family.add_metric([*self._labels.values(), key], value)
        return family


class _Collected:
    """A prometheus collector made of a function."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()
