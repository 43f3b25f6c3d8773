"""Clients of gateway and sidecar get the decode server's own tokens, from a producer with smaller blocks."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

NAMES = ("bf16-128", "bf16-128-b", "bf16-32")
PREFILL, DECODE = "bf16-32", "bf16-128"
OUTPUT_TOKENS = 12
POLICY = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: e2e-pdcoord}}
model:
  name: tiny
  bytes_per_token: 1
  prefix: {{block_tokens: 128}}
pools:
  - name: prefill
    role: prefill
    vendor: cpu
    engine: vllm
    connector: pdcoord
    layout: {{preset: cpu-vec, block_tokens: 32}}
    kv_bytes_per_token: 2048
    link_gbit_per_s: 10
    endpoints: [{{name: a, address: "{prefill}", kv_port: {kv_port}}}]
    speed: {{prefill_base_ms: 5, prefill_ms_per_token: 0.1}}
    limits: {{context_tokens_max: 2048}}
  - name: decode
    role: decode
    vendor: cpu
    engine: vllm
    connector: pdcoord
    layout: {{preset: cpu-vec, block_tokens: 128}}
    kv_bytes_per_token: 2048
    link_gbit_per_s: 10
    endpoints: [{{name: a, address: "{decode}"}}]
    speed:
      {{prefill_base_ms: 50, prefill_ms_per_token: 5, step_base_ms: 10, step_us_per_sequence: 1000,
        step_ns_per_context_token: 100}}
    limits: {{context_tokens_max: 2048}}
disaggregation:
  {{mode: always, order: concurrent, uncached_tokens_min: 100, bandwidth_gbit_per_s_min: 1}}
canary: {{mode: off}}  # the first request is to be split
"""


@dataclass(frozen=True)
class Front:
    """What stands before the two servers."""

    prefill: Any
    decode: Any
    sidecar: Any
    gateway: Any


@pytest.fixture(scope="module")
def front(servers: Any, launcher: Any, tmp_path_factory: pytest.TempPathFactory) -> Front:
    running = dict(zip(NAMES, servers.up(*NAMES), strict=True))
    prefill, decode = running[PREFILL], running[DECODE]
    folder = tmp_path_factory.mktemp("front")
    sidecar, sidecar_metrics, gateway, admin = launcher.ports(4)
    bin_folder = Path(sys.executable).parent
    command = [
        *(bin_folder / "pdcoord-sidecar", "--host", "127.0.0.1", "--port", str(sidecar.port)),
        *("--engine", decode.engine.address, "--allow", f"{prefill.engine.address}/{prefill.kv_port}"),
        *("--metrics-port", str(sidecar_metrics.port)),
    ]
    launcher.serve(command, sidecar_metrics, folder)
    policy = folder / "policy.yaml"
    policy.write_text(
        POLICY.format(prefill=prefill.engine.address, kv_port=prefill.kv_port, decode=sidecar.address)
    )
    launcher.gateway(policy, gateway, admin, folder)
    return Front(prefill, decode, sidecar, gateway)


def body(prompt: str, **members: Any) -> dict[str, Any]:
    common = {"model": "tiny", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    return common | {"ignore_eos": True, "return_token_ids": True} | members


@pytest.mark.parametrize("prompt_tokens", [128, 129, 511, 700, 1300])
def test_both_legs_at_once_through_the_gateway(
    front: Front, words: Any, read_tokens: Any, is_right: Any, prompt_tokens: int
) -> None:
    prompt = words.prompt(prompt_tokens)
    pulled, failed = front.decode.engine.pulled_tokens, front.decode.failures()
    answer = front.gateway.call("/v1/completions", body(prompt))
    assert answer.status == 200, answer.body
    assert answer.headers["x-pdcoord-decision"].startswith("split")
    assert is_right(read_tokens(answer.json()), front.decode, prompt)
    assert front.decode.engine.pulled_tokens - pulled == prompt_tokens
    assert front.decode.failures() == failed


def test_a_streamed_chat_through_the_gateway(
    front: Front, words: Any, read_tokens: Any, is_right: Any
) -> None:
    content = words.prompt(600)
    asked = body("", messages=[{"role": "user", "content": content}], stream=True)
    del asked["prompt"]
    pulled = front.decode.engine.pulled_tokens
    answer = front.gateway.call("/v1/chat/completions", asked)
    assert answer.status == 200, answer.body
    chunks = [json.loads(line[6:]) for line in answer.body.splitlines() if line.startswith(b"data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    tokens = [token for choice in choices for token in choice.get("token_ids") or []]
    rendered = f"[user]{content}[assistant]"
    assert is_right(tokens, front.decode, rendered)
    assert front.decode.engine.pulled_tokens - pulled == len(rendered)


def test_one_leg_after_the_other_for_a_foreign_router(
    front: Front, words: Any, read_tokens: Any, is_right: Any
) -> None:
    """It knows nothing of us: the ticket of the prefill leg is passed on as any other."""
    prompt = words.prompt(700)
    pulled = front.decode.engine.pulled_tokens
    header = {"x-prefiller-host-port": front.prefill.engine.address}
    answer = front.sidecar.call("/v1/completions", body(prompt), header)
    assert answer.status == 200, answer.body
    assert json.loads(answer.headers["x-pdcoord-served"])["mode"] == "split"
    assert is_right(read_tokens(answer.json()), front.decode, prompt)
    assert front.decode.engine.pulled_tokens - pulled == 700
