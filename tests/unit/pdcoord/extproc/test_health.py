"""Whoever reads nothing any more holds no watch."""

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from pdcoord.extproc import health


class DeafContext:
    """A gRPC stream whose other side takes nothing."""

    async def write(self, message: object) -> None:
        await asyncio.Event().wait()


async def test_a_watch_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "WRITE_S_MAX", 0.01)
    context: Any = DeafContext()
    async with asyncio.timeout(5.0):
        await health.Health(lambda: None).watch(health_pb2.HealthCheckRequest(), context)
