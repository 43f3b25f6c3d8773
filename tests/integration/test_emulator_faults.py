"""Failures that are switched on and off while an emulated engine runs."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client
from pdcoord.wire.errors import ConnectError, ResetError, StreamError, WireError

PROMPT = list(range(500))
FAST = {
    "name": "e",
    "profile": "amd-mi300x-8b",
    "port": 0,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
    "handshake_s": 0.01,
}


@dataclass
class Bench:
    client: Client
    engine: EmulatedEngine
    other: EmulatedEngine
    admin: HostPort

    async def send(
        self, method: str, path: str, body: Any = None, *, to: HostPort | None = None
    ) -> tuple[int, Any]:
        raw = b"" if body is None else json.dumps(body).encode()
        async with await self.client.request(
            method, to or self.engine.address, path, body=raw, head_timeout_s=10.0
        ) as response:
            text = await response.read_all(timeout_s=10.0)
            return response.status, json.loads(text) if text else None

    async def complete(self, *, to: HostPort | None = None, **fields: Any) -> tuple[int, Any]:
        body = {"prompt": PROMPT, "max_tokens": 4, **fields}
        return await self.send("POST", "/v1/completions", body, to=to)

    async def switch(self, *faults: dict[str, Any]) -> None:
        """Through the admin listener, which outlives a crash."""
        status, answer = await self.send("POST", "/emulator/e/faults", {"faults": faults}, to=self.admin)
        assert status == 200, answer
        assert [each["kind"] for each in answer["faults"]] == [each["kind"] for each in faults]

    async def wait_healthy(self) -> None:
        async with asyncio.timeout(20.0):
            while True:
                try:
                    if (await self.send("GET", "/health"))[0] == 200:
                        return
                except WireError:
                    await asyncio.sleep(0.01)


@asynccontextmanager
async def started() -> AsyncIterator[Bench]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": "demo/tiny",
                "admin": {"port": 0},
                "engines": [FAST, {**FAST, "name": "other"}],
            }
        )
    )
    async with AsyncExitStack() as stack:
        (engine, other), admin = await stack.enter_async_context(running(fleet, fleet.engines))
        assert admin is not None
        client = await stack.enter_async_context(Client())
        yield Bench(client, engine, other, format_host_port(admin.host, admin.port))


async def test_an_error_befalls_as_many_calls_as_it_says() -> None:
    async with started() as bench:
        await bench.switch({"kind": "error", "status": 503, "count": 2})
        statuses = [(await bench.complete())[0] for _ in range(4)]
        assert statuses == [503, 503, 200, 200]
        assert await bench.send("GET", "/emulator/faults") == (200, {"faults": []})


async def test_an_error_with_a_probability_befalls_some() -> None:
    async with started() as bench:
        await bench.switch({"kind": "error", "probability": 0.5})
        statuses = {(await bench.complete(max_tokens=1))[0] for _ in range(40)}
        assert statuses == {200, 500}
        _, answer = await bench.send("GET", "/emulator/faults")
        assert 0 < answer["faults"][0]["befallen"] < 40


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_reset_breaks_an_answer_in_its_middle(
    is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with started() as bench:
        await bench.switch({"kind": "reset", "after_tokens": 3, "count": 1})
        body = json.dumps({"prompt": PROMPT, "max_tokens": 50, "stream": is_stream}).encode()
        async with await bench.client.request(
            "POST", bench.engine.address, "/v1/completions", body=body, head_timeout_s=10.0
        ) as response:
            assert response.status == 200
            got = b""
            with pytest.raises(StreamError):
                while True:
                    got += await response.read_chunk(idle_timeout_s=10.0)
        # What had not left the socket is lost, so that fewer tokens may arrive than were sent.
        assert got.count(b"data: ") <= 3
        assert (await bench.complete())[0] == 200
    assert caplog.records == []  # The server did not take it for an accident of the app.


async def test_a_stalled_call_is_never_answered_and_leaves_nothing() -> None:
    async with started() as bench:
        await bench.switch({"kind": "stall"})
        async with asyncio.TaskGroup() as group:
            call = group.create_task(bench.complete())
            async with asyncio.timeout(10.0):
                while not (await bench.send("GET", "/load"))[1]["server_load"]:
                    await asyncio.sleep(0.01)
            assert (await bench.send("GET", "/health"))[0] == 200
            call.cancel()
        await bench.switch()
        assert (await bench.complete())[0] == 200


async def test_refused_connections_while_a_running_answer_goes_on() -> None:
    async with started() as bench:
        body = json.dumps({"prompt": PROMPT, "max_tokens": 300, "stream": True}).encode()
        async with await bench.client.request(
            "POST", bench.engine.address, "/v1/completions", body=body, head_timeout_s=10.0
        ) as response:
            await response.read_chunk(idle_timeout_s=10.0)
            await bench.switch({"kind": "refuse"})
            async with asyncio.timeout(10.0):
                while True:
                    try:
                        await bench.send("GET", "/health")
                    except (ConnectError, ResetError):  # The latter where the door shuts under the question.
                        break
            rest = await response.read_all(timeout_s=10.0)
            assert rest.endswith(b"data: [DONE]\n\n")
        await bench.switch()
        await bench.wait_healthy()
        assert (await bench.complete())[0] == 200


async def test_a_refusal_ends_by_itself_after_its_duration() -> None:
    async with started() as bench:
        await bench.switch({"kind": "refuse", "duration_s": 0.2})
        await bench.wait_healthy()


async def test_a_lost_ticket_is_a_200_without_one() -> None:
    async with started() as bench:
        await bench.switch({"kind": "lost_ticket", "count": 1})
        leg = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        assert (await bench.complete())[0] == 200  # Not a prefill leg: nothing to lose.
        status, answer = await bench.complete(**leg)
        assert status == 200
        assert answer["kv_transfer_params"] is None
        assert len((await bench.send("GET", "/emulator/state"))[1]["leases"]) == 1
        status, answer = await bench.complete(**leg)
        assert answer["kv_transfer_params"]["do_remote_prefill"] is True


async def test_an_expired_lease_is_a_ticket_that_is_worth_nothing() -> None:
    async with started() as bench:
        await bench.switch({"kind": "expired_lease"})
        leg = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        _, answer = await bench.complete(**leg)
        assert (await bench.send("GET", "/emulator/state"))[1]["leases"] == []
        ticket = answer["kv_transfer_params"]
        status, _ = await bench.complete(to=bench.other.address, kv_transfer_params=ticket)
        assert status == 500


async def test_a_slow_link_slows_transfers_until_it_is_healed() -> None:
    async with started() as bench:
        await bench.switch({"kind": "slow_link", "factor": 0.000001})
        leg = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
        ticket = (await bench.complete(**leg))[1]["kv_transfer_params"]
        async with asyncio.TaskGroup() as group:
            call = group.create_task(bench.complete(to=bench.other.address, kv_transfer_params=ticket))
            async with asyncio.timeout(10.0):
                while True:
                    _, state = await bench.send("GET", "/emulator/state", to=bench.other.address)
                    if any(fetch["stage"] == "moving" for fetch in state["fetches"]):
                        break
                    await asyncio.sleep(0.01)
            await bench.switch()
        assert call.result()[0] == 200


async def test_a_crash_drops_everything_and_a_restart_has_a_new_id() -> None:
    async with started() as bench:
        before = (await bench.send("GET", "/emulator/state"))[1]["engine_id"]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 5_000, "stream": True}).encode()
        async with await bench.client.request(
            "POST", bench.engine.address, "/v1/completions", body=body, head_timeout_s=10.0
        ) as response:
            await response.read_chunk(idle_timeout_s=10.0)
            await bench.switch({"kind": "crash", "restart_after_s": 0.2})
            with pytest.raises(StreamError):
                while True:
                    await response.read_chunk(idle_timeout_s=10.0)
        # Answers may still come from the one that is dying.
        async with asyncio.timeout(20.0):
            while (await bench.send("GET", "/emulator/e/state", to=bench.admin))[1]["engine_id"] == before:
                await asyncio.sleep(0.01)
        await bench.wait_healthy()
        _, state = await bench.send("GET", "/emulator/state")
        assert state["engine_id"] != before
        assert state["blocks"]["available"] == state["blocks"]["total"]
        assert await bench.send("GET", "/emulator/faults") == (200, {"faults": []})
        assert (await bench.complete())[0] == 200


async def test_an_engine_that_never_restarts_is_revived_by_ending_its_failures() -> None:
    async with started() as bench:
        await bench.switch({"kind": "crash"})
        async with asyncio.timeout(10.0):
            while (await bench.send("GET", "/emulator", to=bench.admin))[1]["engines"][0]["is_alive"]:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20.0):
            with pytest.raises(WireError):
                while True:  # Its door closes a moment later.
                    await bench.complete()
        await bench.switch()
        await bench.wait_healthy()
        assert (await bench.complete())[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {"faults": [{"kind": "error"}, {"kind": "explode"}]},
        {"faults": [{"kind": "error", "status": 200}]},
        {"faults": [{"kind": "error", "strength": 9}]},
        {"faults": [{"kind": "stall", "factor": 0.5}]},
        {"faults": [{"kind": "stall", "probability": 0}]},
        {"faults": {"kind": "stall"}},
        [],
    ],
)
async def test_a_bad_body_is_refused_and_changes_nothing(body: Any) -> None:
    async with started() as bench:
        await bench.switch({"kind": "error", "status": 418})
        before = await bench.send("GET", "/emulator/faults")
        for target in (None, bench.admin):
            path = "/emulator/faults" if target is None else "/emulator/e/faults"
            status, answer = await bench.send("POST", path, body, to=target)
            assert status == 400
            assert answer["error"]["message"]
        assert await bench.send("GET", "/emulator/faults") == before
        assert (await bench.complete())[0] == 418


async def test_unknown_admin_paths_are_404() -> None:
    async with started() as bench:
        for path in ("/", "/emulator/nobody/state", "/emulator/e/secrets", "/emulator/e"):
            assert (await bench.send("GET", path, to=bench.admin))[0] == 404
