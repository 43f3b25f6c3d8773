"""Starts the agent of one vLLM worker over its KV caches, and makes an engine's ranks known to each other."""

import importlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from transfer.agent import Agent
from transfer.backends.base import Backend
from transfer.backends.nixl import NixlBackend, nixl_settings_from_mapping
from transfer.backends.tcp import TcpBackend
from transfer.backends.ucx import UcxBackend, ucx_settings_from_mapping
from transfer.canonical import row_bytes
from transfer.control import SIDE_SHARE
from transfer.door import Identity
from transfer.engines.vllm.memory import learn_memory
from transfer.engines.vllm.stats import PdcoordStats
from transfer.engines.vllm.worker_side import Tally, WorkerSide
from transfer.errors import SettingError, TransferError
from transfer.layout import RankLayout
from transfer.repack.torch_repacker import TorchRepacker
from transfer.settings import AgentSettings
from transfer.staging import make_staging

EPOCH_BYTES = 8
_log = logging.getLogger("pdcoord.transfer")


class Worker:
    """A running agent and the orders that it is given.

    Attributes:
        address: where this rank's agent listens.
        epoch: of the engine's start, the same for all its ranks.
    """

    def __init__(self, agent: Agent, side: WorkerSide, epoch: str, device: str) -> None:
        self.side = side
        self.address = agent.address
        self.epoch = epoch
        self._agent = agent
        self._rank = agent.layout.rank
        self._device = device
        self._staged_bytes = 0

    def mark_written(self) -> Callable[[], None] | None:
        """What waits until everything that was submitted to the device so far is written; None on a CPU."""
        if self._device == "cpu":
            return None
        accelerator = importlib.import_module("torch").accelerator
        event = accelerator.current_stream().record_event()
        wait: Callable[[], None] = event.synchronize
        return wait

    def take_stats(self) -> PdcoordStats | None:
        """What has changed since the last call; None if nothing has."""
        tally = self.side.take_tally()
        staged_bytes = self._agent.stats().staging_used_bytes
        if tally is None and staged_bytes == self._staged_bytes:
            return None
        self._staged_bytes = staged_bytes
        tally = tally or Tally()
        return PdcoordStats.of(
            seconds=tally.seconds,
            loaded_bytes=tally.loaded_bytes,
            failures=tally.failures,
            staging_bytes={self._rank: staged_bytes},
        )

    def close(self) -> None:
        """The engine ends: let decode pods fetch what is staged for them, then end too."""
        self._agent.drain()
        self._agent.close()


def start_worker(
    settings: AgentSettings, vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any]
) -> Worker:
    """Start a worker's agent; every rank of the engine must call this at the same time.

    Raises:
        ValueError: if a setting cannot work here, or the KV caches are of a kind that cannot be described.
    """
    group = importlib.import_module("vllm.distributed.parallel_state").get_tp_group()
    try:
        return _start_rank(settings, vllm_config, kv_cache_config, kv_caches, group)
    except TransferError as error:
        raise ValueError(f"PdcoordConnector cannot start: {error}") from error


def _start_rank(
    settings: AgentSettings,
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: Mapping[str, Any],
    group: Any,
) -> Worker:
    rank = group.rank_in_group
    epoch: str = _all_ranks(group, secrets.token_hex(EPOCH_BYTES))[0]
    memory = learn_memory(vllm_config, kv_cache_config, kv_caches, rank)
    backends = backends_of(settings, rank)
    # The tcp backend moves host memory only.
    is_reached = settings.backends[0] != "tcp"
    staging = make_staging(
        settings.staging_bytes, settings.staging_device, memory.device, is_reached=is_reached
    )
    _warn_of_long_prompts(settings, memory.layout, vllm_config.model_config.max_model_len)
    repacker = TorchRepacker(memory.layout, memory.groups, staging.tensor())
    identity = Identity(vllm_config.kv_transfer_config.engine_id, epoch)
    agent = Agent(settings, identity, staging, repacker, backends)
    agent.start()
    agent.set_ranks(_all_ranks(group, agent.address))
    side = WorkerSide(agent, memory.tables, time.monotonic)
    return Worker(agent, side, epoch, memory.device)


def _warn_of_long_prompts(settings: AgentSettings, layout: RankLayout, longest_tokens: int) -> None:
    """Say it at once if the longest prompts could never be handed over; they would be computed twice."""
    per_token = sum(
        shape.layer_count * layout.heads(index).count * row_bytes(shape, layout.layout)
        for index, shape in enumerate(layout.groups)
    )
    fits_tokens = int(settings.staging_bytes * SIDE_SHARE) // per_token
    if fits_tokens < longest_tokens:
        needed = int(longest_tokens * per_token / SIDE_SHARE)
        _log.warning(
            "staging_bytes is %d: prompts of more than %d tokens are not handed over, --max-model-len is %d; "
            "give %d or more",
            settings.staging_bytes,
            fits_tokens,
            longest_tokens,
            needed,
        )


def _all_ranks(group: Any, value: str) -> list[str]:
    """What each tensor-parallel rank says, by rank."""
    distributed = importlib.import_module("torch").distributed
    said: list[str] = [""] * group.world_size
    distributed.all_gather_object(said, value, group=group.cpu_group)
    return said


def backends_of(settings: AgentSettings, rank: int) -> list[Backend]:
    """The backends that the settings name, in their order.

    Raises:
        SettingError: if there is none of that name, or its options are wrong.
    """
    return [_backend(name, settings, rank) for name in settings.backends]


def _backend(name: str, settings: AgentSettings, rank: int) -> Backend:
    options = settings.backend_options.get(name, {})
    match name:
        case "nixl":
            return NixlBackend(nixl_settings_from_mapping(options))
        case "ucx":
            return UcxBackend(ucx_settings_from_mapping(options))
        case "tcp":
            return TcpBackend(
                settings.listen_host,
                settings.tcp_port_of_rank(rank),
                settings.tcp_lanes,
                settings.advertise_host,
            )
        case _:
            raise SettingError("backends", name, "name nixl, ucx or tcp")
