"""A gateway that asks for API keys, before emulated engines that publish their caches."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from structlog.testing import LogCapture

from pdcoord.core.events import Action, Dispatch, Event
from pdcoord.core.fleet import ModelName
from pdcoord.core.plan import Plan
from pdcoord.core.prefixes import Trust
from pdcoord.front.keys import KEY_RANDOM_BYTES, make_key
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.adminclient import AdminListener
from pdcoord.runtime.explain import NOT_FOUND, UNREACHABLE, explain
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

MODEL = ModelName("demo/tiny")
ENGINE = {
    "profile": "nvidia-h100-8b",
    "connector": "none",
    "port": 0,
    "kv_events_port": 0,
    "kv_events_replay_port": 0,
    "kv_blocks": 512,
    "context_tokens_max": 4_096,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 1.0},
}
KEYS = {name: make_key(name.encode() * KEY_RANDOM_BYTES) for name in "abcdx"}
ADMIN_KEY = "0123456789abcdef0123456789abcdef"
PROMPT = list(range(1_000, 1_640))


@dataclass
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: Any


class Gateway:
    """A gateway process with its files, and what it decided."""

    def __init__(self, folder: Path, process: Process, client: Client, log: LogCapture) -> None:
        self.folder = folder
        self.process = process
        self.client = client
        self.log = log
        self.plans: list[Plan] = []
        handle = process.coordinator.handle

        def recording(event: Event, now_s: float) -> list[Action]:
            actions = handle(event, now_s)
            self.plans += [action.plan for action in actions if isinstance(action, Dispatch)]
            return actions

        process.coordinator.handle = recording  # type: ignore[method-assign]

    async def ask(self, name: str | None = None, path: str = "/v1/completions", **fields: Any) -> Answer:
        """One call with the key of that name."""
        headers = [] if name is None else [(b"authorization", b"Bearer " + KEYS[name].encode())]
        body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 2} | fields).encode()
        return await self.send("POST", path, headers, body)

    async def cached(self, name: str, **fields: Any) -> tuple[int, int]:
        """Tokens of the prompt that the engine had cached, and that the gateway expected it to have."""
        answer = await self.ask(name, **fields)
        assert answer.status == 200, answer.body
        usage = answer.body["usage"]["prompt_tokens_details"]
        return usage["cached_tokens"], self.plans[-1].chosen.figures.cached_tokens

    async def models(self, name: str | None) -> Answer:
        headers = [] if name is None else [(b"x-api-key", KEYS[name].encode())]
        return await self.send("GET", "/v1/models", headers)

    async def send(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes = b"", port: int = 0
    ) -> Answer:
        address = HostPort(f"127.0.0.1:{port or self.process.ports[0]}")
        async with await self.client.request(
            method, address, path, headers=headers, body=body, head_timeout_s=20.0
        ) as response:
            raw = await response.read_all(timeout_s=20.0)
            is_json = raw.startswith(b"{")
            return Answer(response.status, dict(response.headers), json.loads(raw) if is_json else raw)

    async def metric(self, line: str) -> float:
        page = (await self.send("GET", "/metrics", [])).body.decode()
        found = [each.rpartition(" ") for each in page.splitlines()]
        return sum(float(value) for name, _, value in found if name == line)

    async def reload(self, count: int) -> None:
        """Wait until that many changes of files were taken or refused."""
        await until(lambda: sum(entry["event"].startswith("keys.") for entry in self.log.entries) >= count)


@dataclass
class Files:
    """The files of one gateway."""

    folder: Path
    entries: list[dict[str, Any]] = field(default_factory=list)

    def write(self, name: str, text: str) -> Path:
        """As a Kubernetes Secret is: the path leads through a link that is swapped."""
        versions = [int(path.name.removeprefix("v")) for path in self.folder.glob("v*")]
        version = self.folder / f"v{max(versions, default=0) + 1}"
        version.mkdir()
        data, link = self.folder / "..data", self.folder / "..new"
        for old in data.iterdir() if data.exists() else ():
            (version / old.name).write_bytes(old.read_bytes())
            (version / old.name).chmod(0o600)
        (version / name).write_text(text)
        (version / name).chmod(0o600)
        link.symlink_to(version.name)
        link.rename(data)
        path = self.folder / name
        if not path.is_symlink():
            path.symlink_to(f"..data/{name}")
        return path

    def write_keys(self, *names: str, **fields: Any) -> Path:
        listed = [
            {
                "name": name,
                "sha256": hashlib.sha256(KEYS[name].encode()).hexdigest(),
                "tenant": f"team-{name}",
            }
            | fields.get(name, {})
            for name in names
        ]
        head = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "ApiKeys", "cache_salt_secret": "A" * 43}
        return self.write("keys.yaml", json.dumps(head | {"keys": listed}))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.005)


def policy_of(engine: EmulatedEngine) -> str:
    publisher = engine.host.publisher
    assert publisher is not None
    assert publisher.replay_address is not None
    ports = [urlsplit(address).port for address in (publisher.address, publisher.replay_address)]
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model: {{name: {MODEL}, aliases: [tiny], prefix: {{mode: precise}}}}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints:
      - name: a
        address: "{engine.address}"
        kv_events_port: {ports[0]}
        kv_events_replay_port: {ports[1]}
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}}
"""


