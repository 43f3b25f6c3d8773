"""A pull that fails on the real decode engine falls back to that engine's own prefill, before any byte."""

import json
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

OUTPUT_TOKENS = 8


def body_of(path: str, prompt: str) -> dict[str, Any]:
    common = {"model": "tiny", "temperature": 0, "ignore_eos": True}
    messages = [{"role": "user", "content": prompt}]
    match path:
        case "/v1/completions":
            return common | {"prompt": prompt, "max_tokens": OUTPUT_TOKENS}
        case "/v1/responses":
            return common | {"input": prompt, "max_output_tokens": OUTPUT_TOKENS}
        case _:
            return common | {"messages": messages, "max_tokens": OUTPUT_TOKENS}


def text_of(path: str, answer: dict[str, Any]) -> str:
    match path:
        case "/v1/completions":
            text = answer["choices"][0]["text"]
        case "/v1/chat/completions":
            text = answer["choices"][0]["message"]["content"]
        case "/v1/responses":
            text = answer["output"][0]["content"][0]["text"]
        case _:
            text = answer["content"][0]["text"]
    return str(text)


def streamed_text_of(path: str, raw: bytes) -> str:
    data = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith(b"data: {")]
    assert not any("error" in part for part in data), data
    match path:
        case "/v1/completions":
            return "".join(part["choices"][0]["text"] for part in data)
        case "/v1/chat/completions":
            return "".join(part["choices"][0]["delta"].get("content") or "" for part in data)
        case "/v1/responses":
            return "".join(part["delta"] for part in data if part["type"] == "response.output_text.delta")
        case _:
            return "".join(
                part["delta"].get("text", "") for part in data if part["type"] == "content_block_delta"
            )


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_failed_pull_ends_in_a_good_answer(fleet: Any, words: Any, path: str, *, is_stream: bool) -> None:
    body = body_of(path, words.prompt(300))
    failed_before = fleet.decode.counter("vllm:request_success_total", finished_reason="error")
    header = {"x-prefiller-host-port": fleet.liar.address}
    answer = fleet.sidecar.call(path, body | {"stream": is_stream}, header)
    assert answer.status == 200, answer.body
    # The engine really tried, and failed.
    assert fleet.decode.counter("vllm:request_success_total", finished_reason="error") == failed_before + 1
    got = streamed_text_of(path, answer.body) if is_stream else text_of(path, answer.json())
    alone = fleet.decode.call(path, body | {"cache_salt": words.prompt(20)})
    assert got == text_of(path, alone.json())
    served = json.loads(answer.headers["x-pdcoord-served"])
    assert served["mode"] == "colocated"
    assert [(rung["rung"], rung["reason"]) for rung in served["rungs"]] == [("colocated", "transfer-failed")]
