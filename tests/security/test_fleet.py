"""A fleet of real processes: everything encrypted and signed, and nothing secret where people read."""

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any

import pytest

from pdcoord.runtime.explain import explain
from pdcoord.wire.client import Client
from pdcoord.wire.tls import ClientTls
from pdcoord.wire.validity import validity_of

WAIT_S = 40.0
pytestmark = pytest.mark.timeout(300)
"""Five processes begin, on a machine that may be busy."""
CHAT = "/v1/chat/completions"
JSON = (b"content-type", b"application/json")


def chat(text: str, **more: Any) -> bytes:
    message = {"role": "user", "content": text}
    return json.dumps({"model": "security/model", "messages": [message], "max_tokens": 8, **more}).encode()


async def ask(
    client: Client, address: Any, body: bytes, *headers: tuple[bytes, bytes]
) -> tuple[int, bytes, bytes]:
    """Status, decision and body."""
    async with await client.request(
        "POST", address, CHAT, headers=[JSON, *headers], body=body, head_timeout_s=WAIT_S
    ) as response:
        raw = await response.read_all(timeout_s=WAIT_S)
        return response.status, response.header(b"x-pdcoord-decision") or b"", raw


async def get(client: Client, address: Any, path: str) -> bytes:
    async with await client.request("GET", address, path, head_timeout_s=WAIT_S) as response:
        return await response.read_all(timeout_s=WAIT_S)


def secure(fleet: Any, authority: Any, keys: Path) -> None:
    """TLS with certificates on both ends of every connection, and signed plans."""
    front, back, mine = (authority.issue(name) for name in ("front", "back", "mine"))
    ca = str(authority.ca)
    fleet.variables["gateway"] = {
        "PDCOORD_TLS_CERT_FILE": str(front.cert),
        "PDCOORD_TLS_KEY_FILE": str(front.key),
        "PDCOORD_ADMIN_TLS_CERT_FILE": str(front.cert),
        "PDCOORD_ADMIN_TLS_KEY_FILE": str(front.key),
        "PDCOORD_UPSTREAM_CA_FILE": ca,
        "PDCOORD_UPSTREAM_CERT_FILE": str(mine.cert),
        "PDCOORD_UPSTREAM_CERT_KEY_FILE": str(mine.key),
        "PDCOORD_PLAN_KEYS_FILE": str(keys),
    }
    for name in ("prefill-sidecar", "decode-sidecar"):
        fleet.flags[name] = [
            *("--tls-cert-file", str(back.cert), "--tls-key-file", str(back.key)),
            *("--tls-client-ca-file", ca, "--upstream-ca-file", ca),
            *("--upstream-cert-file", str(mine.cert), "--upstream-cert-key-file", str(mine.key)),
            *("--plan-keys-file", str(keys)),
        ]
    fleet.tls = ClientTls("test", authority.ca, cert=mine.cert, key=mine.key)


def accepted(log: str) -> list[str]:
    """What a process has read again, in order."""
    lines = [json.loads(line) for line in log.splitlines() if "secret.accepted" in line]
    return [line["files"] for line in lines]


