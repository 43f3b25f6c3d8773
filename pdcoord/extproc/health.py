"""grpc.health.v1 for Envoy and for Kubernetes' probes.

Source: the gRPC health checking protocol, and the service names that the endpoint-picker protocol 1.0.0 and
the Gateway API's conformance manifests ask for.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from pdcoord.protocol.errors import Refusal

SERVICE = "grpc.health.v1.Health"
LIVENESS = "liveness"
READINESS = frozenset({"", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor", "inference-extension"})
WATCH_INTERVAL_S = 0.2
WATCHES_MAX = 256
WRITE_S_MAX = 5.0
"""How long a watcher may leave a message unread before its watch ends."""


class Health:
    """Answers for the services above; NOT_FOUND for any other.

    Args:
        unready: why no traffic should be sent here; None when ready.
    """

    def __init__(self, unready: Callable[[], Refusal | None]) -> None:
        self._unready = unready
        self._watch_count = 0

    def handler(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`."""
        read: Any = health_pb2.HealthCheckRequest.FromString
        write: Any = health_pb2.HealthCheckResponse.SerializeToString
        check = grpc.unary_unary_rpc_method_handler(cast("Any", self.check), read, write)
        watch = grpc.unary_stream_rpc_method_handler(cast("Any", self.watch), read, write)
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check, "Watch": watch})

    async def check(self, request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
        status = self._status(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service; ask for liveness or readiness")
        return health_pb2.HealthCheckResponse(status=status)

    async def watch(self, request: Any, context: aio.ServicerContext[Any, Any]) -> None:
        """Tell the status, and each change of it, until the caller leaves."""
        if self._watch_count >= WATCHES_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watches; use Check")
        self._watch_count += 1
        try:
            with suppress(TimeoutError):
                await self._tell_changes(request.service, context)
        finally:
            self._watch_count -= 1

    async def _tell_changes(self, service: str, context: aio.ServicerContext[Any, Any]) -> None:
        last: object = None
        while True:
            status = self._status(service)
            # The protocol: an unknown service is told in a message, as it may become known.
            told = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN if status is None else status
            if told != last:
                async with asyncio.timeout(WRITE_S_MAX):
                    await context.write(health_pb2.HealthCheckResponse(status=told))
                last = told
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _status(self, service: str) -> Any:
        if service == LIVENESS:
            return health_pb2.HealthCheckResponse.SERVING
        if service not in READINESS:
            return None
        is_ready = self._unready() is None
        return (
            health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
