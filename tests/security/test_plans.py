"""Who may use a sidecar: whoever shares a key, for one request, now."""

import json
from pathlib import Path
from typing import Any

import pytest

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.plans import PlanHeader, PlannedLoad, PrefillTarget, encode_plan
from pdcoord.protocol.signing import SKEW_S_MAX, Steering
from pdcoord.wire.client import Client
from pdcoord.wire.plankeys import PlanKeysFile

WAIT_S = 40.0
CHAT = "/v1/chat/completions"
NOW_S = 1_800_000_000.0
PLAN = encode_plan(PlanHeader())
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
TARGET = "10.0.0.1:8000"
CALL = (b"POST", CHAT.encode())


@pytest.fixture
def keys(tmp_path: Path) -> PlanKeysFile:
    path = tmp_path / "plan-keys"
    path.write_text("a:" + "s" * 40)
    path.chmod(0o600)
    return PlanKeysFile(path, lambda: NOW_S)


def signed(keys: PlanKeysFile, what: Steering) -> list[tuple[bytes, bytes]]:
    """All that a signature is over, as headers, and the signature."""
    named = [
        (b"x-pdcoord-plan", what.plan),
        (b"x-prefiller-host-port", what.prefills),
        (b"x-pdcoord-leg", what.leg),
    ]
    headers = [(b"x-request-id", what.request_id), *(pair for pair in named if pair[1])]
    return [*headers, *keys.headers(what)]


async def ask(address: HostPort, headers: Any, path: str = CHAT, method: str = "POST") -> tuple[int, str]:
    """Status, and the code of a refusal."""
    async with (
        Client() as client,
        await client.request(
            method, address, path, headers=headers, body=BODY, head_timeout_s=WAIT_S
        ) as response,
    ):
        raw = await response.read_all(timeout_s=WAIT_S)
        told = json.loads(raw) if raw.startswith(b"{") else {}
        return response.status, told.get("error", {}).get("code", "")


REFUSED = (403, "plan-unsigned")


async def test_a_signed_plan_is_served_and_an_unsigned_one_is_not(sidecar: Any, keys: PlanKeysFile) -> None:
    async with sidecar(keys=keys) as beside:
        good = signed(keys, Steering(*CALL, b"r-1", plan=PLAN))
        assert await ask(beside.address, good) == (200, "")
        for left_out in (b"x-pdcoord-plan-signature", b"x-pdcoord-plan", b"x-request-id"):
            assert await ask(beside.address, [pair for pair in good if pair[0] != left_out]) == REFUSED
        assert await ask(beside.address, []) == REFUSED
        assert await ask(beside.address, [*good, good[-1]]) == REFUSED
        assert [path for _, path, *_ in beside.engine.seen].count(CHAT) == 1


@pytest.mark.parametrize("changed", ["method", "target", "query", "plan", "prefills", "leg", "request_id"])
async def test_nothing_that_is_signed_can_be_changed(sidecar: Any, keys: PlanKeysFile, changed: str) -> None:
    what = Steering(*CALL, b"r-1", plan=PLAN)
    others = {
        "method": Steering(b"PUT", CALL[1], b"r-1", plan=PLAN),
        "target": Steering(b"POST", b"/v1/completions", b"r-1", plan=PLAN),
        "query": Steering(b"POST", CALL[1] + b"?a", b"r-1", plan=PLAN),
        "plan": Steering(*CALL, b"r-1", plan=encode_plan(PlanHeader(prefill_deadline_ms=1.0))),
        "prefills": Steering(*CALL, b"r-1", plan=PLAN, prefills=TARGET.encode()),
        "leg": Steering(*CALL, b"r-1", plan=PLAN, leg=b"prefill"),
        "request_id": Steering(*CALL, b"r-2", plan=PLAN),
    }
    async with sidecar("--allow", TARGET, keys=keys) as beside:
        forged = [*signed(keys, what)[:-1], *keys.headers(others[changed])]
        assert await ask(beside.address, forged) == REFUSED


