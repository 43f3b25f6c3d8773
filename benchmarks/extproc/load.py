"""The client: calls as Envoy shows them to a picker, and the CPU that the picker spends meanwhile."""

import argparse
import asyncio
import json
import time
from typing import Any

import grpc
from envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub

from benchmarks.relay.machine import cpu_ns

_WARM_S = 1.0
_IDLE_S = 2.0
_PIECE_BYTES = 16_384
"""How Envoy cuts a body that comes over HTTP/1.1."""
_ANSWER = b'{"id": "cmpl-1", "choices": [{"index": 0, "text": "w"}], "usage": {"completion_tokens": 1}}'


class Caller:
    """Makes calls one after the other, each with a prompt of its own."""

    def __init__(self, stub: Any, model: str, prompt_bytes: int, name: str) -> None:
        self._stub = stub
        self._model = model
        self._text = "The quick brown fox jumps over it. " * (prompt_bytes // 35 + 1)
        self._prompt_bytes = prompt_bytes
        self._name = name
        self.count = 0

    async def run(self) -> None:
        while True:
            await self._call()
            self.count += 1

    async def _call(self) -> None:
        prompt = f"{self._name}-{self.count} {self._text}"[: self._prompt_bytes]
        body = json.dumps({"model": self._model, "prompt": prompt, "max_tokens": 64}).encode()
        stream = self._stub.Process()
        await stream.write(_request_head())
        for start in range(0, len(body), _PIECE_BYTES):
            await stream.write(_body("request_body", body[start : start + _PIECE_BYTES], is_last=False))
        await stream.write(_body("request_body", b"", is_last=True))
        first = await stream.read()
        if first.WhichOneof("response") != "request_headers":
            raise RuntimeError(f"a call was answered with {first}")
        came = 0
        while came < len(body):
            came += len((await stream.read()).request_body.response.body_mutation.streamed_response.body)
        await stream.write(_response_head())
        await stream.read()
        await stream.write(_body("response_body", _ANSWER, is_last=True))
        await stream.read()
        await stream.done_writing()
        if await stream.read() is not grpc.aio.EOF:
            raise RuntimeError("a picker had more to say than there was to answer")


def _request_head() -> ext_proc.ProcessingRequest:
    headers = {
        ":authority": "api.example",
        ":path": "/v1/completions",
        ":method": "POST",
        ":scheme": "http",
        "content-type": "application/json",
        "user-agent": "benchmark",
        "authorization": "Bearer none",
        "x-forwarded-proto": "http",
    }
    request = ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=_map(headers)))
    request.protocol_config.request_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    request.protocol_config.response_body_mode = ProcessingMode.FULL_DUPLEX_STREAMED
    return request


def _response_head() -> ext_proc.ProcessingRequest:
    headers = {":status": "200", "content-type": "application/json", "server": "uvicorn"}
    return ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders(headers=_map(headers)))


def _body(kind: str, data: bytes, *, is_last: bool) -> ext_proc.ProcessingRequest:
    body = ext_proc.HttpBody(body=data, end_of_stream=is_last)
    if kind == "request_body":
        return ext_proc.ProcessingRequest(request_body=body)
    return ext_proc.ProcessingRequest(response_body=body)


def _map(headers: dict[str, str]) -> HeaderMap:
    return HeaderMap(
        headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()]
    )


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Calls and CPU of one window.

    A picker scrapes its fleet whether calls come or not. That share of a core is measured first, and counts
    once for a core and not once for each call.
    """
    idle_s, idle_ns = time.monotonic(), cpu_ns(options.pid)
    await asyncio.sleep(_IDLE_S)
    idle_share = (cpu_ns(options.pid) - idle_ns) / 1e9 / (time.monotonic() - idle_s)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{options.port}") as channel:
        stub = ExternalProcessorStub(channel)
        callers = [
            Caller(stub, options.model, options.prompt_bytes, f"{time.monotonic_ns()}-{index}")
            for index in range(options.concurrent)
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(caller.run()) for caller in callers]
            await asyncio.sleep(_WARM_S)
            began_s, began_ns, began = time.monotonic(), cpu_ns(options.pid), _count(callers)
            await asyncio.sleep(options.window_s)
            elapsed_s, spent_ns = time.monotonic() - began_s, cpu_ns(options.pid) - began_ns
            count = _count(callers) - began
            for task in tasks:
                task.cancel()
    call_s = (spent_ns / 1e9 - idle_share * elapsed_s) / count
    return {
        "cpu_us": call_s * 1e6,
        "idle_percent": idle_share * 100.0,
        "per_core": (1.0 - idle_share) / call_s,
        "per_s": count / elapsed_s,
        "count": float(count),
    }


def _count(callers: list[Caller]) -> int:
    return sum(caller.count for caller in callers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-bytes", type=int, required=True)
    parser.add_argument("--concurrent", type=int, required=True)
    parser.add_argument("--window-s", type=float, required=True)
    print(json.dumps(asyncio.run(measure(parser.parse_args()))))
