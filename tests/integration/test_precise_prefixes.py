"""A gateway that follows its engines' caches: KV events of emulated engines, tokens by every way there is."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from structlog.testing import LogCapture
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pdcoord.core.events import Action, Dispatch, Event, RequestArrived
from pdcoord.core.fleet import EndpointId, EndpointState, ModelName
from pdcoord.core.plan import Plan
from pdcoord.core.prefixes import Trust
from pdcoord.core.request import Request
from pdcoord.protocol.headers import HostPort
from pdcoord.runtime.process import Process
from pdcoord.runtime.serve import GatewayFront
from pdcoord.runtime.settings import load_settings
from pdcoord.sim import text
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.faults import parse_faults
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

MODEL = ModelName("demo/tiny")
NAMES = ("a", "b")
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
LETTERS = "βγδζη"
"""What texts here are made of: each is one token of the emulated engines."""
PREFIX_TOKENS = 640


class Gateway:
    """A gateway process, the engines behind it, and what it was asked and decided."""

    def __init__(self, process: Process, engines: Sequence[EmulatedEngine], client: Client) -> None:
        self.process = process
        self.engines = dict(zip((f"both/{name}" for name in NAMES), engines, strict=True))
        self.client = client
        self.requests: list[Request] = []
        self.plans: list[Plan] = []
        handle = process.coordinator.handle

        def recording(event: Event, now_s: float) -> list[Action]:
            if isinstance(event, RequestArrived):
                self.requests.append(event.request)
            actions = handle(event, now_s)
            self.plans += [action.plan for action in actions if isinstance(action, Dispatch)]
            process.coordinator.validate()
            return actions

        process.coordinator.handle = recording  # type: ignore[method-assign]

    async def ask(self, path: str = "/v1/completions", **body: Any) -> tuple[str, int]:
        """One call through the gateway: where it went, and the cached tokens that were expected there."""
        await self.post(HostPort(f"127.0.0.1:{self.process.ports[0]}"), path, {"max_tokens": 2} | body)
        plan = self.plans[-1]
        return plan.decode.id, plan.chosen.figures.cached_tokens

    async def ask_engine(self, name: str, **body: Any) -> None:
        """A call that the gateway does not see."""
        await self.post(self.engines[name].address, "/v1/completions", {"max_tokens": 2} | body)

    async def post(self, address: HostPort, path: str, body: dict[str, Any]) -> None:
        raw = json.dumps({"model": MODEL} | body).encode()
        async with await self.client.request(
            "POST", address, path, body=raw, head_timeout_s=20.0
        ) as response:
            answer = await response.read_all(timeout_s=20.0)
            assert response.status == 200, answer

    def state(self, endpoint: str) -> EndpointState:
        state = self.process.coordinator.fleet.get(EndpointId(endpoint))
        assert state is not None
        return state

    def trusted(self, endpoint: str) -> bool:
        return self.process.coordinator.prefixes.trust(self.state(endpoint)) is Trust.FULL

    def told(self, endpoint: str) -> int:
        """Tokens of the last request's prompt that the engine itself says it has."""
        index = self.process.coordinator.prefixes.index(MODEL)
        assert index is not None
        return index.depth(self.state(endpoint).ordinal, self.requests[-1].token_keys) * index.block_tokens

    def sent(self, endpoint: str) -> int:
        """Blocks of it that the approximate index knows of."""
        index = self.process.coordinator.prefixes.approximate
        return index.depth(self.state(endpoint).ordinal, self.requests[-1].block_keys)

    def other(self, endpoint: str) -> str:
        (other,) = self.engines.keys() - {endpoint}
        return other

    async def metric(self, line: str) -> float:
        address = HostPort(f"127.0.0.1:{self.process.ports[0]}")
        async with await self.client.request("GET", address, "/metrics", head_timeout_s=20.0) as response:
            page = await response.read_all(timeout_s=20.0)
        found = [each.rpartition(" ") for each in page.decode().splitlines()]
        return sum(float(value) for name, _, value in found if name == line)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # What the code under test does sets no event.
            await asyncio.sleep(0.005)


