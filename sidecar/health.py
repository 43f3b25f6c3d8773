"""Whether this pod can serve: the engine's own word, asked at most once a second, and no drain."""

import asyncio
from collections.abc import Callable

import structlog

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError
from sidecar.observe import Metrics

CACHED_S_MAX = 1.0
PROBE_S_MAX = 2.0
WARM_S_MAX = 10.0
"""Longest time from the engine's first good answer in which the pod waits for its paths: two rounds of
probes that hang. A prefill pod that is down must not keep this one out of service."""
_BODY_BYTES_MAX = 64 * 1024

_log = structlog.get_logger()


class Health:
    """Answers readiness.

    Attributes:
        is_draining: set once, on SIGTERM; from then on the pod is not ready.

    Args:
        is_warm: whether the paths to the prefill pods have been probed once.
    """

    def __init__(
        self,
        client: Client,
        engine: HostPort,
        metrics: Metrics,
        is_warm: Callable[[], bool] = lambda: True,
    ) -> None:
        self.is_draining = False
        self._is_warm = is_warm
        self._warm_until_s: float | None = None
        self._client = client
        self._engine = engine
        self._metrics = metrics
        self._lock = asyncio.Lock()
        self._is_up = False
        self._asked_s = float("-inf")

    async def why_not(self) -> str:
        """Why the pod is not ready; empty if it is."""
        if self.is_draining:
            return "draining"
        if not await self._is_engine_up():
            return "the engine does not answer /health with 200"
        if self._is_warming():
            return "the paths to the prefill pods are being probed for the first time"
        return ""

    def _is_warming(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        if self._warm_until_s is None:
            self._warm_until_s = now_s + WARM_S_MAX
        if self._is_warm():
            self._warm_until_s = now_s  # Targets that come later are no reason to leave service.
        return now_s < self._warm_until_s

    async def _is_engine_up(self) -> bool:
        loop = asyncio.get_running_loop()
        async with self._lock:  # One question at a time, whoever asks.
            if loop.time() - self._asked_s < CACHED_S_MAX:
                return self._is_up
            is_up = await self._ask()
            if is_up is not self._is_up:
                _log.info("engine.ready" if is_up else "engine.lost", engine=self._engine)
            self._is_up = is_up
            self._asked_s = loop.time()
            self._metrics.set("engine_ready", float(is_up))
            return is_up

    async def _ask(self) -> bool:
        try:
            async with (
                asyncio.timeout(PROBE_S_MAX),
                await self._client.request(
                    "GET", self._engine, "/health", head_timeout_s=PROBE_S_MAX
                ) as response,
            ):
                await response.read_all(timeout_s=PROBE_S_MAX, bytes_max=_BODY_BYTES_MAX)
                return response.status == 200
        except (WireError, TimeoutError):
            return False