async def test_a_foreign_routers_target_counts_only_signed(
    sidecar: Any, keys: PlanKeysFile, serving: Any
) -> None:
    async with serving() as prefill, sidecar("--allow", prefill.address, keys=keys) as beside:
        target = [(b"x-prefiller-host-port", prefill.address.encode())]
        assert await ask(beside.address, target) == REFUSED
        assert prefill.seen == []
        good = signed(keys, Steering(*CALL, b"r-1", prefills=prefill.address.encode()))
        await ask(beside.address, good)
        assert [path for _, path, *_ in prefill.seen] == [CHAT]


@pytest.mark.parametrize("age_s", [SKEW_S_MAX + 1, -SKEW_S_MAX - 1])
async def test_an_old_plan_is_refused(sidecar: Any, keys: PlanKeysFile, tmp_path: Path, age_s: float) -> None:
    then = PlanKeysFile(tmp_path / "plan-keys", lambda: NOW_S - age_s)
    async with sidecar(keys=keys) as beside:
        assert await ask(beside.address, signed(then, Steering(*CALL, b"r-1", plan=PLAN))) == REFUSED
        counted = beside.metrics.exposition().decode()
        assert 'pdcoord_sidecar_unsigned_total{why="too-old"} 1.0' in counted


async def test_what_is_not_a_page_needs_a_signature(sidecar: Any, keys: PlanKeysFile) -> None:
    async with sidecar(keys=keys) as beside:
        closed = (
            "/v1/completions",
            "/v1/embeddings",
            "/reset_prefix_cache",
            "/v1/load_lora_adapter",
            "/sleep",
        )
        closed += ("/tokenize/../v1/completions", "/%76%31/completions", "//metrics")
        for path in closed:
            assert await ask(beside.address, [], path) == REFUSED
        assert await ask(beside.address, [], "/flush_cache", "GET") == REFUSED
        for path in ("/metrics", "/v1/models"):
            assert (await ask(beside.address, [], path, "GET"))[0] == 200
        assert (await ask(beside.address, [], "/tokenize"))[0] == 200
        reached = {path for _, path, *_ in beside.engine.seen}
    assert reached <= {"/metrics", "/v1/models", "/tokenize", "/health"}


async def test_what_was_signed_for_a_call_opens_no_other_door(sidecar: Any, keys: PlanKeysFile) -> None:
    async with sidecar(keys=keys) as beside:
        good = signed(keys, Steering(*CALL, b"r-1", plan=PLAN))
        for path in ("/reset_prefix_cache", "/v1/completions", f"{CHAT}?a=1", f"{CHAT}/", f"/{CHAT}"):
            assert await ask(beside.address, good, path) == REFUSED
        assert await ask(beside.address, good, CHAT, "PUT") == REFUSED
        assert await ask(beside.address, good) == (200, "")
        # An empty query is no query, as it was for whoever signed it.
        assert await ask(beside.address, good, f"{CHAT}?") == (200, "")
        assert {path for _, path, *_ in beside.engine.seen} <= {CHAT, "/health"}


async def test_an_unsigned_load_is_not_reported(sidecar: Any, keys: PlanKeysFile) -> None:
    load = PlannedLoad(replica="r", model="m", prompt_tokens=1 << 40)
    plan = (b"x-pdcoord-plan", encode_plan(PlanHeader(load=load)))
    async with sidecar(keys=keys) as beside:
        guard = beside.proxy._guard
        assert guard.read_load("POST", CHAT, [plan]) is None
        good = signed(keys, Steering(*CALL, b"r-1", plan=plan[1]))
        assert guard.read_load("POST", CHAT, good) == load
        assert guard.read_load("POST", "/v1/embeddings", good) is None


async def test_a_prefill_leg_is_signed_for_the_next_sidecar(sidecar: Any, keys: PlanKeysFile) -> None:
    async with sidecar(keys=keys) as prefill, sidecar("--allow", prefill.address, keys=keys) as decode:
        plan = encode_plan(PlanHeader(prefills=(PrefillTarget(address=prefill.address),)))
        assert (await ask(decode.address, signed(keys, Steering(*CALL, b"r-1", plan=plan))))[0] == 200
        ((_, _, headers, _),) = [seen for seen in prefill.engine.seen if seen[1] == CHAT]
        assert dict(headers)[b"x-request-id"] == b"r-1"
        assert [name for name, _ in headers if name.startswith(b"x-pdcoord")] == [], "no engine sees one"
