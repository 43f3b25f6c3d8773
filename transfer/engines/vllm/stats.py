"""The connector's figures on the engine's /metrics and in its log, as vLLM's own connectors give theirs."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import prometheus_client
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (  # type: ignore[import-not-found]
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from transfer.engines.vllm import catalog

SECONDS = "seconds"
BYTES = "loaded_bytes"
FAILURES = "failures"
STAGING = "staging_bytes"


class PdcoordStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """What happened since the last report, over all workers and the scheduler.

    `data` goes between processes: seconds of each good load, the bytes of all of them, failures by kind, and
    the staging memory in use by rank, of those ranks where it has changed.
    """

    @classmethod
    def of(
        cls,
        *,
        seconds: list[float] | None = None,
        loaded_bytes: int = 0,
        failures: Mapping[str, int] | None = None,
        staging_bytes: Mapping[int, int] | None = None,
    ) -> "PdcoordStats":
        return cls(
            data={
                SECONDS: list(seconds or ()),
                BYTES: loaded_bytes,
                FAILURES: {str(kind): count for kind, count in (failures or {}).items()},
                STAGING: {str(rank): count for rank, count in (staging_bytes or {}).items()},
            }
        )

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = self.of().data

    def is_empty(self) -> bool:
        return not (self.data[SECONDS] or self.data[FAILURES] or self.data[STAGING])

    def aggregate(self, other: KVConnectorStats) -> "PdcoordStats":
        mine, theirs = self.data, other.data
        self.data = {
            SECONDS: mine[SECONDS] + theirs[SECONDS],
            BYTES: mine[BYTES] + theirs[BYTES],
            FAILURES: dict(Counter(mine[FAILURES]) + Counter(theirs[FAILURES])),
            STAGING: mine[STAGING] | theirs[STAGING],
        }
        return self

    def reduce(self) -> dict[str, int | float]:
        seconds: list[float] = self.data[SECONDS]
        return {
            "loads": len(seconds),
            "mean load (ms)": round(1e3 * sum(seconds) / max(len(seconds), 1), 1),
            "MB": round(self.data[BYTES] / 1e6, 1),
            "failures": sum(self.data[FAILURES].values()),
        }


class PdcoordMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Counts what PdcoordStats brings."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labels = per_engine_labelvalues
        self._staged: dict[int, dict[str, int]] = {index: {} for index in per_engine_labelvalues}
        self._seconds = metric_types[prometheus_client.Histogram](
            name=catalog.LOAD_SECONDS.name,
            documentation=catalog.LOAD_SECONDS.meaning,
            buckets=catalog.LOAD_SECONDS.buckets,
            labelnames=labelnames,
        )
        counter = metric_types[prometheus_client.Counter]
        self._bytes = counter(
            name=catalog.LOADED_BYTES.name,
            documentation=catalog.LOADED_BYTES.meaning,
            labelnames=labelnames,
        )
        self._failures = counter(
            name=catalog.FAILURES.name,
            documentation=catalog.FAILURES.meaning,
            labelnames=[*labelnames, *catalog.FAILURES.labels],
        )
        self._staging = metric_types[prometheus_client.Gauge](
            name=catalog.STAGING_BYTES.name,
            documentation=catalog.STAGING_BYTES.meaning,
            labelnames=labelnames,
            multiprocess_mode="mostrecent",
        )
        for values in per_engine_labelvalues.values():
            self._seconds.labels(*values)
            self._bytes.labels(*values)
            self._staging.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        values = self._labels[engine_idx]
        for seconds in transfer_stats_data[SECONDS]:
            self._seconds.labels(*values).observe(seconds)
        self._bytes.labels(*values).inc(transfer_stats_data[BYTES])
        for kind, count in transfer_stats_data[FAILURES].items():
            self._failures.labels(*values, kind).inc(count)
        self._staged[engine_idx] |= transfer_stats_data[STAGING]
        self._staging.labels(*values).set(sum(self._staged[engine_idx].values()))