def write_keys(path: Path, *names: str) -> None:
    """As an operator: a new file in place of the old, never half a one."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{name}:{name * 40}\n" for name in names))
    new.chmod(0o600)
    new.replace(path)


async def test_keys_rotate_under_load_without_a_lost_request(
    fleet: Any, authority: Any, tmp_path: Path
) -> None:
    keys = tmp_path / "plan-keys"
    write_keys(keys, "a")
    secure(fleet, authority, keys)
    await fleet.start()
    done = asyncio.Event()
    answers: list[tuple[int, bytes]] = []

    async def load(client: Client) -> None:
        while not done.is_set():
            status, decision, _ = await ask(client, fleet.address("gateway"), chat(secrets.token_hex(2_000)))
            answers.append((status, decision))

    async def reloaded(count: int) -> None:
        """Until every process has read the keys that often."""
        async with asyncio.timeout(WAIT_S):
            for name in ("gateway", "prefill-sidecar", "decode-sidecar"):
                while accepted(fleet.log(name)).count("plan-keys") < count:
                    await asyncio.sleep(0.05)

    async with Client(tls=fleet.tls) as client, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(load(client))
        for step, names in enumerate([("a", "b"), ("b", "a"), ("b",)], start=1):
            write_keys(keys, *names)
            await reloaded(step)
            before = len(answers)
            async with asyncio.timeout(WAIT_S):
                while len(answers) < before + 6:
                    await asyncio.sleep(0.01)
        for name, pair, files in (("gateway", "front", "admin"), ("decode-sidecar", "back", "metrics")):
            authority.issue(pair)  # In place, the key first: what is read between the two is refused.
            async with asyncio.timeout(WAIT_S):
                while not {"listener", files} <= set(accepted(fleet.log(name))):
                    await asyncio.sleep(0.05)
        async with Client(tls=fleet.tls) as late:
            assert (await ask(late, fleet.address("gateway"), chat("late")))[0] == 200
        done.set()
    assert {status for status, _ in answers} == {200}
    admin = f"https://{fleet.address('admin')}"
    assert await asyncio.to_thread(explain, None, admin, None, authority.ca) == 0
    assert any(decision.startswith(b"split") for _, decision in answers), "both legs were signed"
    async with Client(tls=fleet.tls) as client:
        forged = await ask(client, fleet.address("decode"), chat("x"))
        assert (forged[0], json.loads(forged[2])["error"]["code"]) == (403, "plan-unsigned")
        counted = (await get(client, fleet.address("decode-metrics"), "/metrics")).decode()
        assert 'pdcoord_sidecar_unsigned_total{why="missing"} 1.0' in counted
        assert 'pdcoord_sidecar_unsigned_total{why="key-unknown"}' not in counted
        # Of the certificate that was renewed, and of those that were not.
        ends_s = {
            name: validity_of((tmp_path / f"{name}.crt").read_bytes()).ends_s for name in ("back", "mine")
        }
        expires = "pdcoord_sidecar_certificate_expires_timestamp_seconds"
        lines = dict(line.rsplit(" ", 1) for line in counted.splitlines() if line.startswith(expires))
        shown = {name: float(value) for name, value in lines.items()}
        assert shown == {
            f'{expires}{{use="listener"}}': ends_s["back"],
            f'{expires}{{use="upstream"}}': ends_s["mine"],
        }
        assert b'certificate_expires_timestamp_seconds{use="admin"}' in await get(
            client, fleet.address("gateway"), "/metrics"
        )


async def test_no_prompt_key_or_ticket_is_where_people_read(fleet: Any, serving: Any) -> None:
    prompt, key, salt = (f"{name}{secrets.token_hex(8)}" for name in ("p", "k", "s"))
    tickets = ("remote_block_ids", "remote_engine_id", "do_remote_prefill")
    headers = [(b"authorization", b"Bearer " + key.encode()), (b"x-api-key", key.encode())]
    processes = ("gateway", "decode-sidecar", "prefill-sidecar")
    async with serving() as collector, Client() as client:
        traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}"}
        fleet.variables = {name: traces | {"OTEL_BSP_SCHEDULE_DELAY": "50"} for name in processes}
        await fleet.start()
        gateway = fleet.address("gateway")
        for body in (chat(prompt * 100), chat(prompt * 100, stream=True, cache_salt=salt), chat(prompt)):
            status, _, _ = await ask(client, gateway, body, *headers)
            assert status == 200
        # What is wrong with a call is told without its words too.
        for body in (chat(prompt, n="x"), chat(prompt)[:-1], chat(prompt, kv_transfer_params={"a": prompt})):
            status, _, raw = await ask(client, gateway, body, *headers)
            assert status == 400
            assert prompt.encode() not in raw
        pages = [(await get(client, fleet.address("admin"), "/decisions")).decode()]
        scraped = ("gateway", "decode-metrics", "prefill-metrics", "decode-engine", "prefill-engine")
        pages += [(await get(client, fleet.address(name), "/metrics")).decode() for name in scraped]
        async with asyncio.timeout(WAIT_S):
            while sum(b"pdcoord-sidecar" in body for *_, body in collector.seen) < 2:
                await asyncio.sleep(0.05)
        traced = [body.decode("latin-1") for *_, body in collector.seen]
    logs = [fleet.log(name) for name in processes]
    assert '"split"' in pages[0]
    assert all("request.done" in log for log in logs)
    assert any("security/model" in body for body in traced)
    for text in (*pages, *logs, *traced):
        assert [secret for secret in (prompt, key, salt, *tickets) if secret in text] == []
