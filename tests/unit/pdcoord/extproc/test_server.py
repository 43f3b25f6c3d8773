"""Whoever reads nothing any more holds no stream."""

import asyncio
import itertools
import time
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from grpc import aio

from pdcoord.extproc import server
from pdcoord.extproc.calls import Picker
from pdcoord.front.ports import Limits

WAIT_S = 5.0


class DeafContext:
    """A gRPC stream whose other side takes nothing."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = list(messages)
        self.said: list[str] = []

    async def read(self) -> bytes:
        return self._messages.pop(0)

    async def write(self, message: object) -> None:
        self.said.append("write")
        await asyncio.Event().wait()

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.said.append(code.name)
        await asyncio.Event().wait()

    def cancelled(self) -> bool:
        return False


class Broken:
    """Coordination that is defective, and an observer and meter of it."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.ended_count = self.violation_count = 0

    def any_endpoint(self, allowed: object) -> None:
        raise RuntimeError("defect")

    def call_began(self) -> None:
        pass

    def call_ended(self, record: object) -> None:
        self.ended_count += 1

    def crashed(self, error: Exception, request_id: str) -> None:
        self.errors.append(error)

    def stream_began(self) -> None:
        pass

    def stream_ended(self, request_bytes: int, response_bytes: int) -> None:
        pass

    def violated(self) -> None:
        self.violation_count += 1


async def serve(broken: Any, context: Any) -> None:
    numbers = itertools.count()
    picker = Picker(
        coordination=broken,
        observer=broken,
        limits=Limits(),
        clock=time.monotonic,
        new_id=lambda: f"id-{next(numbers)}",
    )
    async with asyncio.timeout(WAIT_S):
        await server.Processor(picker, broken).process(None, context)


async def test_a_crash_is_not_told_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LAST_WORDS_S_MAX", 0.01)
    head = pb.ProcessingRequest()
    for name, value in ((":method", b"GET"), (":path", b"/v1/models")):
        head.request_headers.headers.headers.add(key=name, raw_value=value)
    head.request_headers.end_of_stream = True
    broken, context = Broken(), DeafContext(head.SerializeToString())
    await serve(broken, context)
    assert context.said == ["write"]
    assert [str(error) for error in broken.errors] == ["defect"]
    assert broken.ended_count == 1


async def test_a_violation_is_not_told_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LAST_WORDS_S_MAX", 0.01)
    broken, context = Broken(), DeafContext(b"\xff")
    await serve(broken, context)
    assert context.said == ["INVALID_ARGUMENT"]
    assert (broken.violation_count, broken.errors) == (1, [])


class StoppedError(aio.BaseError):
    """As gRPC raises where its server has stopped; its own class is private."""


async def test_a_server_that_stopped_is_no_crash_of_ours() -> None:
    class Stopped(DeafContext):
        async def read(self) -> bytes:
            raise StoppedError

    broken, context = Broken(), Stopped()
    with pytest.raises(StoppedError):
        await serve(broken, context)
    assert broken.errors == []
