"""Who may use the API, as whom, and what one tenant learns of another."""

import asyncio
import base64
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.front.keys import KEY_RANDOM_BYTES, make_key
from pdcoord.protocol.headers import HostPort
from pdcoord.wire.client import Client

WAIT_S = 40.0
HELD_S = 3.0
"""An engine makes more than a minute's worth of 60 tokens in it, as the policy has its speed."""
CHAT = "/v1/chat/completions"
MODEL = "security/model"
ADMIN_KEY = "a" * 40
KEYS = {
    name: make_key(name[:1].encode() * KEY_RANDOM_BYTES)
    for name in ("one", "two", "expired", "few", "limited", "urgent", "metered", "adapter")
}
LIMITS: dict[str, dict[str, Any]] = {
    "expired": {"expires_at": "2020-01-01T00:00:00Z"},
    "few": {"requests_per_minute": 1},
    "limited": {"models": ["another/model"]},
    "adapter": {"models": [f"{MODEL}:sql"]},
    "urgent": {"objectives": ["critical"]},
    "metered": {"tokens_per_minute": 60},
}


@dataclass
class Door:
    """A gateway that asks for keys, before one engine.

    Attributes:
        engine: notes what came to it; answers no call while `answers` is clear.
    """

    address: HostPort
    admin: HostPort
    engine: Any
    folder: Path

    async def ask(self, key: str | None, *headers: tuple[bytes, bytes], **fields: Any) -> tuple[int, str]:
        """Status, and the code of a refusal."""
        shown = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
        message = {"role": "user", "content": "hello"}
        body = json.dumps({"model": MODEL, "messages": [message], **fields}).encode()
        raw_headers = [(b"content-type", b"application/json"), *shown, *headers]
        return await self.send("POST", self.address, CHAT, raw_headers, body)

    async def send(
        self, method: str, address: HostPort, path: str, headers: Any, body: bytes = b""
    ) -> tuple[int, str]:
        async with (
            Client() as client,
            await client.request(
                method, address, path, headers=headers, body=body, head_timeout_s=WAIT_S
            ) as response,
        ):
            raw = await response.read_all(timeout_s=WAIT_S)
            told = json.loads(raw) if raw.startswith(b"{") else {}
            return response.status, told.get("error", {}).get("code", "")

    async def decision(self, request_id: str) -> Any:
        shown = [(b"authorization", b"Bearer " + ADMIN_KEY.encode())]
        path = f"/decisions/{request_id}"
        async with (
            Client() as client,
            await client.request("GET", self.admin, path, headers=shown, head_timeout_s=WAIT_S) as response,
        ):
            return json.loads(await response.read_all(timeout_s=WAIT_S))

    @property
    def reached(self) -> list[tuple[dict[bytes, bytes], Any]]:
        """Headers and bodies of the calls that came to the engine."""
        seen = [each for each in self.engine.seen if each[1] == CHAT]
        return [(dict(headers), json.loads(body)) for *_, headers, body in seen]


@pytest.fixture
async def door(gateway: Any, serving: Any, tmp_path: Path) -> AsyncIterator[Door]:
    listed = [
        {
            "name": name,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "tenant": f"team-{name}",
            **LIMITS.get(name, {}),
        }
        for name, key in KEYS.items()
    ]
    secret = base64.b64encode(b"x" * 32).decode()
    head = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "ApiKeys", "cache_salt_secret": secret}
    files = {"keys": json.dumps({**head, "keys": listed}), "admin-key": ADMIN_KEY, "engine-key": "e" * 40}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(serving())
        variables = {
            "PDCOORD_KEYS_FILE": str(tmp_path / "keys"),
            "PDCOORD_ADMIN_KEY_FILE": str(tmp_path / "admin-key"),
            "PDCOORD_ENGINE_KEY_FILE": str(tmp_path / "engine-key"),
        }
        address = await gateway(engine.address, **variables)
        admin = HostPort(json.loads(_started(tmp_path))["admin_url"].removeprefix("http://"))
        yield Door(address, admin, engine, tmp_path)


