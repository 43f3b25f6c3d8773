"""The connector that vLLM 0.32 loads: `kv_connector_module_path` names this module, `kv_connector` its class.

It only translates. What is decided stands in scheduler_side.py and worker_side.py, which know no vLLM; what
is moved, in the agent. It refuses to start where it could not keep its promise: that a request whose KV does
not come is computed here instead.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # type: ignore[import-not-found]
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource  # type: ignore[import-not-found]
from vllm.v1.request import RequestStatus  # type: ignore[import-not-found]

from transfer.engines.vllm.metadata import StepOrders
from transfer.engines.vllm.scheduler_side import Arrival, Scheduled, SchedulerSide
from transfer.engines.vllm.stats import PdcoordMetrics, PdcoordStats
from transfer.engines.vllm.support import check_supported, has_windows, settings_of
from transfer.engines.vllm.worker import Worker, start_worker
from transfer.session.vocabulary import Tables

SERVED = frozenset(
    {
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    }
)


@dataclass
class PdcoordMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """One step's orders, from the scheduler to the workers."""

    orders: StepOrders


@dataclass
class PdcoordHandshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]  # the same
    """Where a worker's agent listens, from the worker to the scheduler."""

    address: str
    epoch: str


class PdcoordConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # the same
    """Moves KV between engines that need not be alike.

    Raises:
        ValueError: if the engine is set up in a way that cannot work, saying what to change.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_supported(vllm_config, kv_cache_config)
        self._settings = settings_of(vllm_config, os.environ)
        self._worker: Worker | None = None
        self._scheduler: SchedulerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(
                vllm_config.kv_transfer_config.engine_id,
                vllm_config.parallel_config.tensor_parallel_size,
                self._settings.transfer_timeout_s,
                is_consumer=vllm_config.kv_transfer_config.is_kv_consumer,
                prefill_wait_s=self._settings.prefill_timeout_s,
                has_windows=has_windows(kv_cache_config),
                mint=os.urandom,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        # A chunk is staged, or its transfer given up, before preemption can give its blocks away.
        return False

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker = start_worker(self._settings, self._vllm_config, self._kv_cache_config, kv_caches)

    def get_handshake_metadata(self) -> PdcoordHandshake | None:
        worker = self._worker
        return None if worker is None else PdcoordHandshake(worker.address, worker.epoch)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        # vLLM calls this first in every step, and `start_load_kv` after the forward pass was submitted,
        # which on a CPU is after it is over: loads are not kept waiting for it.
        self._side().before_forward(kv_connector_metadata.orders)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: loads have begun in `handle_preemptions`, and none is waited for in a step."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no request is scheduled before its load is over."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: chunks are staged whole, in `wait_for_save`."""

    def wait_for_save(self) -> None:
        if self._worker is not None and self.has_connector_metadata():
            orders = self._get_connector_metadata().orders
            ready = self._worker.mark_written() if orders.chunks else None
            self._worker.side.after_forward(orders, ready)

    def get_transfer_results(
        self,
        finished_req_ids: set[str],  # noqa: ARG002  # the base class's
    ) -> KVConnectorTransferResults:
        results = self._side().results()
        return KVConnectorTransferResults(
            finished_sending=results.sent, finished_recving=results.received, failed_recving=results.failed
        )

    def _side(self) -> Any:
        if self._worker is None:
            raise RuntimeError("register_kv_caches must be called before the first step")
        return self._worker.side

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # The scheduler's half.

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        first = metadata.get(0)
        if isinstance(first, PdcoordHandshake) and self._scheduler is not None:
            self._scheduler.set_producer(first.address, first.epoch)

    def on_new_request(self, request: Any) -> None:
        if request.kv_transfer_params is not None:
            self._ledger().arrived(_arrival(request))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        count = self._ledger().matched_tokens(request.request_id, num_computed_tokens)
        return count, count > 0

    def get_loaded_kv_cache_group_ids(
        self,
        request: Any,  # noqa: ARG002  # the base class's
    ) -> tuple[int, ...]:
        groups: tuple[int, ...] = self._kv_cache_config.transfer_group_ids
        return groups

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._ledger().allocated(
            request.request_id, lambda: _tables(blocks.get_block_ids()), num_external_tokens
        )

    def build_connector_meta(self, scheduler_output: Any) -> PdcoordMetadata:
        ledger = self._ledger()
        return PdcoordMetadata(
            ledger.step(
                _scheduled(scheduler_output, ledger),
                scheduler_output.preempted_req_ids or (),
                lambda request: _tables(
                    scheduler_output.kv_connector_block_state.get_block_ids(request) or ()
                ),
            )
        )

    def update_connector_output(self, connector_output: Any) -> None:
        ledger = self._ledger()
        ledger.sent(connector_output.finished_sending or ())
        ledger.received(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._ledger().finished(request.request_id, block_ids, is_served=request.status in SERVED)

    def _ledger(self) -> SchedulerSide:
        if self._scheduler is None:
            raise RuntimeError("the scheduler's half was asked in a worker")
        return self._scheduler

    # Figures of both halves.

    def get_kv_connector_stats(self) -> PdcoordStats | None:
        if self._scheduler is not None:
            failures = self._scheduler.take_failures()
            return PdcoordStats.of(failures=failures) if failures else None
        return None if self._worker is None else self._worker.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PdcoordStats | None:
        return PdcoordStats.of() if data is None else PdcoordStats(data=data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PdcoordMetrics:
        return PdcoordMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _arrival(request: Any) -> Arrival:
    tokens = request.prompt_token_ids
    if request.prompt_embeds is not None or request.resumable:
        # Embeddings are no token ids, and the prompt of a session that takes more input is not final.
        tokens = None
    extra = [] if request.lora_request is None else [f"lora:{request.lora_request.lora_name}"]
    extra += [f"media:{feature.identifier}@{feature.mm_position.offset}" for feature in request.mm_features]
    return Arrival(request.request_id, request.kv_transfer_params, tokens, tuple(extra))


def _tables(block_ids: Any) -> Tables:
    return tuple(tuple(group) for group in block_ids)


def _scheduled(scheduler_output: Any, ledger: SchedulerSide) -> Iterator[Scheduled]:
    """The hand-overs in a step, with the tokens that each will have computed at its end."""
    counts = scheduler_output.num_scheduled_tokens
    cached = scheduler_output.scheduled_cached_reqs
    new = ((each.req_id, each.num_computed_tokens) for each in scheduler_output.scheduled_new_reqs)
    running = zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    for part in (new, running):
        for request, before in part:
            if ledger.is_staging(request):
                yield Scheduled(request, before + counts[request])
