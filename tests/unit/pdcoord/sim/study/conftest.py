"""Results of calls, made by naming what matters, and a small fleet with its policy and traffic."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pdcoord.sim.study.results import CallResult, Fate

MakeResult = Callable[..., CallResult]


@pytest.fixture
def make_result() -> MakeResult:
    """A served call of two seconds; keywords replace fields."""

    def make(number: int = 0, **changed: Any) -> CallResult:
        fields: dict[str, Any] = {
            "id": number,
            "kind": "chat",
            "tenant": "",
            "priority": 0,
            "prompt_tokens": 1_000,
            "output_tokens": 11,
            "at_s": float(number),
            "routed_s": float(number),
            "first_s": number + 1.0,
            "ended_s": number + 2.0,
            "cached_tokens": 0,
            "prefill": "p/0",
            "decode": "d/0",
            "why": "split-faster",
            "fate": Fate.OK,
            "fell_back": False,
            "ttft_s_max": None,
            "tpot_s_max": None,
        }
        return CallResult(**{**fields, **changed})

    return make


POLICY = """
apiVersion: pdcoord.io/v1alpha1
kind: PoolPolicy
metadata: {name: tiny}
model: {name: tiny/model, aliases: [tiny]}
pools:
  - name: fast
    role: both
    vendor: intel-gaudi
    engine: vllm
    connector: pdcoord
    layout: {block_tokens: 128, order: NHD, dtype: bfloat16}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    selector: {match_labels: {vendor: gaudi}}
    speed: {prefill_ms_per_token: 0.12, step_base_ms: 11}
  - name: wide
    role: both
    vendor: amd
    engine: vllm
    connector: pdcoord
    layout: {block_tokens: 64, order: NHD, dtype: bfloat16}
    kv_bytes_per_token: 131072
    link_gbit_per_s: 100
    endpoints:
      - {name: by-address, address: "127.0.0.1:18300"}
      - {name: mi-1, address: "10.0.0.1:8000"}
    speed: {prefill_ms_per_token: 0.17, step_base_ms: 15}
slo: {ttft_ms: 2000, tpot_ms: 50}
"""
FLEET = """
apiVersion: pdcoord.io/v1alpha1
kind: EmulatedFleet
model: tiny
engines:
  - {name: gaudi, count: 2, labels: {vendor: gaudi}, profile: intel-gaudi3-8b, port: 18101}
  - {name: mi, count: 3, profile: amd-mi300x-8b, port: 18300}
"""
WORKLOAD = """
apiVersion: pdcoord.io/v1alpha1
kind: Workload
seed: 3
load: {type: poisson, stages: [{rate: 4, duration: 10}]}
parts:
  - name: short
    shared_prefix: {num_groups: 2, num_prompts_per_group: 4, system_prompt_len: 512}
  - name: long
    rag: {documents: 4, output_len: {type: fixed, value: 20}}
"""


@dataclass(frozen=True)
class Files:
    policy: Path
    fleet: Path
    workload: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """A policy, its fleet of two vendors, and ten seconds of traffic."""
    made = Files(*(tmp_path / f"{name}.yaml" for name in ("policy", "fleet", "workload")))
    for path, text in ((made.policy, POLICY), (made.fleet, FLEET), (made.workload, WORKLOAD)):
        path.write_text(text)
    return made