@asynccontextmanager
async def gateway(files: Files, **settings: Any) -> AsyncIterator[Gateway]:
    head = {"apiVersion": "pdcoord.io/v1alpha1", "kind": "EmulatedFleet", "model": MODEL}
    fleet = EmulatedFleet.model_validate_json(json.dumps(head | {"engines": [{**ENGINE, "name": "a"}]}))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(100.0))
        (engine,), _ = await stack.enter_async_context(running(fleet, fleet.engines))
        client = await stack.enter_async_context(Client())
        policy = files.folder / "policy.yaml"
        policy.write_text(policy_of(engine))
        given = {
            "port": 0,
            "admin_port": 0,
            "scrape_interval_s": 0.02,
            "reload_interval_s": 0.05,
            "drain_s": 5.0,
        }
        log = LogCapture()
        process = Process(
            made := load_settings(policy=policy, **given | settings),
            GatewayFront(made),
            structlog.wrap_logger(None, processors=[log]),
        )
        process.access.load_first()
        process.files.load_first()
        running_gateway = Gateway(files.folder, process, client, log)
        stop, started = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            served = group.create_task(process.run(stop, started.set))
            try:
                await started.wait()
                await until(lambda: is_ready(process))
                await until(lambda: is_heard(process))
                yield running_gateway
            finally:
                stop.set()
                assert await served == 0


def is_ready(process: Process) -> bool:
    return all(state.is_eligible for state in process.coordinator.fleet.of_model(MODEL))


def is_heard(process: Process) -> bool:
    states = process.coordinator.fleet.of_model(MODEL)
    return all(process.coordinator.prefixes.trust(state) is Trust.FULL for state in states)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_nobody_gets_in_without_a_key_and_pages_show_what_the_key_is_for(files: Files) -> None:
    keys = files.write_keys("a", "b", b={"models": ["other"]})
    async with gateway(files, keys_file=keys) as made:
        for name in (None, "x"):
            answer = await made.ask(name)
            assert (answer.status, answer.body["error"]["code"]) == (401, "unauthorized")
            assert answer.headers[b"www-authenticate"] == b"Bearer"
            assert (await made.models(name)).status == 401
        assert (await made.ask("a")).status == 200
        assert (await made.ask("a", model="tiny")).status == 200
        forbidden = await made.ask("b")
        assert (forbidden.status, forbidden.body["error"]["code"]) == (403, "model-forbidden")
        assert [card["id"] for card in (await made.models("a")).body["data"]] == [MODEL, "tiny"]
        assert (await made.models("b")).body["data"] == []
        assert (await made.send("GET", "/readyz", [])).status == 200
        missing = 'pdcoord_gateway_auth_failures_total{listener="front",reason="missing"}'
        assert await made.metric(missing) == 2.0
        assert await made.metric("pdcoord_gateway_keys") == 2.0
        lines = [entry for entry in made.log.entries if entry["event"] == "request.done"]
        assert {line["key_name"] for line in lines} == {None, "a", "b"}
        assert not [key for key in KEYS.values() if key[4:20] in json.dumps(made.log.entries, default=str)]


