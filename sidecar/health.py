"""Whether this pod can serve: the engine's own word, asked at most once a second, and no drain."""

import asyncio

import structlog

from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client
from pdcoord.wire.errors import WireError
from sidecar.observe import Metrics

CACHED_S_MAX = 1.0
PROBE_S_MAX = 2.0
_BODY_BYTES_MAX = 64 * 1024

_log = structlog.get_logger()


class Health:
    """Answers readiness.

    Attributes:
        is_draining: set once, on SIGTERM; from then on the pod is not ready.
    """

    def __init__(self, client: Client, engine: HostPort, metrics: Metrics) -> None:
        self.is_draining = False
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
        return ""

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