def _started(folder: Path) -> str:
    lines = (folder / "gateway.log").read_text().splitlines()
    return next(line for line in lines if "process.started" in line)


async def test_without_a_key_in_force_nothing_reaches_an_engine(door: Door) -> None:
    good = KEYS["one"]
    for key in (None, "", "nonsense", good[:-1], good.upper(), KEYS["expired"], ADMIN_KEY):
        assert await door.ask(key) == (401, "unauthorized")
    assert door.reached == []
    assert (await door.ask(good))[0] == 200


async def test_a_key_is_for_its_models_and_its_rate(door: Door) -> None:
    assert await door.ask(KEYS["limited"]) == (403, "model-forbidden")
    assert (await door.ask(KEYS["few"]))[0] == 200
    assert await door.ask(KEYS["few"]) == (429, "rate-limited")
    assert len(door.reached) == 1


async def test_a_key_for_an_adapter_is_for_neither_its_model_nor_another_adapter(door: Door) -> None:
    for model in (MODEL, f"{MODEL}:law"):
        assert await door.ask(KEYS["adapter"], model=model) == (403, "model-forbidden")
    assert await door.ask(KEYS["adapter"], model=f"{MODEL}:SQL") == (404, "model-unknown")
    assert (await door.ask(KEYS["adapter"], model=f"{MODEL}:sql"))[0] == 200
    assert [body["model"] for _, body in door.reached] == [f"{MODEL}:sql"]


async def test_a_tenant_cannot_pass_for_another_or_share_its_cache(door: Door) -> None:
    forged = (b"x-llm-d-inference-fairness-id", b"team-two")
    calls = [("one", None), ("one", None), ("two", None), ("one", "s"), ("two", "s")]
    tenants = []
    for index, (key, salt) in enumerate(calls):
        fields = {} if salt is None else {"cache_salt": salt}
        request_id = (b"x-request-id", b"call-%d" % index)
        assert (await door.ask(KEYS[key], forged, request_id, **fields))[0] == 200
        tenants.append((await door.decision(f"call-{index}"))["tenant"])
    assert tenants == ["team-one", "team-one", "team-two", "team-one", "team-two"]
    salts = [body["cache_salt"] for _, body in door.reached]
    assert salts[0] == salts[1], "one tenant has one cache"
    assert len(set(salts)) == 4, "no salt of a client makes it that of another tenant"
    assert not {"team-one", "s"} & set(salts)


async def test_a_tenant_cannot_name_what_is_in_a_media_cache(door: Door) -> None:
    url = {"url": "data:image/png;base64,aGk="}
    for part in ({"image_url": url, "uuid": "sku-1"}, {"image_url": None, "uuid": "sku-1"}):
        content = [{"type": "text", "text": "x"}, {"type": "image_url", **part}]
        messages = [{"role": "user", "content": content}]
        assert await door.ask(KEYS["one"], messages=messages) == (400, "invalid-field")
    assert door.reached == []


async def test_a_tenant_does_not_go_before_others_by_a_field_of_its_body(door: Door) -> None:
    fields: dict[str, Any] = {"priority": -9, "data_parallel_rank": 1, "routed_dp_rank": 1}
    fields |= {"disagg_prefill_dp_rank": 1, "request_id": "r", "rid": "r", "session_id": "s"}
    fields |= {"custom_labels": {"tenant": "team-two"}}
    told = [(name, b"s") for name in (b"x-session-id", b"x-smg-routing-key", b"x-custom-labels")]
    assert (await door.ask(KEYS["one"], *told, **fields))[0] == 200
    ((headers, body),) = door.reached
    assert not fields.keys() & body.keys()
    assert not dict(told).keys() & headers.keys()


async def test_a_tenant_goes_before_others_only_by_objectives_of_its_key(door: Door) -> None:
    newer, older = b"x-llm-d-inference-objective", b"x-gateway-inference-objective"
    calls = [("one", newer, b"critical"), ("one", older, b"critical"), ("one", newer, b"batch")]
    calls += [("urgent", newer, b"critical"), ("urgent", newer, b"unheard-of")]
    priorities = []
    for index, (key, name, objective) in enumerate(calls):
        request_id = (b"x-request-id", b"call-%d" % index)
        assert (await door.ask(KEYS[key], (name, objective), request_id))[0] == 200
        priorities.append((await door.decision(f"call-{index}"))["priority"])
    assert priorities == [0, 0, -1, 9, 0]


