"""Answers of an emulated engine that break off midway, engines that crawl or lie, and their shutdown."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator import running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError, WireError

PROMPT = list(range(5_000, 5_100))
ENGINE = {
    "name": "e",
    "profile": "amd-mi300x-8b",
    "port": 0,
    "lease_s": 1.0,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
}
WAIT_S = 20.0


@dataclass
class Bench:
    client: Client
    address: HostPort

    async def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        raw = b"" if body is None else json.dumps(body).encode()
        async with await self.client.request(
            method, self.address, path, body=raw, head_timeout_s=WAIT_S
        ) as response:
            text = await response.read_all(timeout_s=WAIT_S)
            return response.status, json.loads(text) if text.startswith(b"{") else text.decode()

    async def switch(self, *faults: dict[str, Any]) -> None:
        status, answer = await self.send("POST", "/emulator/faults", {"faults": faults})
        assert status == 200, answer

    async def complete(self, path: str = "/v1/completions", **fields: Any) -> tuple[int, Any]:
        return await self.send("POST", path, {"prompt": PROMPT, "max_tokens": 8, **fields})

    async def stream(self, path: str = "/v1/completions", **fields: Any) -> list[bytes]:
        """The data of every event."""
        body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "stream": True, **fields}).encode()
        async with await self.client.request(
            "POST", self.address, path, body=body, head_timeout_s=WAIT_S
        ) as response:
            text = await response.read_all(timeout_s=WAIT_S)
        return re.findall(rb"^data: (.*)$", text, re.MULTILINE)

    async def gauge(self, name: str) -> float:
        _, page = await self.send("GET", "/metrics")
        (value,) = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", page, re.MULTILINE)
        return float(value)

    async def until_running(self, count: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await self.send("GET", "/emulator/state"))[1]["requests"]["running"] != count:
                await asyncio.sleep(0.01)


def fleet_of(**fields: Any) -> EmulatedFleet:
    return EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": "demo/tiny",
                "engines": [{**ENGINE, **fields}],
            }
        )
    )


@asynccontextmanager
async def started() -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        fleet = fleet_of()
        (engine,), _ = await stack.enter_async_context(running(fleet, fleet.engines))
        yield Bench(await stack.enter_async_context(Client()), engine.address)


async def test_a_stream_that_fails_ends_as_vllm_ends_it() -> None:
    async with started() as bench:
        await bench.switch({"kind": "stream_error", "after_tokens": 3, "count": 2})
        events = await bench.stream()
        assert len(events) == 5
        assert json.loads(events[3])["error"]["type"] == "InternalServerError"
        assert events[4] == b"[DONE]"
        assert (await bench.complete())[0] == 500
        assert len(await bench.stream()) == 9


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_aborted_answer_says_so_and_keeps_what_it_said(path: str) -> None:
    async with started() as bench:
        messages = [{"role": "user", "content": "Hello"}]
        whole = await bench.stream(path, messages=messages)
        await bench.switch({"kind": "abort", "after_tokens": 3})
        events = await bench.stream(path, messages=messages)
        opening = len(whole) - 9
        assert len(events) == opening + 3 + 2
        last = json.loads(events[-2])["choices"][0]
        assert last["finish_reason"] == "abort"
        status, answer = await bench.complete(path, messages=messages)
        assert status == 200
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert answer["usage"]["completion_tokens"] == 3
        await bench.until_running(0)


async def test_an_aborted_message_has_no_stop_reason() -> None:
    async with started() as bench:
        await bench.switch({"kind": "abort", "after_tokens": 3})
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
        *_, delta, stop = [json.loads(data) for data in await bench.stream("/v1/messages", **asked)]
        assert (delta["type"], delta["delta"]["stop_reason"]) == ("message_delta", None)
        assert stop == {"type": "message_stop"}
        status, answer = await bench.complete("/v1/messages", **asked)
        assert (status, answer["type"], "stop_reason" in answer) == (200, "message", False)
        assert answer["usage"]["output_tokens"] == 3


async def test_a_message_that_fails_ends_in_its_own_error_event() -> None:
    async with started() as bench:
        await bench.switch({"kind": "stream_error", "after_tokens": 3})
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
        last = json.loads((await bench.stream("/v1/messages", **asked))[-1])
        assert (last["type"], last["error"]["type"]) == ("error", "internal_error")
        status, answer = await bench.complete("/v1/messages", **asked)
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")
        assert answer["type"] == "error"


@pytest.mark.parametrize(("model", "said"), [("demo/tiny", "completed"), ("demo/gpt-oss", "cancelled")])
async def test_an_aborted_response_is_called_completed_or_cancelled(model: str, said: str) -> None:
    fleet = fleet_of().model_copy(update={"model": model})
    async with running(fleet, fleet.engines) as ((engine,), _), Client() as client:
        bench = Bench(client, engine.address)
        await bench.switch({"kind": "abort", "after_tokens": 3})
        asked = {"model": model, "input": "Hello", "max_output_tokens": 8}
        last = json.loads((await bench.stream("/v1/responses", **asked))[-1])
        assert (last["type"], last["response"]["status"]) == ("response.completed", said)
        assert (await bench.complete("/v1/responses", **asked))[1]["status"] == said


async def test_a_response_that_fails_just_breaks_off() -> None:
    async with started() as bench:
        await bench.switch({"kind": "stream_error", "after_tokens": 3})
        with pytest.raises(StreamError):
            await bench.stream("/v1/responses", input="Hello")
        assert (await bench.complete("/v1/responses", input="Hello"))[0] == 500


async def test_a_stalled_stream_stays_open_without_a_word() -> None:
    async with started() as bench:
        await bench.switch({"kind": "stall", "after_tokens": 2, "count": 1})
        body = json.dumps({"prompt": PROMPT, "max_tokens": 500, "stream": True}).encode()
        async with await bench.client.request(
            "POST", bench.address, "/v1/completions", body=body, head_timeout_s=WAIT_S
        ) as response:
            got = b""
            while got.count(b"data: ") < 2:
                got += await response.read_chunk(idle_timeout_s=WAIT_S)
            with pytest.raises(WireError):
                await response.read_chunk(idle_timeout_s=0.3)
        assert got.count(b"data: ") == 2
        await bench.until_running(0)
        assert (await bench.complete())[0] == 200


async def test_slow_steps_until_they_are_healed() -> None:
    async with started() as bench:
        await bench.switch({"kind": "slow", "factor": 0.00001})
        async with asyncio.TaskGroup() as group:
            call = group.create_task(bench.complete())
            await bench.until_running(1)
            await bench.switch()
        assert call.result()[0] == 200


async def test_metrics_that_are_stale_or_lie() -> None:
    async with started() as bench:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 5_000, "stream": True}).encode()
        await bench.switch({"kind": "stale_metrics"})
        async with await bench.client.request(
            "POST", bench.address, "/v1/completions", body=body, head_timeout_s=WAIT_S
        ) as response:
            await response.read_chunk(idle_timeout_s=WAIT_S)
            assert await bench.gauge("num_requests_running") == 0
            await bench.switch()
            assert await bench.gauge("num_requests_running") == 1
            assert await bench.gauge("kv_cache_usage_perc") > 0
            await bench.switch({"kind": "lying_metrics"})
            assert await bench.gauge("num_requests_running") == 0
            assert await bench.gauge("kv_cache_usage_perc") == 0
            assert await bench.gauge("generation_tokens_total") > 0
            await bench.switch({"kind": "stale_metrics"})
        await bench.until_running(0)
        assert await bench.gauge("num_requests_running") == 1, "frozen once it told the truth"


@asynccontextmanager
async def in_a_process(
    tmp_path: Path, **fields: Any
) -> AsyncIterator[tuple[Bench, asyncio.subprocess.Process]]:
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet_of(**fields).model_dump_json(by_alias=True, exclude_none=True))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "pdcoord.cli",
        "emulate",
        str(path),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(WAIT_S):
            line = (await process.stdout.readline()).decode()
        async with Client() as client:
            yield Bench(client, HostPort(line.split()[2].removeprefix("http://"))), process
    finally:
        if process.returncode is None:
            process.kill()
        async with asyncio.timeout(WAIT_S):
            await process.wait()


async def test_a_drain_ends_when_streams_and_leases_have_ended(tmp_path: Path) -> None:
    async with in_a_process(tmp_path, shutdown_timeout_s=60) as (bench, process):
        leg = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        assert (await bench.complete(**leg))[1]["kv_transfer_params"] is not None
        body = json.dumps({"prompt": PROMPT, "max_tokens": 500, "stream": True}).encode()
        async with await bench.client.request(
            "POST", bench.address, "/v1/completions", body=body, head_timeout_s=WAIT_S
        ) as response:
            got = await response.read_chunk(idle_timeout_s=WAIT_S)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(WAIT_S):
                while (await bench.complete())[1]["choices"][0]["finish_reason"] != "abort":
                    await asyncio.sleep(0.01)
            assert (await bench.complete(**leg))[1]["kv_transfer_params"] is None
            assert (await bench.send("GET", "/health"))[0] == 200
            got += await response.read_all(timeout_s=WAIT_S)
        assert got.count(b"data: ") == 501
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0


async def test_a_drain_is_over_at_its_timeout(tmp_path: Path) -> None:
    async with in_a_process(tmp_path, shutdown_timeout_s=0.3) as (bench, process):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 30_000, "stream": True}).encode()
        async with await bench.client.request(
            "POST", bench.address, "/v1/completions", body=body, head_timeout_s=WAIT_S
        ) as response:
            await response.read_chunk(idle_timeout_s=WAIT_S)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(StreamError):
                await response.read_all(timeout_s=WAIT_S)
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == 0
