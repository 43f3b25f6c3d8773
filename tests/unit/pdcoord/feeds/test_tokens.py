"""Where a prompt's tokens come from, why they are not known, and who is asked when."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import Endpoint, EndpointId, EngineKind, ModelName, Pool, PoolName, Role
from pdcoord.core.model import Model, PrefixMode, Tokenizing
from pdcoord.feeds.conversations import Ids
from pdcoord.feeds.tokens import TokenHooks, TokenLimits, TokensFeed, TokensMissing, TokenSource
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.openai import APIS, Call, parse_call
from pdcoord.wire.errors import ConnectError, StreamError
from transfer.verdict import Connector, Side

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LIMITS = TokenLimits(threads=1, refresh_s=0.01, asked_max=2)


def pool(engine: EngineKind = EngineKind.VLLM) -> Pool:
    return Pool(
        name=PoolName("p"),
        model=ModelName("m"),
        role=Role.BOTH,
        vendor="v",
        engine=engine,
        side=Side(Connector.NONE, None),
        speed=SpeedFigures(0.0, 0.0, 0.0),
        kv_bytes_per_token=1,
        link_bytes_per_s=0.0,
    )


def endpoint(name: str, engine: EngineKind = EngineKind.VLLM) -> Endpoint:
    return Endpoint(EndpointId(f"p/{name}"), pool(engine), HostPort(f"{name}:1"))


def parse(path: str, **body: Any) -> Call:
    return parse_call(APIS[path], json.dumps({"model": "m", **body}).encode())


class Reply:
    def __init__(self, body: bytes, status: int) -> None:
        self.status, self.body = status, body

    async def read_all(self, *, timeout_s: float, bytes_max: int) -> bytes:
        return self.body

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        pass


class Bench:
    """A feed over a scripted client."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.model = Model(
            ModelName("m"),
            (pool(),),
            prefix_mode=PrefixMode.PRECISE,
            tokenizing=Tokenizing(deadline_s=30.0),
        )
        self.models = [self.model]
        self.ready = [endpoint("a"), endpoint("b")]
        self.asked: list[tuple[str, str]] = []
        self.answer: bytes | Exception | None = b'{"tokens": [1, 2, 3]}'
        self.status = 200
        self.told: list[tuple[TokenSource, TokensMissing | None]] = []
        self.refused: list[tuple[str, str]] = []
        self.feed = TokensFeed(
            models=lambda: self.models,
            ready=lambda _: self.ready,
            client=self,  # type: ignore[arg-type]
            clock=lambda: self.now_s,
            limits=LIMITS,
            hooks=TokenHooks(
                lambda _model, source, missing, _s: self.told.append((source, missing)),
                lambda file, why: self.refused.append((file, why)),
            ),
        )

    def set(self, **tokenizing: Any) -> None:
        self.model = replace(self.model, tokenizing=replace(self.model.tokenizing, **tokenizing))
        self.models = [self.model]

    async def request(self, method: str, address: str, target: str, **options: object) -> Reply:
        self.asked.append((address, target))
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return Reply(self.answer, self.status)

    async def of(self, path: str, **body: Any) -> list[int] | None:
        found = await self.feed.tokens(parse(path, **body), self.model)
        return None if found is None else list(found)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    await made.feed.refresh()
    yield made
    made.feed.close()


def save(folder: Path, *words: str) -> str:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("prompt", [[5, 6], [[5, 6]]])
async def test_a_call_that_brings_ids_asks_nobody(bench: Bench, prompt: list[Any]) -> None:
    assert await bench.of(COMPLETION, prompt=prompt) == [5, 6]
    assert (bench.told, bench.asked) == ([(TokenSource.CALL, None)], [])


@pytest.mark.parametrize("prompt", ["b a zzz", ["b a zzz"]])
async def test_text_is_tokenized_by_the_file(bench: Bench, tmp_path: Path, prompt: Any) -> None:
    bench.set(file=save(tmp_path, "?", "a", "b"))
    await bench.feed.refresh()
    assert await bench.of(COMPLETION, prompt=prompt) == [2, 1, 0]
    assert (bench.told, bench.asked) == ([(TokenSource.LIBRARY, None)], [])


