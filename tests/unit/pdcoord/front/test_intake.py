"""From a call to the core's request."""

import json
from array import array
from dataclasses import replace
from typing import Any

import pytest

from pdcoord.core.blocks import block_keys, token_keys
from pdcoord.core.model import Model
from pdcoord.core.request import RequestId
from pdcoord.front.intake import build_request, check_reserved, client_request_id, model_unknown
from pdcoord.protocol.errors import RefusedError
from pdcoord.protocol.openai import APIS, parse_call

ID = RequestId("r")


def parse(path: str, **body: Any) -> Any:
    return parse_call(APIS[path], json.dumps({"model": "org/model", **body}).encode())


@pytest.mark.parametrize(("length", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (4_096, 1_024)])
def test_tokens_of_a_text_are_estimated_and_rounded_up(model: Model, length: int, tokens: int) -> None:
    request = build_request(ID, parse("/v1/completions", prompt="x" * length), model)
    assert (request.prompt_tokens, request.is_prompt_counted) == (tokens, False)


def test_token_ids_are_counted_and_a_block_of_them_is_a_block_of_tokens(model: Model) -> None:
    model = replace(model, bytes_per_token=3.0, prefix_block_tokens=16)
    request = build_request(ID, parse("/v1/completions", prompt=list(range(40))), model)
    assert (request.prompt_tokens, len(request.block_keys), request.block_tokens) == (40, 2, 16)
    assert request.is_prompt_counted


def test_text_blocks_are_keyed_by_model_and_salt(model: Model) -> None:
    call = parse("/v1/completions", prompt="x" * 600, cache_salt="tenant")
    request = build_request(ID, call, model)
    expected = block_keys(b"x" * 600, model="org/model", cache_salt="tenant", block_bytes=256)
    assert request.block_keys == expected
    assert len(expected) == 2


def test_known_tokens_are_counted_and_keyed_beside_the_text(model: Model) -> None:
    model = replace(model, precise_block_tokens=8)
    call = parse("/v1/completions", prompt="x" * 600, cache_salt="tenant")
    request = build_request(ID, call, model, array("I", range(20)))
    assert (request.prompt_tokens, request.is_prompt_counted) == (20, True)
    expected = token_keys(range(20), model="org/model", cache_salt="tenant", block_tokens=8)
    assert (request.token_keys, request.token_block_tokens) == (expected, 8)
    assert len(expected) == 2
    assert request.block_keys == build_request(ID, call, model).block_keys
    assert build_request(ID, call, model).token_keys == ()


def test_an_alias_shares_the_models_keys(model: Model) -> None:
    one = build_request(ID, parse("/v1/completions", prompt="x" * 600), model)
    other = build_request(
        ID, parse_call(APIS["/v1/completions"], b'{"model":"alias","prompt":"' + b"x" * 600 + b'"}'), model
    )
    assert one == other


def test_an_adapter_shares_nobodys_keys(model: Model) -> None:
    model = replace(model, adapters=("sql", "law"))
    found = {}
    for name in ("org/model", "alias", "sql", "law"):
        call = parse_call(
            APIS["/v1/completions"], b'{"model":"%b","prompt":"%b"}' % (name.encode(), b"x" * 600)
        )
        found[name] = build_request(ID, call, model, array("I", range(64)))
    assert {request.model for request in found.values()} == {"org/model"}
    assert [request.adapter for request in found.values()] == ["", "", "sql", "law"]
    assert found["alias"] == found["org/model"]
    apart = [found[name] for name in ("org/model", "sql", "law")]
    for keys in ([each.block_keys for each in apart], [each.token_keys for each in apart]):
        assert len({key for each in keys for key in each}) == 3 * len(keys[0]) > 0
    expected = token_keys(range(64), model="org/model", lora="sql", block_tokens=model.precise_block_tokens)
    assert found["sql"].token_keys == expected  # As an engine tells of a block with this lora_name.


def test_a_call_without_a_decode_phase_leaves_no_prefix(model: Model) -> None:
    request = build_request(ID, parse("/v1/embeddings", input="x" * 600), model)
    assert (request.is_generative, request.block_keys) == (False, ())


def test_choices_and_limits_are_passed_on(model: Model) -> None:
    request = build_request(ID, parse("/v1/chat/completions", messages=[{}], n=3, max_tokens=7), model)
    assert (request.choice_count, request.output_tokens_max, request.is_generative) == (3, 7, True)


def test_a_long_name_is_cut_in_the_message() -> None:
    assert len(model_unknown("x" * 1_000_000).message) < 300


@pytest.mark.parametrize(
    ("brought", "request_id", "is_kept"),
    [
        ((b"authorization", b"Bearer 0123456789abcdef"), b"0123456789abcdef", False),
        ((b"authorization", b"Bearer 0123456789abcdef"), b"id:0123456789abcdef;1", False),
        ((b"authorization", b"0123456789abcdef"), b"0123456789abcdef", False),
        ((b"x-api-key", b" 0123456789abcdef "), b"0123456789abcdef", False),
        ((b"accept", b"0123456789abcdef"), b"0123456789abcdef", True),
        ((b"authorization", b"Bearer 0123456789abcdef"), b"0123456789abcdeg", True),
        # What clients put where no key is needed is none.
        ((b"authorization", b"Bearer EMPTY"), b"EMPTY-1", True),
        ((b"authorization", b"Bearer "), b"call-1", True),
        ((b"accept", b"x"), b"pdc_0123456789", False),
        ((b"accept", b"x"), b"sk-0123456789abcdef0123", False),
        ((b"accept", b"x"), b"call:sk-ant-api03-0123456789abcdef", False),
        ((b"accept", b"x"), b"task-0123456789abcdef0123", True),
    ],
)
def test_a_key_is_no_request_id(brought: tuple[bytes, bytes], request_id: bytes, is_kept: bool) -> None:
    headers = [(b"x-request-id", request_id), brought]
    assert client_request_id(headers) == (request_id.decode() if is_kept else None)


@pytest.mark.parametrize(
    "field",
    [
        {"bootstrap_addr": "http://10.0.0.1:1"},
        {"vllm_xargs": {"kv_transfer_params": {"do_remote_prefill": True}}},
        {"sampling_params": {"extra_args": {"kv_transfer_params": {}}}},
    ],
)
def test_no_steering_field_passes_at_any_depth(field: dict[str, Any]) -> None:
    raw = json.dumps({"model": "m", "prompt": "x", **field}).encode()
    with pytest.raises(RefusedError, match="reserved"):
        check_reserved(parse_call(APIS["/v1/completions"], raw))
