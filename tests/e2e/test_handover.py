"""Two vLLM servers hand KV over by themselves, over plain HTTP: what everything else here builds on."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

OUTPUT_TOKENS = 12
RECORDED = Path(__file__).parent.parent / "contract" / "vllm-0.32.0" / "completions.prefill.json"
ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def body(prompt: str, **members: Any) -> dict[str, Any]:
    common = {
        "model": "tiny",
        "prompt": prompt,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return common | {"max_tokens": OUTPUT_TOKENS} | members


@pytest.mark.parametrize("prompt_tokens", [129, 300])
def test_a_ticket_moves_the_whole_prompts_kv(engines: Any, words: Any, prompt_tokens: int) -> None:
    prefill, decode = engines
    prompt = words.prompt(prompt_tokens)
    pulled_before = decode.pulled_tokens
    limits = {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1}
    asked = prefill.call("/v1/completions", body(prompt, kv_transfer_params=ASK, **limits))
    assert asked.status == 200, asked.body
    ticket = asked.json()["kv_transfer_params"]
    answer = decode.call("/v1/completions", body(prompt, kv_transfer_params=ticket))
    assert answer.status == 200, answer.body
    assert answer.json()["choices"][0]["token_ids"] == decode.tokens_alone(prompt, OUTPUT_TOKENS)
    assert decode.pulled_tokens - pulled_before == prompt_tokens


def test_tickets_look_like_those_that_the_contract_tests_read(engines: Any, words: Any) -> None:
    """If this fails, run tests/e2e/record.py for this vLLM version and point tests/contract at it."""
    prefill, decode = engines
    prompt = words.prompt(200)
    asked = prefill.call("/v1/completions", body(prompt, max_tokens=1, kv_transfer_params=ASK)).json()
    recorded = json.loads(RECORDED.read_bytes())
    ticket = asked["kv_transfer_params"]
    assert ticket.keys() == recorded["kv_transfer_params"].keys()
    assert asked["system_fingerprint"].startswith("vllm-0.32.0-")
    released = decode.call("/v1/completions", body(prompt, kv_transfer_params=ticket))
    assert released.status == 200
