"""The prefill server dies during traffic: no request is lost, and later ones stay together. Runs last."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.e2e

OUTPUT_TOKENS = 8
REQUEST_COUNT = 24
AT_ONCE = 4
ASKED: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": OUTPUT_TOKENS,
    "temperature": 0,
    "extra_body": {"return_token_ids": True, "ignore_eos": True},
}


@dataclass(frozen=True)
class Result:
    """What came of one request; `rendered` is the prompt as the engine saw it."""

    rendered: str
    decision: str
    tokens: list[int]


def complete(client: OpenAI, prompt: str) -> Result:
    raw = client.completions.with_raw_response.create(**ASKED, prompt=prompt)
    completion: Any = raw.parse()
    return Result(prompt, raw.headers["x-pdcoord-decision"], completion.choices[0].token_ids)


def stream_completion(client: OpenAI, prompt: str) -> Result:
    raw = client.completions.with_raw_response.create(**ASKED, prompt=prompt, stream=True)
    tokens = [token for chunk in list[Any](raw.parse()) for token in chunk.choices[0].token_ids]
    return Result(prompt, raw.headers["x-pdcoord-decision"], tokens)


def stream_chat(client: OpenAI, prompt: str) -> Result:
    raw = client.chat.completions.with_raw_response.create(
        **ASKED, messages=[{"role": "user", "content": prompt}], stream=True
    )
    choices = [chunk.choices[0] for chunk in list[Any](raw.parse())]
    tokens = [token for choice in choices for token in getattr(choice, "token_ids", None) or []]
    return Result(f"[user]{prompt}[assistant]", raw.headers["x-pdcoord-decision"], tokens)


CALLS: tuple[Callable[[OpenAI, str], Result], ...] = (complete, stream_completion, stream_chat)


def test_no_request_is_lost_when_the_prefill_server_dies(
    client: OpenAI, fleet: Any, words: Any, wait: Any
) -> None:
    some_are_done = Event()
    results: list[Result] = []

    def one(index: int) -> None:
        results.append(CALLS[index % len(CALLS)](client, words.prompt(200 + index)))
        if len(results) >= AT_ONCE:
            some_are_done.set()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(one, index) for index in range(REQUEST_COUNT)]
        assert some_are_done.wait(60)
        fleet.prefill.process.kill()
        for future in running:
            future.result(60)

    assert len(results) == REQUEST_COUNT
    assert wrong_tokens(results, fleet.decode) == []
    assert any(result.decision.startswith("split") for result in results)

    wait(lambda: prefill_health(fleet) != "ready", 60, "the gateway notices that the prefill server is gone")
    pulled_before = fleet.decode.pulled_tokens
    later = [call(client, words.prompt(300)) for call in CALLS]
    modes_and_reasons = [result.decision.partition("; ")[::2] for result in later]
    assert all(mode == "colocated" and reason for mode, reason in modes_and_reasons), modes_and_reasons
    assert wrong_tokens(later, fleet.decode) == []
    assert fleet.decode.pulled_tokens == pulled_before


def wrong_tokens(results: list[Result], decode: Any) -> list[Result]:
    """The results whose tokens are not those that the decode engine gives by itself."""
    return [r for r in results if r.tokens != decode.tokens_alone(r.rendered, OUTPUT_TOKENS)]


def prefill_health(fleet: Any) -> str:
    endpoints = fleet.admin.call("/fleet").json()["endpoints"]
    (health,) = [endpoint["health"] for endpoint in endpoints if endpoint["id"] == "prefill/a"]
    return str(health)
