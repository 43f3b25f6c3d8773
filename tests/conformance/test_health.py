"""Health services: protocol 004 v1.0.0, "Health Checking"."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

SERVING = health_pb2.HealthCheckResponse.SERVING
EXT_PROC = "envoy.service.ext_proc.v3.ExternalProcessor"
WAIT_S = 60.0


@pytest.fixture
async def health(target: Any) -> AsyncIterator[HealthStub]:
    async with grpc.aio.insecure_channel(target.health) as channel:
        yield HealthStub(channel)


async def check(health: HealthStub, service: str) -> int:
    answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
    return int(answer.status)


@pytest.mark.parametrize("service", ["liveness", "readiness", EXT_PROC])
async def test_a_picker_that_is_well_says_so(health: HealthStub, service: str) -> None:
    assert await check(health, service) == SERVING


@pytest.mark.optional
@pytest.mark.parametrize("service", ["", "inference-extension"])
async def test_names_that_manifests_probe_as_well(health: HealthStub, service: str) -> None:
    """The empty name is the server as a whole; the other stands in the conformance manifests of gateways."""
    assert await check(health, service) == SERVING


async def test_a_service_that_is_not_there_is_said_so(health: HealthStub) -> None:
    """gRPC's health protocol: NOT_FOUND; some servers answer SERVICE_UNKNOWN or UNKNOWN instead."""
    try:
        assert await check(health, "no.such.Service") != SERVING
    except grpc.aio.AioRpcError as error:
        assert error.code() in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN}


@pytest.mark.optional
async def test_health_can_be_watched(health: HealthStub) -> None:
    watch = health.Watch(health_pb2.HealthCheckRequest(service=EXT_PROC), timeout=WAIT_S)
    assert (await watch.read()).status == SERVING
    watch.cancel()
