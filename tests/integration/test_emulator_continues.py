"""An emulated engine asked to go on with an answer that another one began, over HTTP."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from pdcoord.sim import text
from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet
from pdcoord.wire.client import Client

ENGINE = {
    "profile": "intel-gaudi3-8b",
    "port": 0,
    "context_tokens_max": 4_096,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 0.2},
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass
class Fleet:
    client: Client
    engines: list[EmulatedEngine]

    async def ask(self, engine: int, path: str, **body: Any) -> tuple[int, Any]:
        raw = json.dumps(body).encode()
        async with await self.client.request(
            "POST", self.engines[engine].address, path, body=raw, head_timeout_s=20.0
        ) as response:
            return response.status, json.loads(await response.read_all(timeout_s=20.0))


@asynccontextmanager
async def started(*engines: dict[str, Any]) -> AsyncIterator[Fleet]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": "demo/tiny",
                "engines": [{**ENGINE, "name": f"e{i}", **engine} for i, engine in enumerate(engines)],
            }
        )
    )
    async with AsyncExitStack() as stack:
        made, _ = await stack.enter_async_context(running(fleet, fleet.engines))
        yield Fleet(await stack.enter_async_context(Client()), made)


def said(answer: Any) -> tuple[str, list[int], str]:
    """Text, ids and end of an answer's only choice."""
    (choice,) = answer["choices"]
    shown = choice["message"]["content"] if "message" in choice else choice["text"]
    return shown, choice["token_ids"], choice["finish_reason"]


@pytest.mark.parametrize("limit", [1, 60])
@pytest.mark.parametrize("seed", range(4))
async def test_any_engine_goes_on_with_an_answer_by_ids_and_by_text(seed: int, limit: int) -> None:
    rng = Random(seed)
    begin = "".join(
        chr(rng.choice([rng.randrange(32, 127), 233, 8_364])) for _ in range(rng.randrange(1, 90))
    )
    async with started({}, {"profile": "nvidia-h100-8b"}) as fleet:
        _, answer = await fleet.ask(0, COMPLETIONS, prompt=begin, return_token_ids=True, max_tokens=limit)
        shown, ids, finish = said(answer)
        prompt_ids = answer["choices"][0]["prompt_token_ids"]
        cut = rng.randrange(len(ids))
        rest = {"return_token_ids": True, "max_tokens": limit - cut}
        for prompt in (prompt_ids + ids[:cut], begin + text.decode(ids[:cut])):
            _, answer = await fleet.ask(1, COMPLETIONS, prompt=prompt, **rest)
            assert said(answer) == (text.decode(ids[cut:]), ids[cut:], finish)
        assert shown == text.decode(ids)


@pytest.mark.parametrize("seed", range(4))
async def test_a_chat_goes_on_with_its_last_message(seed: int) -> None:
    rng = Random(seed)
    messages: list[Any] = [
        {"role": "system", "content": "Be brief." * rng.randrange(3)},
        {"role": "user", "content": [{"type": "text", "text": "What is a lease" + "?" * rng.randrange(4)}]},
    ]
    async with started({}, {}) as fleet:
        _, answer = await fleet.ask(0, CHAT, messages=messages, return_token_ids=True)
        shown, ids, finish = said(answer)
        cut = rng.randrange(len(ids))
        begun = {"role": "assistant", "content": text.decode(ids[:cut])}
        how = {"continue_final_message": True, "add_generation_prompt": False, "return_token_ids": True}
        _, answer = await fleet.ask(1, CHAT, messages=[*messages, begun], **how)
        assert said(answer) == (shown[5 * cut :], ids[cut:], finish)


async def test_a_last_message_is_not_continued_and_begun_at_once() -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": " bada"}]
    async with started({}) as fleet:
        for how in ({}, {"add_generation_prompt": True}):
            status, answer = await fleet.ask(0, CHAT, messages=messages, continue_final_message=True, **how)
            assert status == 400
            assert "continue_final_message" in answer["error"]["message"]


async def test_a_split_continuation_says_the_same_and_wrong_kv_does_not() -> None:
    prompt = list(range(5_000, 5_300))
    halved = {"layout": {"block_tokens": 16, "order": "HND"}, "connector": "nixl"}
    doubled = {"layout": {"block_tokens": 32, "order": "HND"}, "connector": "nixl"}
    corrupt = {**doubled, "stock_silent_corruption": True}
    async with started({}, {}, halved, corrupt) as fleet:
        _, answer = await fleet.ask(0, COMPLETIONS, prompt=prompt, max_tokens=30, return_token_ids=True)
        _, ids, _ = said(answer)
        rest = {"prompt": prompt + ids[:12], "return_token_ids": True}

        async def split(prefill: int, decode: int) -> list[int]:
            leg = {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
            _, told = await fleet.ask(prefill, COMPLETIONS, **rest | leg)
            assert said(told)[1] == ids[12:13]
            ticket = {"max_tokens": 18, "kv_transfer_params": told["kv_transfer_params"]}
            status, answer = await fleet.ask(decode, COMPLETIONS, **rest | ticket)
            assert status == 200
            return said(answer)[1]

        assert await split(0, 1) == ids[12:]
        wrong = await split(2, 3)
        assert len(wrong) == 18
        assert wrong != ids[12:]
