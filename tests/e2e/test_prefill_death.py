"""The prefill server dies during traffic: no request is lost, and later ones stay together. Runs last."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.e2e

OUTPUT_TOKENS = 8
REQUESTS = 24
AT_ONCE = 4
EXTRA = {"return_token_ids": True, "ignore_eos": True}


def complete(client: OpenAI, prompt: str, *, is_stream: bool) -> tuple[str, list[int]]:
    """The decision header and the tokens."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "extra_body": EXTRA,
    }
    if not is_stream:
        raw = client.completions.with_raw_response.create(**asked)
        completion: Any = raw.parse()
        return raw.headers["x-pdcoord-decision"], completion.choices[0].token_ids
    raw_stream = client.completions.with_raw_response.create(**asked, stream=True)
    chunks: list[Any] = list(raw_stream.parse())
    tokens = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids]
    return raw_stream.headers["x-pdcoord-decision"], tokens


def test_no_request_is_lost_when_the_prefill_server_dies(
    client: OpenAI, fleet: Any, words: Any, wait: Any
) -> None:
    prompts = [words.prompt(200 + index) for index in range(REQUESTS)]
    some_are_done = Event()
    results: list[tuple[str, list[int]]] = []

    def one(index: int) -> None:
        results.append((prompts[index], *complete(client, prompts[index], is_stream=index % 2 == 1)))
        if len(results) >= AT_ONCE:
            some_are_done.set()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(one, index) for index in range(REQUESTS)]
        assert some_are_done.wait(60)
        fleet.prefill.process.kill()
        for future in running:
            future.result(60)

    assert len(results) == REQUESTS
    wrong = [
        (len(prompt), decision, tokens)
        for prompt, decision, tokens in results
        if tokens != fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    ]
    assert wrong == []
    assert any(decision.startswith("split") for _, decision, _ in results)

    wait(lambda: is_unreachable(fleet), 30, "the gateway notices that the prefill server is gone")
    pulled_before = fleet.decode.pulled_tokens
    prompt = words.prompt(300)
    decision, tokens = complete(client, prompt, is_stream=False)
    mode, _, reason = decision.partition("; ")
    assert mode == "colocated"
    assert reason
    assert tokens == fleet.decode.tokens_alone(prompt, OUTPUT_TOKENS)
    assert fleet.decode.pulled_tokens == pulled_before


def is_unreachable(fleet: Any) -> bool:
    endpoints = fleet.admin.call("/fleet").json()["endpoints"]
    (health,) = [endpoint["health"] for endpoint in endpoints if endpoint["id"] == "prefill/a"]
    return bool(health != "ready")
