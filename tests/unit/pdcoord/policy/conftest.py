"""A small sound policy that tests of this package start from."""

import textwrap

import pytest

GOOD = """\
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: llama}
model:
  name: meta/llama
  aliases: [llama]
pools:
  - name: fast
    role: prefill
    vendor: nvidia
    engine: vllm
    connector: pdcoord
    layout: {block_tokens: 16, order: HND}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints:
      - {name: f0, address: "10.0.0.1:8000"}
      - {name: f1, address: "10.0.0.2:8000"}
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.2}
  - name: wide
    role: decode
    vendor: amd
    engine: vllm
    connector: pdcoord
    layout: {block_tokens: 64, order: NHD}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints: [{address: "10.0.1.1:8000"}]
    speed: {prefill_base_ms: 8, prefill_ms_per_token: 0.1, step_base_ms: 12}
disaggregation: {mode: auto}
fallback: {ladder: [other-prefill, colocated]}
slo: {ttft_ms: 2000}
"""


@pytest.fixture
def good() -> str:
    """The sound policy; tests name its lines."""
    return textwrap.dedent(GOOD)
