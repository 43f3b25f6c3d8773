"""Two emulated engines over loopback: hand-over, failures of either side, rooms."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client
from pdcoord.wire.errors import StreamError

MODEL = "demo/tiny"
PROMPT = list(range(1_000, 2_000))
FAST = {
    "profile": "nvidia-h100-8b",
    "port": 0,
    "speed": {
        "prefill_base_ms": 0.1,
        "prefill_ms_per_token": 0.001,
        "prefill_ns_per_token_squared": 0.0,
        "step_base_ms": 1.0,
        "step_us_per_sequence": 0.0,
        "step_ns_per_context_token": 0.0,
    },
    "kv_blocks": 512,
    "context_tokens_max": 4_096,
    "handshake_s": 0.01,
}
BLOCKS_128 = {"layout": {"block_tokens": 128, "order": "NHD"}, "kv_blocks": 64}
SLOW_LINK = {"link_gbit_per_s": 0.001}  # 1,000 tokens take a quarter of an hour.


def fleet_of(*engines: dict[str, Any]) -> EmulatedFleet:
    return EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "seed": 7,
                "model": MODEL,
                "engines": [{**FAST, **engine} for engine in engines],
            }
        )
    )


@dataclass
class Answer:
    status: int
    body: Any
    failure: str | None


@dataclass
class Fleet:
    client: Client
    engines: dict[str, EmulatedEngine]

    def address(self, name: str) -> HostPort:
        return self.engines[name].address

    async def post(self, name: str, path: str, body: dict[str, Any]) -> Answer:
        async with await self.client.request(
            "POST", self.address(name), path, body=json.dumps(body).encode(), head_timeout_s=30.0
        ) as response:
            raw = await response.read_all(timeout_s=30.0)
            failure = response.header(b"x-emulated-failure")
            return Answer(response.status, json.loads(raw), None if failure is None else failure.decode())

    async def complete(self, name: str, prompt: list[int] = PROMPT, count: int = 8, **fields: Any) -> Answer:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": count, "return_token_ids": True, **fields}
        return await self.post(name, "/v1/completions", body)

    async def prefill(self, name: str, prompt: list[int] = PROMPT) -> dict[str, Any]:
        asked = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
        answer = await self.complete(name, prompt, 1, kv_transfer_params=asked)
        assert answer.status == 200
        ticket = answer.body["kv_transfer_params"]
        assert isinstance(ticket, dict)
        return ticket

    async def state(self, name: str) -> dict[str, Any]:
        async with await self.client.request(
            "GET", self.address(name), "/emulator/state", head_timeout_s=5.0
        ) as response:
            found = json.loads(await response.read_all(timeout_s=5.0))
            assert isinstance(found, dict)
            return found

    async def metric(self, name: str, series: str) -> float:
        async with await self.client.request(
            "GET", self.address(name), "/metrics", head_timeout_s=5.0
        ) as response:
            text = (await response.read_all(timeout_s=5.0)).decode()
        (line,) = [each for each in text.splitlines() if each.startswith(series)]
        return float(line.rpartition(" ")[2])

    async def wait_for(self, name: str, is_so: Callable[[dict[str, Any]], bool]) -> None:
        async def holds() -> bool:
            return is_so(await self.state(name))

        await wait_until(holds)

    async def wait_idle(self, name: str) -> None:
        def is_idle(state: dict[str, Any]) -> bool:
            blocks = state["blocks"]
            return not any(state["requests"].values()) and blocks["available"] == blocks["total"]

        await self.wait_for(name, is_idle)


async def wait_until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20.0):
        while not await holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def started(*engines: dict[str, Any]) -> AsyncIterator[Fleet]:
    fleet = fleet_of(*engines)
    async with AsyncExitStack() as stack:
        found, _ = await stack.enter_async_context(running(fleet, fleet.engines))
        client = await stack.enter_async_context(Client())
        yield Fleet(client, {engine.spec.name: engine for engine in found})


def ids(answer: Answer) -> list[int]:
    assert answer.status == 200, answer
    found = answer.body["choices"][0]["token_ids"]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("decode", [{}, BLOCKS_128])
async def test_a_split_answer_equals_a_colocated_one_and_the_counters_prove_the_way(
    decode: dict[str, Any],
) -> None:
    async with started({"name": "p", "role": "prefill"}, {"name": "d", "role": "decode", **decode}) as fleet:
        alone = await fleet.complete("p")
        ticket = await fleet.prefill("p")
        assert ticket["remote_num_tokens"] == 1_000
        assert ticket["remote_prefill_cached_tokens"] == 992
        assert (await fleet.state("p"))["blocks"]["pinned"] == 63
        split = await fleet.complete("d", kv_transfer_params=ticket)
        assert ids(split) == ids(alone)
        assert split.body["usage"]["prompt_tokens_details"]["cached_tokens"] == 999
        await fleet.wait_idle("p")
        await fleet.wait_idle("d")
        by_source = 'vllm:prompt_tokens_by_source_total{engine="0",model_name="demo/tiny",source='
        assert await fleet.metric("d", by_source + '"external_kv_transfer"') == 1_000
        assert await fleet.metric("d", by_source + '"local_compute"') == 0
        assert await fleet.metric("d", "vllm:nixl_bytes_transferred_sum") == 63 * 16 * 131_072
        assert await fleet.metric("d", "vllm:nixl_xfer_time_seconds_count") == 1
        assert await fleet.metric("d", "vllm:num_requests_running{") == 0


async def test_a_ticket_is_good_for_one_use() -> None:
    async with started({"name": "p"}, {"name": "d", "prefix_caching": False}) as fleet:
        ticket = await fleet.prefill("p")
        assert (await fleet.complete("d", kv_transfer_params=ticket)).status == 200
        await fleet.wait_idle("p")
        again = await fleet.complete("d", kv_transfer_params=ticket)
        assert (again.status, again.failure) == (500, "pull-denied")
        assert again.body == {
            "error": {
                "message": "Internal server error",
                "type": "InternalServerError",
                "param": None,
                "code": 500,
            }
        }
        assert await fleet.metric("d", "vllm:nixl_num_failed_transfers_total") == 1


@pytest.mark.parametrize("policy", ["fail", "recompute"])
async def test_a_lease_that_ran_out(policy: str) -> None:
    async with started(
        {"name": "p", "lease_s": 0.2}, {"name": "d", "kv_load_failure_policy": policy}
    ) as fleet:
        alone = ids(await fleet.complete("p"))
        ticket = await fleet.prefill("p")
        await fleet.wait_for("p", lambda state: not state["leases"])
        late = await fleet.complete("d", kv_transfer_params=ticket)
        if policy == "fail":
            assert (late.status, late.failure) == (500, "pull-denied")
        else:
            assert ids(late) == alone
        assert await fleet.metric("p", "vllm:nixl_num_kv_expired_reqs_total") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_engine_id": "p-00000000"},
        {"remote_request_id": "cmpl-forged"},
        {"remote_block_ids": [[1, 2, 3]]},
        {"remote_port": 1},
    ],
)
async def test_a_ticket_that_is_not_the_producers_own_fails(changes: dict[str, Any]) -> None:
    async with started({"name": "p"}, {"name": "d"}) as fleet:
        ticket = {**await fleet.prefill("p"), **changes}
        answer = await fleet.complete("d", kv_transfer_params=ticket)
        assert answer.status == 500
        assert answer.failure in {"pull-denied", "handshake-failed"}
        await fleet.wait_idle("d")


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": True}, {"do_remote_prefill": "yes"}, 7])
async def test_a_ticket_that_is_none_is_computed_here(params: Any) -> None:
    async with started({"name": "d"}) as fleet:
        alone = ids(await fleet.complete("d"))
        assert ids(await fleet.complete("d", kv_transfer_params=params)) == alone


@pytest.mark.parametrize(
    ("decode", "failure"), [({}, None), (BLOCKS_128, "incompatible"), ({"connector": "none"}, None)]
)
async def test_stock_nixl_refuses_unlike_layouts(decode: dict[str, Any], failure: str | None) -> None:
    connector = {"connector": "nixl"}
    async with started({"name": "p", **connector}, {"name": "d", **connector, **decode}) as fleet:
        answer = await fleet.complete("d", kv_transfer_params=await fleet.prefill("p"))
        assert (answer.status, answer.failure) == (200 if failure is None else 500, failure)


async def test_stock_silent_corruption_answers_200_with_other_tokens() -> None:
    blocks = {"connector": "nixl", "layout": {"block_tokens": 32, "order": "NHD"}, "kv_blocks": 256}
    stock = {"connector": "nixl", **BLOCKS_128, "stock_silent_corruption": True}
    async with started({"name": "p", **blocks}, {"name": "d", **stock}) as fleet:
        alone = ids(await fleet.complete("p"))
        answer = await fleet.complete("d", kv_transfer_params=await fleet.prefill("p"))
        assert ids(answer) != alone


def is_moving(state: dict[str, Any]) -> bool:
    return any(fetch["stage"] == "moving" for fetch in state["fetches"])


async def test_a_client_that_leaves_during_a_pull_frees_both_sides() -> None:
    async with started({"name": "p", **SLOW_LINK}, {"name": "d"}) as fleet:
        ticket = await fleet.prefill("p")
        async with asyncio.TaskGroup() as group:
            call = group.create_task(fleet.complete("d", kv_transfer_params=ticket))
            await fleet.wait_for("d", is_moving)
            assert (await fleet.state("p"))["leases"][0]["pulls"] == 1
            call.cancel()
        await fleet.wait_idle("d")
        await fleet.wait_for("p", lambda state: state["leases"][0]["pulls"] == 0)


async def test_a_client_that_leaves_during_an_answer_frees_the_engine() -> None:
    async with started({"name": "d"}) as fleet:
        async with asyncio.TaskGroup() as group:
            call = group.create_task(fleet.complete("d", count=3_000, n=2, ignore_eos=True))
            await fleet.wait_for("d", lambda state: state["requests"]["running"] == 2)
            call.cancel()
        await fleet.wait_idle("d")
        assert (await fleet.state("d"))["counters"]["aborted"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"remote_host": "ä"},
        {"remote_host": "a\r\nb"},
        {"remote_host": "x" * 300},
        {"remote_host": "::1"},
        {"remote_port": 2**40},
        {"remote_block_ids": [[10**30]]},
        {"remote_engine_id": "\r\n"},
        {"remote_num_tokens": -5},
    ],
)
async def test_an_absurd_ticket_harms_nobody(changes: dict[str, Any]) -> None:
    async with started({"name": "d"}) as fleet:
        ticket = {
            "do_remote_prefill": True,
            "remote_block_ids": [[1]],
            "remote_engine_id": "p",
            "remote_request_id": "r",
            "remote_host": "127.0.0.1",
            "remote_port": 1,
            **changes,
        }
        answer = await fleet.complete("d", kv_transfer_params=ticket)
        assert answer.status in {200, 500}
        assert (await fleet.complete("d")).status == 200
        await fleet.wait_idle("d")


async def test_a_choice_that_finds_no_place_takes_the_others_along() -> None:
    async with started({"name": "d", "running_max": 1, "queued_max": 1}) as fleet:
        # Long, so that none has made place by the time that the last is to find one.
        answer = await fleet.complete("d", n=8, max_tokens=3_000)
        assert answer.status == 503
        assert answer.body["error"]["type"] == "ServiceUnavailableError"
        await fleet.wait_idle("d")


async def test_a_process_that_is_told_to_stop_drops_what_runs_without_a_word(tmp_path: Path) -> None:
    async with Client() as client, in_a_process(tmp_path, {"name": "p"}) as (address, process):
        body = {"prompt": PROMPT, "max_tokens": 3_000, "stream": True}
        async with await client.request(
            "POST", address, "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=10.0
        ) as response:
            await response.read_chunk(idle_timeout_s=10.0)
            process.terminate()
            with pytest.raises(StreamError):
                await response.read_all(timeout_s=20.0)
        assert process.stdout is not None
        async with asyncio.timeout(20.0):
            assert await process.stdout.read() == b""
            assert await process.wait() == 0


@asynccontextmanager
async def in_a_process(
    tmp_path: Path, engine: dict[str, Any]
) -> AsyncIterator[tuple[HostPort, asyncio.subprocess.Process]]:
    """An engine in a process of its own, and its address; what it writes to stderr is in stdout too."""
    fleet = fleet_of(engine)
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet.model_dump_json(by_alias=True, exclude_none=True))
    code = (
        "import sys, pathlib; from pdcoord.sim.emulator import run; "
        "sys.exit(run(pathlib.Path(sys.argv[1]), []))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        str(path),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30.0):
            line = (await process.stdout.readline()).decode()
        assert " ready http://" in line
        yield HostPort(line.split()[2].removeprefix("http://")), process
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(20.0):
            status = await process.wait()
        assert status in {0, -signal.SIGKILL}


@pytest.mark.parametrize("policy", ["fail", "recompute"])
async def test_a_producer_that_is_killed_during_a_pull(tmp_path: Path, policy: str) -> None:
    async with (
        in_a_process(tmp_path, {"name": "p", **SLOW_LINK}) as (address, process),
        started({"name": "d", "kv_load_failure_policy": policy}, {"name": "other"}) as fleet,
    ):
        body = {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        async with await fleet.client.request(
            "POST", address, "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=10.0
        ) as response:
            ticket = json.loads(await response.read_all(timeout_s=10.0))["kv_transfer_params"]
        async with asyncio.TaskGroup() as group:
            call = group.create_task(fleet.complete("d", kv_transfer_params=ticket))
            await fleet.wait_for("d", is_moving)
            process.kill()
            await process.wait()
        answer = call.result()
        if policy == "fail":
            assert (answer.status, answer.failure) == (500, "pull-broken")
        else:
            assert ids(answer) == ids(await fleet.complete("other"))
        await fleet.wait_idle("d")


async def test_a_stream_whose_kv_does_not_come_ends_with_an_error_event() -> None:
    async with started({"name": "p"}, {"name": "d"}) as fleet:
        ticket = {**await fleet.prefill("p"), "remote_request_id": "cmpl-forged"}
        body = {"prompt": PROMPT, "max_tokens": 4, "stream": True, "kv_transfer_params": ticket}
        async with await fleet.client.request(
            "POST", fleet.address("d"), "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=10.0
        ) as response:
            assert response.status == 200
            raw = await response.read_all(timeout_s=10.0)
        error, done, _ = raw.decode().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == 500
        assert done == "data: [DONE]"


SGLANG = {"engine": "sglang"}


@asynccontextmanager
async def rooms() -> AsyncIterator[tuple[Fleet, dict[str, Any]]]:
    prefill = {"name": "p", "role": "prefill", "bootstrap_port": 0, **SGLANG}
    async with started(prefill, {"name": "d", "role": "decode", **SGLANG}, {"name": "alone"}) as fleet:
        host, _, port = (await fleet.state("p"))["side_channel"].rpartition(":")
        yield fleet, {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": 2**62 + 11}


@pytest.mark.parametrize("order", [["p", "d"], ["d", "p"]])
async def test_both_legs_of_sglang_meet_in_their_room(order: list[str]) -> None:
    async with rooms() as (fleet, room):
        async with asyncio.TaskGroup() as group:
            calls = {name: group.create_task(fleet.complete(name, **room)) for name in order}
        alone = ids(await fleet.complete("alone"))
        assert ids(calls["d"].result()) == alone
        assert ids(calls["p"].result()) == alone[:1]
        await fleet.wait_idle("p")
        await fleet.wait_idle("d")
        assert await fleet.metric("d", "sglang:num_running_reqs{") == 0
        assert (await fleet.state("p"))["rooms"] == 0


async def test_an_sglang_worker_answers_400_without_a_room() -> None:
    async with rooms() as (fleet, _):
        for name in ("p", "d"):
            answer = await fleet.complete(name)
            assert answer.status == 400
            assert answer.body["object"] == "error"
            assert "bootstrap room" in answer.body["message"]


async def test_a_decode_in_a_room_nobody_prefills_waits_until_its_client_leaves() -> None:
    async with rooms() as (fleet, room):
        async with asyncio.TaskGroup() as group:
            call = group.create_task(fleet.complete("d", **room))
            await fleet.wait_for("p", lambda state: state["rooms"] == 1)
            call.cancel()
        await fleet.wait_idle("d")
        await fleet.wait_for("p", lambda state: state["rooms"] == 0)