def policy_of(engines: Sequence[EmulatedEngine], tokenizer: Path | None, has_render: bool) -> str:
    listed = []
    for name, engine in zip(NAMES, engines, strict=True):
        publisher = engine.host.publisher
        assert publisher is not None
        assert publisher.replay_address is not None
        ports = [urlsplit(address).port for address in (publisher.address, publisher.replay_address)]
        listed.append(
            f'{{name: {name}, address: "{engine.address}", kv_events_port: {ports[0]},'
            f" kv_events_replay_port: {ports[1]}}}"
        )
    more = "" if tokenizer is None else f", file: {tokenizer}"
    if has_render:
        more += f", render: '{engines[0].address}'"
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: m}}
model:
  name: {MODEL}
  prefix: {{mode: precise}}
  tokenizer: {{deadline_ms: 10000{more}}}
pools:
  - name: both
    role: both
    vendor: v
    engine: vllm
    connector: none
    kv_bytes_per_token: 1024
    endpoints: [{", ".join(listed)}]
    speed: {{prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 8}}
"""


@asynccontextmanager
async def gateway(
    folder: Path, tokenizer: Path | None = None, *, has_render: bool = False
) -> AsyncIterator[Gateway]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": MODEL,
                "engines": [{**ENGINE, "name": name} for name in NAMES],
            }
        )
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(100.0))
        engines, _ = await stack.enter_async_context(running(fleet, fleet.engines))
        client = await stack.enter_async_context(Client())
        path = folder / "policy.yaml"
        path.write_text(policy_of(engines, tokenizer, has_render))
        log = structlog.wrap_logger(None, processors=[LogCapture()])
        settings = load_settings(policy=path, port=0, admin_port=0, scrape_interval_s=0.02, drain_s=5.0)
        process = Process(settings, GatewayFront(settings), log)
        process.files.load_first()
        made = Gateway(process, engines, client)
        stop, started = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            served = group.create_task(process.run(stop, started.set))
            try:
                await started.wait()
                await until(lambda: all(made.state(name).is_eligible for name in made.engines))
                await until(lambda: all(made.trusted(name) for name in made.engines))
                yield made
            finally:
                stop.set()
                assert await served == 0


def prompt(tail: int, first: int = 1_000) -> list[int]:
    return [*range(first, first + PREFIX_TOKENS), *range(tail, tail + 40)]


async def test_a_prompt_goes_where_its_beginning_is_and_not_where_it_was(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        first, cached = await made.ask(prompt=prompt(5_000))
        assert (cached, made.requests[-1].is_prompt_counted) == (0, True)
        await until(lambda: made.told(first) >= PREFIX_TOKENS)
        assert await made.ask(prompt=prompt(6_000)) == (first, PREFIX_TOKENS)
        # The engine empties its cache, and the other one is sent the same by somebody else.
        await until(lambda: made.told(first) >= PREFIX_TOKENS)
        other = made.other(first)
        await made.post(made.engines[first].address, "/reset_prefix_cache", {})
        await made.ask_engine(other, prompt=prompt(7_000))
        await until(lambda: made.told(first) == 0 and made.told(other) >= PREFIX_TOKENS)
        assert (made.sent(first) > 0, made.sent(other)) == (True, 0)
        assert await made.ask(prompt=prompt(8_000)) == (other, PREFIX_TOKENS)
        # The approximate index would have been wrong, and the metrics tell.
        tokens = f'pdcoord_gateway_prefix_tokens_total{{kind="%s",model="{MODEL}"}}'
        assert await made.metric(tokens % "precise") == 2 * PREFIX_TOKENS
        assert await made.metric(tokens % "approximate") == PREFIX_TOKENS
        assert await made.metric(tokens % "apart") == PREFIX_TOKENS
        by = f'pdcoord_gateway_prefix_requests_total{{by="precise",model="{MODEL}"}}'
        assert await made.metric(by) == 3.0
        source = f'pdcoord_gateway_tokenized_total{{missing="",model="{MODEL}",source="call"}}'
        assert await made.metric(source) == 3.0
        assert await made.metric('pdcoord_gateway_kv_events_endpoints{pool="both",trust="full"}') == 2.0


async def test_an_engine_that_starts_anew_has_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        first, _ = await made.ask(prompt=prompt(5_000))
        await until(lambda: made.told(first) >= PREFIX_TOKENS)
        engine = made.engines[first]
        before = engine.host
        engine.set_faults(parse_faults(b'{"faults": [{"kind": "crash", "restart_after_s": 0.05}]}'))
        await until(lambda: engine.host is not before and engine.is_alive and engine.api.opened.is_set())
        # Whatever it says next tells that it is another process.
        async with asyncio.timeout(30.0):
            while made.told(first) > 0:
                await made.ask_engine(first, prompt=prompt(9_000, first=20_000))
                await asyncio.sleep(0.02)
        await until(lambda: all(made.state(name).is_eligible for name in made.engines))
        assert made.sent(first) > 0
        _, cached = await made.ask(prompt=prompt(6_000))
        assert cached == 0


def tokenizer_of_the_emulated_engines(folder: Path) -> Path:
    """A tokenizer.json that agrees with theirs on texts of LETTERS."""
    ids = text.encode(LETTERS)
    assert len(ids) == len(LETTERS)
    vocabulary = dict(zip(LETTERS, ids, strict=True))
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **vocabulary}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def words(count: int, last: str) -> str:
    """A text of so many tokens, and two more."""
    return "".join(LETTERS[(i * i + i // 7) % 3] for i in range(count)) + last * 2


async def test_text_is_tokenized_here_and_chats_by_an_engine(tmp_path: Path) -> None:
    async with gateway(tmp_path, tokenizer_of_the_emulated_engines(tmp_path)) as made:
        loaded = f'pdcoord_gateway_tokenized_total{{missing="",model="{MODEL}",source="%s"}}'
        # The file may still be loading.
        async with asyncio.timeout(30.0):
            while not await made.metric(loaded % "library"):
                await made.ask(prompt="η")
        text_prompt = words(PREFIX_TOKENS, "η")
        first, cached = await made.ask(prompt=text_prompt)
        assert (cached, made.requests[-1].prompt_tokens) == (0, PREFIX_TOKENS + 2)
        await until(lambda: made.told(first) >= PREFIX_TOKENS)
        assert await made.ask(prompt=words(PREFIX_TOKENS, "ζ")) == (first, PREFIX_TOKENS)
        # The same tokens by their ids are the same prompt.
        assert await made.ask(prompt=text.encode(text_prompt)) == (first, PREFIX_TOKENS)
        assert await made.metric(loaded % "engine") == 0.0

        chat = [{"role": "system", "content": words(400, "β")}, {"role": "user", "content": "Who?"}]
        chosen, cached = await made.ask("/v1/chat/completions", messages=chat)
        assert (cached, made.requests[-1].is_prompt_counted) == (0, True)
        await until(lambda: made.told(chosen) >= 400)
        chat.append({"role": "assistant", "content": "Me."})
        again, cached = await made.ask("/v1/chat/completions", messages=[*chat, chat[1]])
        assert again == chosen
        assert cached >= 400
        assert await made.metric(loaded % "engine") == 2.0


async def test_a_render_server_tells_the_tokens_of_every_kind_of_call(tmp_path: Path) -> None:
    async with gateway(tmp_path, has_render=True) as made:
        said = words(PREFIX_TOKENS, "η")
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": said}]}),
            ("/v1/messages", {"messages": [{"role": "assistant", "content": said}]}),
            ("/v1/responses", {"instructions": said, "input": "Who?", "max_output_tokens": 2}),
            ("/v1/completions", {"prompt": said}),
        ):
            first, cached = await made.ask(path, **body)
            assert (cached, made.requests[-1].is_prompt_counted) == (0, True)
            await until(lambda where=first: made.told(where) >= PREFIX_TOKENS)  # type: ignore[misc]
            again, cached = await made.ask(path, **body)
            assert again == first
            assert cached >= PREFIX_TOKENS
        source = f'pdcoord_gateway_tokenized_total{{missing="",model="{MODEL}",source="render"}}'
        assert await made.metric(source) == 8.0


async def test_without_tokens_the_approximate_index_answers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as made:
        many = [words(PREFIX_TOKENS, "η"), words(PREFIX_TOKENS, "ζ")]
        first, cached = await made.ask(prompt=many)
        assert (cached, made.requests[-1].token_keys) == (0, ())
        again, cached = await made.ask(prompt=many)
        assert again == first
        assert cached > 0
        why = f'pdcoord_gateway_tokenized_total{{missing="many-prompts",model="{MODEL}",source="none"}}'
        assert await made.metric(why) == 2.0
        by = f'pdcoord_gateway_prefix_requests_total{{by="approximate",model="{MODEL}"}}'
        assert await made.metric(by) == 2.0
