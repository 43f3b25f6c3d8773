"""Emulated engines of three vendors hand real KV over, and the decode engine finds it right."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort, format_host_port
from pdcoord.sim.demo.processes import Processes
from pdcoord.sim.ports import free_ports
from pdcoord.wire.client import Client

HOST = "127.0.0.1"
MODEL = "demo/tiny"
PROMPT = [1_000 + 7 * place % 9_000 for place in range(700)]
TRANSFER = {"version": 1, "transfer": "ab" * 16, "nonce": "cd" * 16}
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True)
class Started:
    """One engine of a running process."""

    address: HostPort
    kv_port: int


@pytest.fixture(params=["loopback", "tcp", "nixl"])
async def engines(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[dict[str, Started]]:
    """All engines in one process of their own: two libraries of UCX must not meet in this one."""
    if request.param == "nixl":
        pytest.importorskip("nixl")
    names = {"gaudi": "intel-gaudi3-8b", "nvidia": "nvidia-h100-8b", "amd": "amd-mi300x-8b"}
    ports = iter(free_ports(3 * len(names)))
    specs: list[dict[str, Any]] = [
        {
            "name": name,
            "profile": profile,
            "port": next(ports),
            "side_channel_port": next(ports),
            "kv_port": next(ports),
            "kv_backend": request.param,
            "kv_blocks": 600,
            "context_tokens_max": 4_096,
            "handshake_s": 0.0,
            "speed": {"prefill_base_ms": 5, "step_base_ms": 1},
        }
        for name, profile in names.items()
    ]
    fleet = tmp_path / "fleet.yaml"
    document = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "EmulatedFleet", "model": MODEL}
    fleet.write_text(json.dumps({**document, "engines": specs}))
    async with Client() as client, Processes(tmp_path) as processes:
        await processes.start("fleet", ["pdcoord", "emulate", str(fleet)])
        started = {
            spec["name"]: Started(HostPort(f"{HOST}:{spec['port']}"), spec["kv_port"]) for spec in specs
        }
        for engine in started.values():
            await processes.wait_ready("fleet", engine.address, "/health", client)
        yield started


async def ask(address: HostPort, ticket: dict[str, Any] | None, **fields: Any) -> tuple[dict[str, Any], str]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "return_token_ids": True, "emulated_kv": True}
    body |= {"ignore_eos": True, "kv_transfer_params": ticket, **fields}
    async with (
        Client() as client,
        await client.request(
            "POST", address, "/v1/completions", body=json.dumps(body).encode(), head_timeout_s=20.0
        ) as response,
    ):
        answer = json.loads(await response.read_all(timeout_s=20.0))
        assert response.status == 200, answer
        return answer, (response.header(b"x-emulated-kv") or b"").decode()


async def test_two_vendors_feed_a_third_by_ticket(engines: dict[str, Started]) -> None:
    decode = engines["amd"].address
    alone, none = await ask(decode, None, cache_salt="alone")
    assert none == ""
    digests = set()
    for name in ("gaudi", "nvidia"):
        answer, _ = await ask(engines[name].address, PREFILL, max_tokens=1)
        split, kv = await ask(decode, answer["kv_transfer_params"], cache_salt=name)
        assert kv.startswith("right tokens=700 "), kv
        digests.add(kv.split()[2])
        assert split["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    assert len(digests) == 1


async def test_both_legs_at_once_meet_by_transfer(engines: dict[str, Started]) -> None:
    import asyncio

    producer = engines["gaudi"]
    address = format_host_port(HOST, producer.kv_port)
    told = {"do_remote_prefill": True, "do_remote_decode": False, "remote_host": HOST}
    told |= {"remote_port": producer.kv_port, "pdcoord": {**TRANSFER, "address": address}}
    async with asyncio.TaskGroup() as group:
        decode = group.create_task(ask(engines["amd"].address, told))
        prefill = group.create_task(
            ask(engines["gaudi"].address, {**PREFILL, "pdcoord": TRANSFER}, max_tokens=1)
        )
    assert prefill.result()[0]["kv_transfer_params"]["pdcoord"]["transfer"] == TRANSFER["transfer"]
    assert decode.result()[1].startswith("right tokens=700 ")


async def test_a_ticket_with_another_nonce_brings_nothing(engines: dict[str, Started]) -> None:
    answer, _ = await ask(engines["gaudi"].address, PREFILL, max_tokens=1)
    ticket = answer["kv_transfer_params"]
    ticket["pdcoord"]["nonce"] = "00" * 16
    with pytest.raises(AssertionError, match="Internal server error"):
        await ask(engines["amd"].address, ticket)
