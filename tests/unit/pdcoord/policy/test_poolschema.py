"""Tests of a pool by itself: every rule's golden line."""

from dataclasses import replace

import pytest

from pdcoord.policy.errors import PolicyError
from pdcoord.policy.load import parse_policies
from pdcoord.policy.poolschema import LayoutSpec, PoolSpec
from transfer.layout import KvDtype, KvLayout, Order
from transfer.presets import PRESETS


def problems_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policies(text.encode(), "p")
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "layout: {block_tokens: 64, order: NHD}",
            "layout: {block_tokens: 0, order: NHD}",
            "p:25: pools[1].layout.block_tokens: is 0, expected a whole number of at least 1",
        ),
        (
            "order: NHD",
            "order: nhd",
            'p:25: pools[1].layout.order: is "nhd", expected one of HND, NHD, LHBNC, BLHNC, BLNHC, BHLNC',
        ),
        (
            "order: NHD",
            "split: both",
            'p:25: pools[1].layout.split: is "both", expected one of packed, halved, separate',
        ),
        (
            "order: NHD",
            "head_dim_multiple: 0",
            "p:25: pools[1].layout.head_dim_multiple: is 0, expected a whole number from 1 to 1024",
        ),
        (
            "layout: {block_tokens: 64, order: NHD}",
            "layout: {preset: cpu-vek}",
            (
                'p:25: pools[1].layout.preset: is "cpu-vek", expected one of nvidia-flash-attn, '
                "nvidia-flashinfer, amd-aiter, amd-aiter-unified, amd-aiter-shuffle, amd-rocm-attn, "
                "intel-gaudi, intel-xpu, cpu-vec, cpu-vec16, cpu-amx; did you mean cpu-vec?"
            ),
        ),
        (
            "layout: {block_tokens: 64, order: NHD}",
            "layout: {preset: cpu-vec, dtype: fp8}",
            (
                'p:25: pools[1].layout.dtype: is "fp8", expected one of bfloat16, float16, float32, '
                "fp8_e4m3fn, fp8_e4m3fnuz, fp8_e5m2"
            ),
        ),
        (
            "layout: {block_tokens: 64, order: NHD}",
            "layout: {preset: 5}",
            (
                "p:25: pools[1].layout.preset: is 5, expected one of nvidia-flash-attn, nvidia-flashinfer, "
                "amd-aiter, amd-aiter-unified, amd-aiter-shuffle, amd-rocm-attn, intel-gaudi, intel-xpu, "
                "cpu-vec, cpu-vec16, cpu-amx"
            ),
        ),
        (
            "layout: {block_tokens: 64, order: NHD}",
            "layout: {order: NHD}",
            "p:25: pools[1].layout.block_tokens: is missing, expected a whole number of at least 1",
        ),
        (
            "order: NHD",
            "dtype: fp8",
            (
                'p:25: pools[1].layout.dtype: is "fp8", expected one of bfloat16, float16, float32, '
                "fp8_e4m3fn, fp8_e4m3fnuz, fp8_e5m2"
            ),
        ),
        (
            "order: NHD",
            "blockTokens: 5",
            "p:25: pools[1].layout.blockTokens: is not a known key; did you mean block_tokens?",
        ),
        (
            "role: decode",
            "role: decoder",
            'p:21: pools[1].role: is "decoder", expected one of prefill, decode, both',
        ),
        (
            "    vendor: amd\n",
            "",
            "p:20: pools[1].vendor: is missing, expected up to 64 printable ASCII characters",
        ),
        (
            "vendor: amd\n    engine: vllm",
            "vendor: amd\n    engine: trt",
            'p:23: pools[1].engine: is "trt", expected one of vllm, sglang',
        ),
        (
            '[{address: "10.0.1.1:8000"}]',
            '[{address: "10.0.1.1"}]',
            (
                'p:28: pools[1].endpoints[0].address: is "10.0.1.1", expected host:port such as '
                "10.0.0.1:8000, or [2001:db8::1]:8000"
            ),
        ),
        (
            '[{address: "10.0.1.1:8000"}]',
            '[{address: "10.0.1.1:8000", bootstrap_port: 70000}]',
            "p:28: pools[1].endpoints[0].bootstrap_port: is 70000, expected a whole number from 1 to 65535",
        ),
        (
            '[{address: "10.0.1.1:8000"}]',
            '[{address: "10.0.1.1:8000", labels: {a: b}}]',
            (
                "p:28: pools[1].endpoints[0].labels: is not a known key; keys here are address, name, "
                "bootstrap_port, kv_port, metrics_port, kv_events_port, kv_events_replay_port"
            ),
        ),
        (
            '[{address: "10.0.1.1:8000"}]',
            "[]",
            "p:28: pools[1].endpoints: is a list of 0, expected a list of 1 to 4096 entries",
        ),
        (
            '    endpoints: [{address: "10.0.1.1:8000"}]\n',
            "",
            "p:20: pools[1]: has neither endpoints nor selector; set one of them",
        ),
        (
            '[{address: "10.0.1.1:8000"}]\n',
            '[{address: "10.0.1.1:8000"}]\n    selector: {match_labels: {a: b}}\n',
            "p:29: pools[1].selector: is set beside endpoints; keep one of them",
        ),
        (
            'endpoints: [{address: "10.0.1.1:8000"}]',
            "selector: {match_labels: {}}",
            "p:28: pools[1].selector.match_labels: is a mapping, expected a mapping of 1 to 64 keys",
        ),
        (
            'endpoints: [{address: "10.0.1.1:8000"}]',
            "selector: {match_labels: {role: 5}}",
            (
                "p:28: pools[1].selector.match_labels.role: is 5, expected up to 63 letters, digits and any "
                "of . _ -, in quotes if it is a number"
            ),
        ),
        (
            'endpoints: [{address: "10.0.1.1:8000"}]',
            "selector: {match_labels: {a b: c}}",
            (
                'p:28: pools[1].selector.match_labels["a b"]: has the key "a b", expected a label key such '
                "as role or llm-d.ai/role"
            ),
        ),
        (
            "engine: vllm\n    connector: pdcoord\n    layout: {block_tokens: 64",
            "engine: vllm\n    connector: sglang\n    layout: {block_tokens: 64",
            "p:24: pools[1].connector: is sglang on a vllm pool, expected one of nixl, pdcoord, none",
        ),
        (
            "engine: vllm\n    connector: pdcoord\n    layout: {block_tokens: 64",
            "engine: sglang\n    connector: nixl\n    layout: {block_tokens: 64",
            "p:24: pools[1].connector: is nixl on an sglang pool with role decode, expected sglang",
        ),
        (
            "role: decode\n    vendor: amd\n    engine: vllm\n    connector: pdcoord",
            "role: both\n    vendor: amd\n    engine: sglang\n    connector: sglang",
            "p:24: pools[1].connector: is sglang on an sglang pool with role both, expected none",
        ),
        (
            "prefill_ms_per_token: 0.1,",
            "prefill_ms_per_token: -0.1,",
            "p:29: pools[1].speed.prefill_ms_per_token: is -0.1, expected a number from 0 to 3600000",
        ),
        (
            "step_base_ms: 12}",
            "step_base_ms: 12}\n    cost_per_hour: .inf",
            "p:30: pools[1].cost_per_hour: is inf, expected a number from 0 to 1000000",
        ),
        (
            "step_base_ms: 12}",
            "step_base_ms: 12}\n    limits: {in_flight_max: 0}",
            "p:30: pools[1].limits.in_flight_max: is 0, expected a whole number from 1 to 65536",
        ),
        (
            "kv_bytes_per_token: 131072\n    link_gbit_per_s: 100\n    endpoints: [",
            "kv_bytes_per_token: 1e5\n    link_gbit_per_s: 100\n    endpoints: [",
            "p:26: pools[1].kv_bytes_per_token: is 100000.0, expected a whole number from 1 to 67108864",
        ),
        (
            "link_gbit_per_s: 100\n    endpoints: [",
            "link_gbit_per_s: 0\n    endpoints: [",
            "p:27: pools[1].link_gbit_per_s: is 0, expected a number above 0 and at most 100000",
        ),
        (
            "link_gbit_per_s: 100\n    endpoints: [",
            "ttft_ms: 100\n    endpoints: [",
            "p:27: pools[1].ttft_ms: is not a known key; it belongs in slo",
        ),
    ],
)
def test_each_rule_has_its_line(good: str, old: str, new: str, expected: str) -> None:
    assert good.count(old) == 1
    assert problems_of(good.replace(old, new)) == [expected]


def test_every_field_says_what_it_is() -> None:
    for name, field in PoolSpec.model_fields.items():
        assert field.description, name


def layout_of(text: str) -> KvLayout:
    return LayoutSpec.model_validate_json(text, strict=True).compiled()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_backends_layout(name: str) -> None:
    spec = LayoutSpec.model_validate_json(f'{{"preset": "{name}"}}', strict=True)
    assert spec.compiled() == PRESETS[name].layout
    assert LayoutSpec.model_validate_json(spec.model_dump_json(), strict=True) == spec


def test_what_is_written_beside_a_preset_overrides_it() -> None:
    text = '{"preset": "cpu-vec", "block_tokens": 32, "dtype": "float16", "tensor_parallel": 2}'
    expected = replace(PRESETS["cpu-vec"].layout, block_tokens=32, dtype=KvDtype.FLOAT16, tensor_parallel=2)
    assert layout_of(text) == expected


def test_without_a_preset_the_defaults_are_those_of_a_layout() -> None:
    assert layout_of('{"block_tokens": 16}') == KvLayout(16)
    assert layout_of('{"block_tokens": 16, "preset": null, "order": "BHLNC"}') == KvLayout(16, Order.BHLNC)