async def test_a_tenant_reaches_no_adapter_and_nothing_that_an_engine_keeps(door: Door) -> None:
    fields: dict[str, Any] = {"lora_path": "adapter-of-another", "session_params": {"id": "s", "rid": "r"}}
    fields |= {"previous_response_id": "resp_1", "custom_logit_processor": "code", "background": True}
    for name, value in fields.items():
        assert await door.ask(KEYS["one"], **{name: value}) == (400, "invalid-field")
    assert await door.ask(KEYS["one"], lora_path=[None, "adapter-of-another"]) == (400, "invalid-field")
    assert await door.ask(KEYS["one"], model=f"{MODEL}:adapter-of-another") == (404, "model-unknown")
    assert door.reached == []


async def test_a_tenant_that_leaves_before_its_answer_pays_for_it(door: Door) -> None:
    assert (await door.ask(KEYS["metered"], max_tokens=1))[0] == 200
    door.engine.answers.clear()
    request_id = (b"x-request-id", b"left")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HELD_S):
            await door.ask(KEYS["metered"], request_id, max_tokens=100_000)
    async with asyncio.timeout(WAIT_S):
        while not any('"left"' in line and "request.done" in line for line in _log(door)):
            await asyncio.sleep(0.05)
    door.engine.answers.set()
    assert await door.ask(KEYS["metered"]) == (429, "rate-limited")
    assert (await door.ask(KEYS["one"]))[0] == 200


async def test_a_key_in_a_request_id_is_shown_nowhere(door: Door) -> None:
    foreign = "sk-" + "0123456789abcdef" * 2
    for shown in (KEYS["one"], f"call:{KEYS['two']}", foreign):
        assert (await door.ask(KEYS["one"], (b"x-request-id", shown.encode())))[0] == 200
    shown = [(b"authorization", b"Bearer " + ADMIN_KEY.encode())]
    async with (
        Client() as client,
        await client.request(
            "GET", door.admin, "/decisions", headers=shown, head_timeout_s=WAIT_S
        ) as response,
    ):
        decisions = (await response.read_all(timeout_s=WAIT_S)).decode()
    sent = b"".join(headers[b"x-request-id"] for headers, _ in door.reached).decode()
    assert len(door.reached) == 3
    for text in (decisions, sent, "".join(_log(door))):
        assert not [key for key in (KEYS["one"], KEYS["two"], foreign) if key in text]


async def test_a_key_goes_no_further_than_the_gateway(door: Door) -> None:
    key = KEYS["one"].encode()
    assert (await door.ask(KEYS["one"]))[0] == 200
    second = [(b"x-api-key", key), (b"content-type", b"application/json")]
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    assert (await door.send("POST", door.address, CHAT, second, body))[0] == 200
    for headers, _ in door.reached:
        assert headers[b"authorization"] == b"Bearer " + b"e" * 40, "the engines' own"
        assert [name for name, value in headers.items() if key in value] == []
    assert key.decode() not in "".join(_log(door))


async def test_the_admin_listener_answers_its_key_alone(door: Door) -> None:
    for path in ("/decisions", "/fleet", "/policy", "/paths"):
        for key in (None, KEYS["one"], ADMIN_KEY[:-1]):
            headers = [] if key is None else [(b"authorization", b"Bearer " + key.encode())]
            assert (await door.send("GET", door.admin, path, headers))[0] == 401
        shown = [(b"authorization", b"Bearer " + ADMIN_KEY.encode())]
        assert (await door.send("GET", door.admin, path, shown))[0] == 200
        assert (await door.send("GET", door.address, path, shown))[0] == 404, "not on the front door"


def _log(door: Door) -> list[str]:
    return (door.folder / "gateway.log").read_text().splitlines()
