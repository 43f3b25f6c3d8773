"""Split requests through gateway and sidecar: the answers of one engine, with KV moved between two."""

import json
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.e2e

OUTPUT_TOKENS = 16
EXTRA = {"return_token_ids": True, "ignore_eos": True}


def decision_of(headers: Any) -> tuple[str, str]:
    mode, _, reason = headers["x-pdcoord-decision"].partition("; ")
    return mode, reason


@pytest.mark.parametrize("prompt_tokens", [128, 129, 255, 256, 257, 700])
def test_a_split_completion_has_the_tokens_of_one_engine(
    client: OpenAI, fleet: Any, words: Any, prompt_tokens: int
) -> None:
    prompt = words.prompt(prompt_tokens)
    pulled_before = fleet.decode.pulled_tokens
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0, extra_body=EXTRA
    )
    completion: Any = raw.parse()
    assert decision_of(raw.headers)[0] == "split"
    assert fleet.decode.pulled_tokens - pulled_before == prompt_tokens
    assert completion.choices[0].token_ids == fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    assert completion.choices[0].finish_reason == "length"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, OUTPUT_TOKENS)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert getattr(completion, "kv_transfer_params", None) is None


def test_a_split_stream_has_the_tokens_of_one_engine(client: OpenAI, fleet: Any, words: Any) -> None:
    prompt = words.prompt(300)
    raw = client.completions.with_raw_response.create(
        model="tiny",
        prompt=prompt,
        max_tokens=OUTPUT_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=EXTRA,
    )
    assert decision_of(raw.headers)[0] == "split"
    chunks: list[Any] = list(raw.parse())
    tokens = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]
    assert tokens == fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [(300, OUTPUT_TOKENS)]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_split_chat_has_the_tokens_of_one_engine(
    client: OpenAI, fleet: Any, words: Any, *, is_stream: bool
) -> None:
    content = words.prompt(400)
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "extra_body": EXTRA,
    }
    pulled_before = fleet.decode.pulled_tokens
    if is_stream:
        raw = client.chat.completions.with_raw_response.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks: list[Any] = list(raw.parse())
        choices = [choice for chunk in chunks for choice in chunk.choices]
        tokens = [token for choice in choices for token in getattr(choice, "token_ids", None) or []]
        usage = chunks[-1].usage
    else:
        raw = client.chat.completions.with_raw_response.create(**asked)
        chat: Any = raw.parse()
        tokens = chat.choices[0].token_ids
        usage = chat.usage
    assert decision_of(raw.headers)[0] == "split"
    assert fleet.decode.pulled_tokens - pulled_before == usage.prompt_tokens
    rendered = f"[user]{content}[assistant]"
    assert usage.prompt_tokens == len(rendered)
    assert tokens == fleet.decode.tokens_alone(rendered, OUTPUT_TOKENS)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_responses_are_split_too(client: OpenAI, fleet: Any, words: Any, *, is_stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "input": words.prompt(300),
        "max_output_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    pulled_before = fleet.decode.pulled_tokens
    if is_stream:
        events: list[Any] = list(client.responses.create(**asked, stream=True))
        assert events[-1].type == "response.completed"
        response = events[-1].response
    else:
        response = client.responses.create(**asked)
    assert fleet.decode.pulled_tokens - pulled_before == response.usage.input_tokens
    assert response.usage.output_tokens == OUTPUT_TOKENS
    salted = asked | asked["extra_body"] | {"cache_salt": words.prompt(20)}
    del salted["extra_body"]
    alone = fleet.decode.call("/v1/responses", salted).json()
    assert response.output_text == alone["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_messages_are_split_too(fleet: Any, words: Any, *, is_stream: bool) -> None:
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": words.prompt(300)}],
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    pulled_before = fleet.decode.pulled_tokens
    answer = fleet.gateway.call("/v1/messages", asked | {"stream": is_stream})
    assert answer.status == 200, answer.body
    assert fleet.decode.pulled_tokens - pulled_before == 317
    alone = fleet.decode.call("/v1/messages", asked | {"cache_salt": words.prompt(20)}).json()
    if is_stream:
        data = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
        assert data[-1]["type"] == "message_stop"
        text = "".join(d["delta"].get("text", "") for d in data if d["type"] == "content_block_delta")
    else:
        text = answer.json()["content"][0]["text"]
    assert text == alone["content"][0]["text"]


def test_cached_tokens_are_those_of_the_prefill_engine(client: OpenAI, fleet: Any, words: Any) -> None:
    """The decode engine has pulled everything and would call all of it cached."""
    prefix = words.prompt(512)
    fleet.prefill.tokens_alone(prefix, 1)  # Another salt: it warms nothing.
    warmed = {"model": "tiny", "prompt": prefix, "max_tokens": 1, "temperature": 0}
    assert fleet.prefill.call("/v1/completions", warmed).status == 200
    completion = client.completions.create(
        model="tiny", prompt=prefix + words.prompt(100), max_tokens=4, temperature=0
    )
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 512


def test_the_engines_own_counters_prove_that_kv_moved(
    client: OpenAI, fleet: Any, words: Any, wait: Any
) -> None:
    decode, prefill = fleet.decode, fleet.prefill
    computed_before = prefill.counter("vllm:prompt_tokens_by_source_total", source="local_compute")
    own_before = decode.counter("vllm:prompt_tokens_by_source_total", source="local_compute")
    bytes_before = decode.counter("vllm:nixl_bytes_transferred_sum")
    transfers_before = decode.counter("vllm:nixl_xfer_time_seconds_count")
    failed_before = decode.counter("vllm:nixl_num_failed_transfers_total")
    client.completions.create(model="tiny", prompt=words.prompt(384), max_tokens=2, temperature=0)
    computed = prefill.counter("vllm:prompt_tokens_by_source_total", source="local_compute")
    assert computed - computed_before == 384
    assert decode.counter("vllm:prompt_tokens_by_source_total", source="local_compute") == own_before
    wait(
        lambda: decode.counter("vllm:nixl_xfer_time_seconds_count") == transfers_before + 1,
        60,
        "the decode engine counts one transfer",
    )
    assert decode.counter("vllm:nixl_bytes_transferred_sum") - bytes_before == 384 * 2048
    assert decode.counter("vllm:nixl_num_failed_transfers_total") == failed_before


@pytest.mark.parametrize("prompt_tokens", [1, 40, 127])
def test_a_short_prompt_stays_on_the_decode_engine(
    client: OpenAI, fleet: Any, words: Any, prompt_tokens: int
) -> None:
    """127 tokens are less than a block."""
    prompt = words.prompt(prompt_tokens)
    pulled_before = fleet.decode.pulled_tokens
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=prompt, max_tokens=OUTPUT_TOKENS, temperature=0, extra_body=EXTRA
    )
    mode, reason = decision_of(raw.headers)
    assert mode == "colocated"
    assert reason
    completion: Any = raw.parse()
    assert completion.choices[0].token_ids == fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    assert fleet.decode.pulled_tokens == pulled_before


def test_two_choices_stay_on_the_decode_engine(client: OpenAI, words: Any) -> None:
    raw = client.completions.with_raw_response.create(
        model="tiny", prompt=words.prompt(300), max_tokens=4, temperature=0.7, n=2, extra_body=EXTRA
    )
    assert decision_of(raw.headers)[0] == "colocated"
    completion: Any = raw.parse()
    assert [len(choice.token_ids) for choice in completion.choices] == [4, 4]


def test_a_foreign_router_needs_the_sidecar_only(fleet: Any, words: Any) -> None:
    prompt = words.prompt(300)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, **EXTRA}
    pulled_before = fleet.decode.pulled_tokens
    header = {"x-prefiller-host-port": fleet.prefill.address}
    answer = fleet.sidecar.call("/v1/completions", body, header)
    assert answer.status == 200, answer.body
    assert json.loads(answer.headers["x-pdcoord-served"])["mode"] == "split"
    assert answer.json()["choices"][0]["token_ids"] == fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    assert fleet.decode.pulled_tokens - pulled_before == 300
