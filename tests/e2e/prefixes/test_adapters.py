"""Two vLLM servers with LoRA adapters, which tell a gateway with precise prefixes of their KV blocks."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.e2e

MODEL, ADAPTERS = "tiny", ("sql", "law")
NAMES = ("one", "two")
BLOCK_TOKENS = 128
PROMPT_TOKENS = 700
CACHED_TOKENS = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
HEARD_S = 60.0
REQUEST_S = 60.0


@dataclass
class Fleet:
    engines: dict[str, Any]
    gateway: Any
    admin: Any
    wait: Any

    def ask(self, model: str, prompt: str) -> tuple[str, int, int, list[int]]:
        """Where a call went, the cached tokens expected and found there, and the answer's tokens."""
        answer = self.gateway.call("/v1/completions", body(model, prompt))
        assert answer.status == 200, answer.body
        told = answer.json()
        assert told["model"] == model
        decision = self.admin.call(f"/decisions/{answer.headers['x-request-id']}").json()
        chosen = decision["attempts"][-1]["chosen"]
        found = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        expected = chosen["figures"]["cached_tokens"]
        return chosen["decode"], expected, found, told["choices"][0]["token_ids"]

    def blocks_heard_of(self) -> float:
        count: float = self.gateway.counter("pdcoord_gateway_kv_event_blocks_total")
        return count


def body(model: str, prompt: str) -> dict[str, Any]:
    asked = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    return {**asked, "ignore_eos": True, "return_token_ids": True}


def policy_text(engines: dict[str, Any], kv_ports: dict[str, int]) -> str:
    listed = "\n".join(
        f'      - {{name: {name}, address: "{engine.address}", kv_events_port: {kv_ports[name]}}}'
        for name, engine in engines.items()
    )
    return f"""\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {{name: e2e}}
model:
  name: {MODEL}
  adapters: [{", ".join(ADAPTERS)}]
  bytes_per_token: 1
  prefix: {{mode: precise}}
  tokenizer: {{deadline_ms: 10000}}
pools:
  - name: both
    role: both
    vendor: cpu
    engine: vllm
    connector: none
    kv_bytes_per_token: 2048
    speed: {{prefill_base_ms: 5, prefill_ms_per_token: 1, step_base_ms: 10}}
    endpoints:
{listed}
"""


@pytest.fixture(scope="module")
def fleet(launcher: Any, tmp_path_factory: pytest.TempPathFactory, wait: Any) -> Fleet:
    launcher.processes.stop_all()
    folder = tmp_path_factory.mktemp("adapters")
    paths = [
        f"{name}={launcher.make_model(folder / name, seed, is_adapter=True)}"
        for seed, name in enumerate(ADAPTERS)
    ]
    gateway, admin, *ports = launcher.ports(2 + len(NAMES))
    kv_ports = {name: each.port for name, each in zip(NAMES, ports, strict=True)}
    engines = {}
    for name, port in kv_ports.items():
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
        flags = ("--kv-events-config", json.dumps(events), "--enable-lora", "--lora-modules", *paths)
        engines[name] = launcher.begin(name, flags, {}, folder)
    launcher.wait(*engines.values())
    policy = folder / "policy.yaml"
    policy.write_text(policy_text(engines, kv_ports))
    launcher.gateway(policy, gateway, admin, folder)
    return Fleet(engines, gateway, admin, wait)


def test_a_prefix_is_that_of_its_adapter_alone(fleet: Fleet, words: Any) -> None:
    prompt = words.prompt(PROMPT_TOKENS)
    answers = {name: fleet.ask(name, prompt) for name in (MODEL, *ADAPTERS)}
    assert {(expected, found) for _, expected, found, _ in answers.values()} == {(0, 0)}
    assert len({tuple(tokens) for *_, tokens in answers.values()}) == 3, "an adapter that changes nothing"
    for name, (where, _, _, tokens) in answers.items():
        assert fleet.ask(name, prompt) == (where, CACHED_TOKENS, CACHED_TOKENS, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_engine_tells_of_an_adapters_blocks_is_for_that_adapter(
    fleet: Fleet, words: Any, name: str
) -> None:
    """The gateway sees none of the calls that fill the cache."""
    prompt, before = words.prompt(PROMPT_TOKENS), fleet.blocks_heard_of()
    assert fleet.engines[name].call("/v1/completions", body("sql", prompt)).status == 200

    def is_heard() -> bool:
        return fleet.blocks_heard_of() >= before + CACHED_TOKENS // BLOCK_TOKENS

    fleet.wait(is_heard, HEARD_S, "the gateway has heard of the adapter's blocks")
    assert fleet.ask("sql", prompt)[:3] == (f"both/{name}", CACHED_TOKENS, CACHED_TOKENS)
    for other in (MODEL, "law"):
        assert fleet.ask(other, prompt)[1:3] == (0, 0)


def test_adapters_are_models_to_the_official_client(fleet: Fleet) -> None:
    url = f"http://{fleet.gateway.address}/v1"
    with OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=REQUEST_S) as client:
        assert [model.id for model in client.models.list()] == [MODEL, *ADAPTERS]
        answer = client.chat.completions.create(
            model="law", messages=[{"role": "user", "content": "hello"}], max_tokens=4
        )
        assert answer.model == "law"
        assert answer.choices[0].message.content
