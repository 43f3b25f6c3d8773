"""Tests of warnings: every one's golden line, and none for what is sound."""

from pathlib import Path

import pytest

from pdcoord.policy.compile import compile_policy
from pdcoord.policy.errors import quote
from pdcoord.policy.load import parse_policies


def warnings_of(text: str) -> list[str]:
    return [str(warning) for warning in compile_policy(parse_policies(text.encode(), "p")).warnings]


def test_a_sound_policy_has_none(good: str) -> None:
    assert warnings_of(good) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "connector: pdcoord\n    layout: {block_tokens: 64",
            "connector: nixl\n    layout: {block_tokens: 64",
            (
                "p:8: pools[0]: pool fast gets no work: fast -> wide: connectors differ: pdcoord cannot "
                "feed nixl"
            ),
        ),
        (
            "mode: auto",
            "mode: never",
            "p:8: pools[0]: pool fast gets no work: disaggregation.mode is never",
        ),
        (
            "    link_gbit_per_s: 100\n    endpoints: [",
            "    endpoints: [",
            "p:20: pools[1]: pool wide has no link_gbit_per_s, so nothing is split with it",
        ),
        (
            "    link_gbit_per_s: 100\n    endpoints: [",
            "    link_gbit_per_s: 1\n    endpoints: [",
            (
                "p:27: pools[1].link_gbit_per_s: is 1, below bandwidth_gbit_per_s_min (8), so nothing is "
                "split here"
            ),
        ),
        (
            "kv_bytes_per_token: 131072\n    link_gbit_per_s: 100\n    endpoints: [",
            "kv_bytes_per_token: 65536\n    link_gbit_per_s: 100\n    endpoints: [",
            (
                "p:26: pools[1].kv_bytes_per_token: is 65536, but pool fast has 131072 with the same dtype "
                "(bfloat16)"
            ),
        ),
    ],
)
def test_each_has_its_line(good: str, old: str, new: str, expected: str) -> None:
    assert good.count(old) == 1
    assert warnings_of(good.replace(old, new)) == [expected]


def test_a_fleet_that_can_only_split_is_warned_of(good: str) -> None:
    text = good.replace("engine: vllm", "engine: sglang").replace("connector: pdcoord", "connector: sglang")
    text = text.replace("{block_tokens: 64, order: NHD}", "{block_tokens: 16, order: HND}")
    assert warnings_of(text) == [
        (
            "p:7: pools: no pool can serve a request alone, so requests that cannot be split (n > 1, "
            "embeddings) are refused; add a pool with role both"
        )
    ]


def test_an_address_of_two_models_is_warned_of(good: str) -> None:
    other = good.replace("llama", "other").replace("fast", "fast2").replace("wide", "wide2")
    other = other.replace("10.0.0.1", "10.1.0.1").replace("10.0.0.2", "10.1.0.2")
    assert warnings_of(f"{good}---\n{other}") == [
        "p:61: pools[1].endpoints[0].address: is 10.0.1.1:8000, which serves another model too (line 28)"
    ]


PRECISE = "prefix: {mode: precise}"


def precise(good: str, more: str = "") -> str:
    text = good.replace('"10.0.0.1:8000"}', '"10.0.0.1:8000", kv_events_port: 5557}')
    text = text.replace('"10.0.0.2:8000"}', '"10.0.0.2:8000", kv_events_port: 5557}')
    return text.replace("aliases: [llama]", PRECISE + more)


SILENT = "p:28: pools[1].endpoints: 1 of 1 have no kv_events_port, so their prefixes are approximate"


def test_pools_that_tell_nothing_are_warned_of(good: str) -> None:
    assert warnings_of(precise(good)) == [SILENT]


def test_a_tokenizer_that_is_not_there_is_warned_of(good: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = precise(good, f"\n  tokenizer: {{file: {path}}}")
    assert warnings_of(text) == [
        SILENT.replace("p:28", "p:29"),
        (
            f"p:7: model.tokenizer.file: is {quote(str(path))}, which is no file here, so prompts are asked "
            "of the engines"
        ),
    ]
    path.write_text("{}")
    assert warnings_of(text) == [SILENT.replace("p:28", "p:29")]


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [
        (
            "{ladder: [colocated], resume: {tries_max: 2}}",
            "fallback.resume: is not used: fallback.ladder has no resume; add it there",
        ),
        (
            "{ladder: [resume], hedge: {share_max: 0.5}}",
            "fallback.hedge: is not used: fallback.ladder has no other-decode; add it there",
        ),
        (
            "{ladder: [other-decode], other_decode_max: 0}",
            "fallback.other_decode_max: is 0, so the rung other-decode in fallback.ladder is never taken",
        ),
        ("{ladder: [other-prefill], hedge: {share_max: 0}}", ""),
        ("{resume: {tries_max: 2}, hedge: {share_max: 0.1}, other_decode_max: 1}", ""),
    ],
)
def test_what_the_ladder_makes_idle_is_warned_of(good: str, fallback: str, expected: str) -> None:
    text = good.replace("fallback: {ladder: [other-prefill, colocated]}", f"fallback: {fallback}")
    found = [warning.partition(": ")[2] for warning in warnings_of(text)]
    assert found == ([expected] if expected else [])


def test_a_tokenizer_that_nobody_uses_is_warned_of(good: str) -> None:
    text = good.replace("aliases: [llama]", "tokenizer: {deadline_ms: 20}")
    assert warnings_of(text) == [
        "p:6: model.tokenizer: is not used: model.prefix.mode is approximate; set it to precise"
    ]


def test_chats_that_nobody_can_tokenize_are_warned_of(good: str) -> None:
    text = precise(good).replace("engine: vllm", "engine: sglang")
    text = text.replace("connector: pdcoord", "connector: none").replace("role: prefill", "role: both")
    text = text.replace("role: decode", "role: both").replace(
        "per_token: 0.2}", "per_token: 0.2, step_base_ms: 5}"
    )
    warning = (
        "p:6: model.prefix.mode: is precise, but nobody can tell the tokens of chats: no pool is of vLLM, "
        "and model.tokenizer.render is not set; their prefixes are approximate"
    )
    assert warning in warnings_of(text)
    assert warning not in warnings_of(text.replace(PRECISE, PRECISE + "\n  tokenizer: {render: 'r:1'}"))


def test_adapters_whose_engine_does_not_name_them_are_warned_of(good: str) -> None:
    text = precise(good, "\n  adapters: ['meta/llama:sql']")
    assert not any("adapter" in warning for warning in warnings_of(text))
    text = text.replace("engine: vllm", "engine: sglang").replace("connector: pdcoord", "connector: none")
    text = text.replace("role: prefill", "role: both").replace("role: decode", "role: both")
    text = text.replace("per_token: 0.2}", "per_token: 0.2, step_base_ms: 5}")
    (found,) = [warning for warning in warnings_of(text) if "adapter" in warning]
    assert found.startswith("p:6: model.prefix.mode: is precise, but KV events of SGLang name no adapter: ")
