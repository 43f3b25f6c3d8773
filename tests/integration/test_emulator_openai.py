"""The official openai client against one emulated engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from pdcoord.sim.emulator import EmulatedEngine, running
from pdcoord.sim.fleetfile import EmulatedFleet

MODEL = "demo/tiny"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is a lease?"}]},
]
ENGINE = {
    "name": "e",
    "profile": "intel-gaudi3-8b",
    "port": 0,
    "context_tokens_max": 2_048,
    "speed": {"prefill_base_ms": 0.1, "prefill_ms_per_token": 0.001, "step_base_ms": 0.5},
}


@asynccontextmanager
async def started(**fields: Any) -> AsyncIterator[tuple[EmulatedEngine, openai.AsyncOpenAI]]:
    fleet = EmulatedFleet.model_validate_json(
        json.dumps(
            {
                "apiVersion": "pdcoord.io/v1alpha1",
                "kind": "EmulatedFleet",
                "model": MODEL,
                "engines": [{**ENGINE, **fields}],
            }
        )
    )
    async with running(fleet, fleet.engines) as ((engine,), _):
        url = f"http://{engine.address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=30.0) as client:
            yield engine, client


async def test_chat_whole_and_streamed_say_the_same() -> None:
    async with started() as (_, client):
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12
        text, roles, usage, ends = "", [], None, []
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
                ends += [choice.finish_reason] if choice.finish_reason else []
        assert text == whole.choices[0].message.content
        assert roles == ["assistant"]
        assert ends == ["length"]
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 12)


async def test_completions_whole_and_streamed_say_the_same() -> None:
    async with started() as (_, client):
        whole = await client.completions.create(model=MODEL, prompt=["one", "two"], n=2, max_tokens=6)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert len({choice.text for choice in whole.choices}) == 4
        texts = dict.fromkeys(range(4), "")
        async for chunk in await client.completions.create(
            model=MODEL, prompt=["one", "two"], n=2, max_tokens=6, stream=True
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == {choice.index: choice.text for choice in whole.choices}


async def test_an_answer_ends_of_itself_or_at_a_stop_string() -> None:
    async with started() as (engine, client):
        free = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        text = free.choices[0].message.content or ""
        assert free.choices[0].finish_reason == "stop"
        assert 16 <= len(text.split()) <= 256
        stop = text[12:20]
        cut = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=[stop, "never"])
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].message.content == text[: text.index(stop)]
        kept = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stop=stop, extra_body={"include_stop_str_in_output": True}
        )
        assert kept.choices[0].message.content == text[: text.index(stop) + len(stop)]
        streamed = ""
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stop=stop, stream=True
        ):
            streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert streamed == text[: text.index(stop)]
        async with asyncio.timeout(10.0):
            while engine.host.model.running_count:
                await asyncio.sleep(0.01)


async def test_responses_whole_and_streamed_say_the_same() -> None:
    async with started() as (_, client):
        whole = await client.responses.create(
            model=MODEL, input="Hello", instructions="Be brief.", max_output_tokens=9
        )
        assert whole.status == "incomplete"
        assert whole.usage is not None
        assert whole.usage.output_tokens == 9
        deltas, kinds = "", []
        async for event in await client.responses.create(
            model=MODEL, input="Hello", instructions="Be brief.", max_output_tokens=9, stream=True
        ):
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                deltas += event.delta
        assert deltas == whole.output_text
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"


async def test_embeddings_and_models() -> None:
    async with started() as (_, client):
        one = await client.embeddings.create(model=MODEL, input=["a text", "another"])
        plain = await client.embeddings.create(model=MODEL, input="a text", encoding_format="float")
        assert one.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
        assert one.data[0].embedding != one.data[1].embedding
        assert one.usage.prompt_tokens == 5
        models = await client.models.list()
        assert [model.id for model in models.data] == [MODEL]


async def test_a_repeated_prompt_reports_what_was_cached() -> None:
    async with started() as (_, client):
        for expected in (0, 384):
            answer = await client.completions.create(model=MODEL, prompt=list(range(500)), max_tokens=1)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == expected


async def test_errors_are_the_clients_own_kinds() -> None:
    async with started(running_max=1, queued_max=1) as (engine, client):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
            await client.completions.create(model=MODEL, prompt="x" * 4_000, max_tokens=2_000)
        with pytest.raises(openai.BadRequestError, match="'n'"):
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=0)
        with pytest.raises(openai.BadRequestError, match="messages"):
            await client.chat.completions.create(model=MODEL, messages=[])
        long: Any = {"model": MODEL, "prompt": "x", "max_tokens": 2_000}
        async with asyncio.TaskGroup() as group:
            busy = []
            for index in range(2):
                busy.append(group.create_task(client.completions.create(**long)))
                async with asyncio.timeout(10.0):
                    while engine.host.model.running_count + engine.host.model.waiting_count <= index:
                        await asyncio.sleep(0.005)
            with pytest.raises(openai.InternalServerError) as caught:
                await client.completions.create(**long)
            assert caught.value.status_code == 503
            for task in busy:
                task.cancel()
