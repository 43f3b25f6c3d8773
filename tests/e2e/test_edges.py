"""What surrounds a good answer: explanations, metrics, errors of the client's, and clients that leave."""

import uuid
from typing import Any

import openai
import pytest
from openai import OpenAI

pytestmark = pytest.mark.e2e

# Half a minute's work, within the model's context.
OUTPUT_TOKENS_MAX = 3_000


def test_a_split_requests_decision_can_be_read(client: OpenAI, fleet: Any, words: Any) -> None:
    request_id = f"e2e-{uuid.uuid4().hex}"
    raw = client.completions.with_raw_response.create(
        model="tiny",
        prompt=words.prompt(300),
        max_tokens=4,
        temperature=0,
        extra_headers={"x-request-id": request_id},
    )
    assert raw.headers["x-request-id"] == request_id
    decision = fleet.decision(request_id)
    assert decision["prompt_tokens"] == 300
    (attempt,) = decision["attempts"]
    assert attempt["mode"] == "split"
    assert attempt["chosen"]["prefill"] == "prefill/a"
    assert attempt["chosen"]["decode"] == "decode/a"
    assert attempt["runner_up"]["mode"] == "colocated"
    assert attempt["chosen"]["figures"]["ttft_ms"] < attempt["runner_up"]["figures"]["ttft_ms"]
    assert attempt["served"]["mode"] == "split"
    assert attempt["served"]["prefill"] == "prefill/a"
    assert attempt["served"]["prefill_ms"] > 0


def test_metrics_tell_split_from_colocated(client: OpenAI, fleet: Any, words: Any) -> None:
    def counted() -> set[str]:
        lines = fleet.gateway.call("/metrics").body.decode().splitlines()
        return {line for line in lines if line.startswith("pdcoord_") and "tiny" in line}

    before = counted()
    for tokens in (40, 300):
        client.completions.create(model="tiny", prompt=words.prompt(tokens), max_tokens=1, temperature=0)
    changed = counted() - before
    assert any('"split"' in line for line in changed)
    assert any('"colocated"' in line for line in changed)


def test_the_model_and_its_alias_are_served(client: OpenAI, words: Any) -> None:
    assert {"tiny", "small"} <= {model.id for model in client.models.list()}
    completion = client.completions.create(model="small", prompt=words.prompt(20), max_tokens=1)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 1


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="no-such-model", prompt="hello", max_tokens=1)
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["code"] == "model-unknown"


def test_embeddings_of_a_model_that_has_none_are_an_openai_error(client: OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.embeddings.create(model="tiny", input="hello", encoding_format="float")
    assert 400 <= raised.value.status_code < 500
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["message"]


def test_an_unknown_path_is_an_openai_error(fleet: Any) -> None:
    answer = fleet.gateway.call("/v1/no-such-call", {"model": "tiny"})
    assert answer.status == 404
    assert answer.json()["error"]["code"] == "path-unknown"


def test_a_prompt_past_the_context_is_the_clients_error(client: OpenAI, words: Any) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt=words.prompt(5_000), max_tokens=1)
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["message"]


@pytest.mark.parametrize(
    "ticket",
    [
        {"do_remote_prefill": True},
        {
            "do_remote_prefill": True,
            "remote_block_ids": [[1]],
            "remote_engine_id": "x",
            "remote_host": "127.0.0.1",
        },
    ],
)
@pytest.mark.parametrize("door", ["gateway", "sidecar"])
def test_a_clients_own_ticket_reaches_no_engine(fleet: Any, words: Any, ticket: Any, door: str) -> None:
    """Sent to vLLM 0.32, either of them ends the engine's process."""
    body = {"model": "tiny", "prompt": words.prompt(300), "max_tokens": 2, "kv_transfer_params": ticket}
    answer = getattr(fleet, door).call("/v1/completions", body)
    assert answer.status in {200, 400}, answer.body
    assert fleet.decode.call("/health").status == 200


def test_a_client_that_leaves_mid_stream_ends_the_engines_work(
    client: OpenAI, fleet: Any, words: Any, wait: Any
) -> None:
    decode = fleet.decode
    generated_before = decode.counter("vllm:generation_tokens_total")
    finished_before = decode.counter("vllm:request_success_total")
    stream = client.completions.create(
        model="tiny",
        prompt=words.prompt(200),
        max_tokens=OUTPUT_TOKENS_MAX,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    with stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        wait(lambda: decode.counter("vllm:num_requests_running") == 1, 60, "the decode engine runs it")
    wait(lambda: decode.counter("vllm:num_requests_running") == 0, 60, "the decode engine runs nothing")
    # Not because it had come to the end by itself.
    assert decode.counter("vllm:request_success_total") == finished_before
    generated = decode.counter("vllm:generation_tokens_total") - generated_before
    assert 3 <= generated < OUTPUT_TOKENS_MAX
    wait(
        lambda: all(endpoint["requests"] == 0 for endpoint in fleet.admin.call("/fleet").json()["endpoints"]),
        60,
        "the gateway's ledger is empty",
    )