async def test_a_file_that_changed_is_loaded_again_and_a_bad_one_is_said_once(
    bench: Bench, tmp_path: Path
) -> None:
    bench.set(file=save(tmp_path, "?", "a", "b"))
    await bench.feed.refresh()
    save(tmp_path, "?", "x", "a", "b")
    await bench.feed.refresh()
    assert await bench.of(COMPLETION, prompt="b") == [3]
    (tmp_path / "tokenizer.json").write_text("nonsense")
    for _ in range(3):
        await bench.feed.refresh()
    assert [(Path(file).name, "no tokenizer" in why) for file, why in bench.refused] == [
        ("tokenizer.json", True)
    ]
    # The last good one stays.
    assert await bench.of(COMPLETION, prompt="a") == [2]
    (tmp_path / "tokenizer.json").unlink()
    await bench.feed.refresh()
    assert await bench.of(COMPLETION, prompt="a b") == [2, 3]
    bench.set(file=None)
    await bench.feed.refresh()
    assert await bench.of(COMPLETION, prompt="b a") == [1, 2, 3]
    assert bench.told[-1] == (TokenSource.ENGINE, None)


async def test_engines_are_asked_in_turn_and_an_answer_is_kept(bench: Bench) -> None:
    for text in ("x", "y", "x"):
        assert await bench.of(COMPLETION, prompt=text) == [1, 2, 3]
    assert await bench.of(CHAT, messages=HELLO) == [1, 2, 3]
    assert [target for _, target in bench.asked] == ["/tokenize"] * 3
    assert {address for address, _ in bench.asked} == {"a:1", "b:1"}
    assert set(bench.told) == {(TokenSource.ENGINE, None)}


async def test_a_render_server_is_asked_for_all_but_what_the_file_knows(bench: Bench, tmp_path: Path) -> None:
    bench.set(file=save(tmp_path, "?", "a"), render=HostPort("r:1"))
    await bench.feed.refresh()
    bench.answer = b'{"token_ids": [4]}'
    assert await bench.of(COMPLETION, prompt="a") == [1]
    for path, body in (
        (CHAT, {"messages": HELLO}),
        ("/v1/messages", {"messages": HELLO}),
        ("/v1/responses", {"input": "hello"}),
    ):
        assert await bench.of(path, **body) == [4]
    assert bench.asked == [("r:1", f"{path}/render") for path in (CHAT, "/v1/messages", "/v1/responses")]
    assert bench.told[1:] == [(TokenSource.RENDER, None)] * 3


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        (COMPLETION, {"prompt": ["a", "b"]}, TokensMissing.MANY_PROMPTS),
        (COMPLETION, {"prompt": [[1], [2]]}, TokensMissing.MANY_PROMPTS),
        (COMPLETION, {"prompt_embeds": "x"}, TokensMissing.KIND),
        (COMPLETION, {"prompt": "a", "prompt_embeds": "x"}, TokensMissing.KIND),
        (COMPLETION, {"prompt": [1], "truncate_prompt_tokens": 1}, TokensMissing.TRUNCATED),
        (COMPLETION, {"prompt": "a" * ((1 << 20) + 1)}, TokensMissing.TOO_LONG),
        ("/v1/messages", {"messages": HELLO}, TokensMissing.KIND),
        (CHAT, {"messages": [{"role": "u", "content": [{"type": "image_url"}]}]}, TokensMissing.MEDIA),
        (CHAT, {"messages": [{"role": "u", "content": [{"type": ["text"]}]}]}, TokensMissing.MEDIA),
        ("/v1/responses", {"input": "a", "truncation": {"type": "auto"}}, TokensMissing.TRUNCATED),
    ],
)
async def test_calls_whose_tokens_tell_nothing_ask_nobody(
    bench: Bench, path: str, body: dict[str, Any], why: TokensMissing
) -> None:
    assert await bench.of(path, **body) is None
    assert (bench.told, bench.asked) == ([(TokenSource.NONE, why)], [])


async def test_a_call_nested_as_deep_as_can_be_read_has_no_tokens(bench: Bench) -> None:
    call, depth = parse(CHAT, messages=HELLO), 1
    with suppress(RefusedError):
        while True:
            raw = json.dumps({"model": "m", "messages": HELLO, "tools": "here"})
            raw = raw.replace('"here"', "[" * depth + "]" * depth)
            call, depth = parse_call(APIS[CHAT], raw.encode()), depth + 1

    async def asked(frames: int) -> Ids | None:
        return await (asked(frames - 1) if frames else bench.feed.tokens(call, bench.model))

    assert await asked(20) is None
    assert bench.told == [(TokenSource.NONE, TokensMissing.KIND)]