async def test_a_refused_call_is_answered_before_its_body(files: Files) -> None:
    async with gateway(files, keys_file=files.write_keys("a")) as made, asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", made.process.ports[0])
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()


async def test_tenants_never_get_each_others_prefix(files: Files) -> None:
    friends = {"salt_group": "friends"}
    keys = files.write_keys("a", "b", "c", "d", c=friends, d=friends)
    async with gateway(files, keys_file=keys) as made:
        blocks = 16 * (len(PROMPT) // 16) - 16
        assert await made.cached("a") == (0, 0)
        await until_told(made)
        engine, expected = await made.cached("a")
        assert engine >= blocks
        assert expected >= blocks
        # The same prompt of another tenant, and of the same one under a salt of its own, is computed anew.
        assert await made.cached("b") == (0, 0)
        assert await made.cached("a", cache_salt="mine") == (0, 0)
        assert await made.cached("b", cache_salt="mine") == (0, 0)
        # Those who say that they trust each other share.
        assert await made.cached("c") == (0, 0)
        engine, _ = await made.cached("d")
        assert engine >= blocks


async def until_told(made: Gateway) -> None:
    """Wait until the engine's own events have told of its cache."""
    index = made.process.coordinator.prefixes.index(MODEL)
    assert index is not None
    await until(lambda: index.block_count > 0)


async def test_a_key_is_told_when_its_rate_lets_it_in_again(files: Files) -> None:
    keys = files.write_keys("a", "b", a={"requests_per_minute": 1}, b={"tokens_per_minute": 700})
    async with gateway(files, keys_file=keys) as made:
        assert (await made.ask("a")).status == 200
        answer = await made.ask("a")
        assert (answer.status, answer.body["error"]["code"]) == (429, "rate-limited")
        assert 50 <= int(answer.headers[b"retry-after"]) <= 60
        assert (await made.ask("b")).status == 200
        answer = await made.ask("b")
        assert (answer.status, answer.body["error"]["code"]) == (429, "rate-limited")
        assert 40 <= int(answer.headers[b"retry-after"]) <= 60
        for name, rate in (("a", "requests"), ("b", "tokens")):
            assert (
                await made.metric(f'pdcoord_gateway_rate_limited_total{{key="{name}",rate="{rate}"}}') == 1.0
            )


async def test_keys_change_under_load_and_no_call_is_lost(files: Files) -> None:
    keys = files.write_keys("a")
    async with gateway(files, keys_file=keys) as made:
        statuses: list[int] = []
        is_over = asyncio.Event()

        async def client() -> None:
            while not is_over.is_set():
                statuses.append((await made.ask("a", max_tokens=20)).status)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client())
            await until(lambda: len(statuses) > 4)
            files.write_keys("a", "b")
            await made.reload(1)
            assert (await made.ask("b")).status == 200
            files.write("keys.yaml", "kind: [")
            await made.reload(2)
            assert (await made.ask("b")).status == 200
            assert await made.metric('pdcoord_gateway_keys_stale{file="keys"}') == 1.0
            files.write_keys("a")
            await made.reload(3)
            assert (await made.ask("b")).status == 401
            is_over.set()
        assert set(statuses) == {200}


async def test_the_admin_listener_asks_for_its_key(files: Files) -> None:
    admin = files.write("admin", ADMIN_KEY)
    async with gateway(files, admin_key_file=admin, admin_host="127.0.0.1") as made:
        port = made.process.ports[-1]
        assert (await made.send("GET", "/fleet", [], port=port)).status == 401
        url = f"http://127.0.0.1:{port}"
        assert await AdminListener(url, admin).get(made.client, "/policy") is not None
        assert await asyncio.to_thread(explain, None, url, admin) == NOT_FOUND
        assert await asyncio.to_thread(explain, None, url) == UNREACHABLE
        old = files.folder / "old"
        old.write_text(ADMIN_KEY)
        old.chmod(0o600)
        files.write("admin", ADMIN_KEY[::-1])
        await made.reload(1)
        assert await asyncio.to_thread(explain, None, url, old) == UNREACHABLE
        assert await asyncio.to_thread(explain, None, url, admin) == NOT_FOUND
        assert (await made.ask()).status == 200
        assert (
            await made.metric('pdcoord_gateway_auth_failures_total{listener="admin",reason="missing"}') == 2.0
        )
