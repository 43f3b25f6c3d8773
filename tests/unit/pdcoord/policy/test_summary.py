"""Tests of the page that describes a policy."""

from pdcoord.policy.compile import compile_policy
from pdcoord.policy.endpoints import match_endpoints, parse_endpoints
from pdcoord.policy.load import parse_policies
from pdcoord.policy.summary import describe_policy


def test_a_model_is_described_with_its_pools_and_verdicts(good: str) -> None:
    compiled = compile_policy(parse_policies(good.encode(), "p"))
    assert list(describe_policy(compiled, None)) == [
        "",
        "model meta/llama (llama)",
        "  split: auto, from 256 uncached tokens and 5 ms saved; transfer within 20 s at 8 Gbit/s or more",
        "  ladder: other-prefill, colocated, refuse",
        "  slo: ttft 2000 ms",
        "",
        "  pool  role     vendor  engine  connector  blocks           link        cost/h  alone  endpoints",
        (
            "  fast  prefill  nvidia  vllm    pdcoord    16 HND bfloat16  100 Gbit/s  0       no     "
            "2: 10.0.0.1:8000, 10.0.0.2:8000"
        ),
        (
            "  wide  decode   amd     vllm    pdcoord    64 NHD bfloat16  100 Gbit/s  0       yes    "
            "1: 10.0.1.1:8000"
        ),
        "",
        "  prefill  decode  verdict  core s/GB  reason",
        "  fast     wide    regroup  0.58       layouts differ in block_tokens, order",
    ]


def test_selected_endpoints_are_counted_where_they_are_known(good: str) -> None:
    text = good.replace('endpoints: [{address: "10.0.1.1:8000"}]', "selector: {match_labels: {role: d}}")
    compiled = compile_policy(parse_policies(text.encode(), "p"))
    assert list(describe_policy(compiled, None))[8].endswith("  those with role=d")
    assert list(describe_policy(compiled, ()))[8].endswith("  0; those with role=d")
    entries = "".join(
        f"- {{address: 'h:{i}', labels: {{role: d}}, is_draining: {i == 1}}}\n" for i in range(1, 7)
    )
    head = "apiVersion: pdcoord.io/v1alpha1\nkind: Endpoints\nendpoints:\n"
    matched = match_endpoints(compiled.bindings, parse_endpoints((head + entries).encode(), "e"))
    assert list(describe_policy(compiled, matched))[8].endswith(
        "  6: h:1 (draining), h:2, h:3, h:4, and 2 more; those with role=d"
    )


def test_a_model_whose_pools_all_decode_has_no_pairs(good: str) -> None:
    start, end = good.index("  - name: fast"), good.index("  - name: wide")
    text = (
        (good[:start] + good[end:])
        .replace("    link_gbit_per_s: 100\n", "")
        .replace("slo: {ttft_ms: 2000}", "")
    )
    lines = list(describe_policy(compile_policy(parse_policies(text.encode(), "p")), None))
    assert lines[4] == "  slo: none"
    assert "unknown" in lines[7]
    assert lines[-1] == "  no pool prefills for another"


def test_what_is_out_of_the_ordinary_in_a_layout_is_shown(good: str) -> None:
    text = good.replace(
        "{block_tokens: 64, order: NHD}", "{preset: cpu-vec, tensor_parallel: 2, dtype: float16}"
    )
    lines = list(describe_policy(compile_policy(parse_policies(text.encode(), "p")), None))
    assert any("  128 HND float16 cpu-vec halved TP 2  " in line for line in lines)


def test_an_impossible_pair_has_no_cost(good: str) -> None:
    text = good.replace("order: NHD", "tiling: fractal-nz")
    (row,) = [
        line
        for line in describe_policy(compile_policy(parse_policies(text.encode(), "p")), None)
        if line.startswith("  fast     wide    impossible  -          layouts differ in")
    ]
    assert "unpack tiling fractal-nz" in row


def test_precise_prefixes_say_where_tokens_come_from(good: str) -> None:
    text = good.replace('"10.0.0.1:8000"}', '"10.0.0.1:8000", kv_events_port: 5557}')
    text = text.replace("aliases: [llama]", "prefix: {mode: precise}")
    lines = list(describe_policy(compile_policy(parse_policies(text.encode(), "p")), None))
    assert "  prefixes: precise; tokens by the engines' /tokenize within 50 ms" in lines
    text = text.replace("{mode: precise}", "{mode: precise}\n  tokenizer: {file: /t.json, render: 'r:1'}")
    lines = list(describe_policy(compile_policy(parse_policies(text.encode(), "p")), None))
    assert "  prefixes: precise; tokens by /t.json, r:1/render within 50 ms" in lines