@pytest.mark.parametrize(
    ("answer", "status", "why"),
    [
        (b"", 404, TokensMissing.REFUSED),
        (b"nonsense", 200, TokensMissing.FAILED),
        (ConnectError("down"), 200, TokensMissing.FAILED),
        (StreamError("cut"), 200, TokensMissing.FAILED),
    ],
)
async def test_a_server_that_gives_no_tokens_is_counted_by_reason(
    bench: Bench, answer: Any, status: int, why: TokensMissing
) -> None:
    bench.answer, bench.status = answer, status
    assert await bench.of(CHAT, messages=HELLO) is None
    assert bench.told == [(TokenSource.NONE, why)]


async def test_a_server_that_fails_is_left_alone_for_longer_each_time(bench: Bench) -> None:
    bench.ready = [endpoint("a")]
    await bench.feed.refresh()
    bench.answer = ConnectError("down")
    pauses, last_s = [], bench.now_s
    await bench.of(CHAT, messages=HELLO)
    while len(pauses) < 7:
        bench.now_s += 0.5
        assert await bench.of(CHAT, messages=HELLO) is None
        if len(bench.asked) > len(pauses) + 1:
            pauses.append(bench.now_s - last_s)
            last_s = bench.now_s
            assert bench.told[-1][1] is TokensMissing.FAILED
        else:
            assert bench.told[-1][1] is TokensMissing.NO_SERVER
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    bench.now_s += 30.0
    bench.answer = b'{"tokens": [9]}'
    assert await bench.of(CHAT, messages=HELLO) == [9]


async def test_only_ready_engines_with_a_chat_template_are_asked(bench: Bench) -> None:
    bench.ready = [endpoint("s", EngineKind.SGLANG)]
    await bench.feed.refresh()
    assert await bench.of(CHAT, messages=HELLO) is None
    assert bench.told == [(TokenSource.NONE, TokensMissing.NO_SERVER)]


async def test_a_text_whose_file_cannot_be_used_says_so_where_nobody_can_be_asked(bench: Bench) -> None:
    bench.set(file="/nowhere/tokenizer.json")
    bench.ready = []
    await bench.feed.refresh()
    assert await bench.of(COMPLETION, prompt="a") is None
    assert bench.told == [(TokenSource.NONE, TokensMissing.NO_TOKENIZER)]
    assert bench.refused == [("/nowhere/tokenizer.json", "No such file or directory")]


async def test_past_the_deadline_a_request_goes_on_without(bench: Bench) -> None:
    bench.answer = None
    bench.set(deadline_s=0.01)
    assert await bench.of(CHAT, messages=HELLO) is None
    assert bench.told == [(TokenSource.NONE, TokensMissing.DEADLINE)]


async def test_questions_under_way_are_bounded(bench: Bench) -> None:
    bench.answer = None
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(bench.of(CHAT, messages=HELLO, seed=i)) for i in range(2)]
        await until(lambda: len(bench.asked) == 2)
        assert await bench.of(CHAT, messages=HELLO) is None
        assert bench.told == [(TokenSource.NONE, TokensMissing.BUSY)]
        for task in waiting:
            task.cancel()
    bench.answer = b'{"tokens": [9]}'
    assert await bench.of(CHAT, messages=HELLO) == [9]


async def test_half_a_surrogate_pair_has_no_tokens(bench: Bench, tmp_path: Path) -> None:
    bench.set(file=save(tmp_path, "?", "a"))
    await bench.feed.refresh()
    call = replace(parse(COMPLETION, prompt="x"), body={"model": "m", "prompt": "\ud800"})
    assert await bench.feed.tokens(call, bench.model) is None
    assert bench.told == [(TokenSource.NONE, TokensMissing.NOT_TEXT)]


async def test_it_runs_until_cancelled(bench: Bench, tmp_path: Path) -> None:
    bench.models = []
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.feed.run())
        bench.set(file=save(tmp_path, "?", "a"))
        bench.model = bench.models[0]
        found = None
        async with asyncio.timeout(20.0):
            while bench.told[-1:] != [(TokenSource.LIBRARY, None)]:
                found = await bench.of(COMPLETION, prompt="a")
                await asyncio.sleep(0.005)
        assert found == [1]
        task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():
            await asyncio.sleep(0.001)
