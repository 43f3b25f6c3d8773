"""Kinds of engines and traffic with round figures."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from pdcoord.core.costs import SpeedFigures
from pdcoord.core.fleet import EngineKind, Role
from pdcoord.sim.advise.demand import Demand, Traffic
from pdcoord.sim.advise.kinds import Kind
from pdcoord.sim.settings import EngineSettings
from transfer.layout import KvLayout
from transfer.verdict import Connector


def make_kind(name: str = "a", count: int = 1, **given: Any) -> Kind:
    """`count` engines; figures not given are those of a middling accelerator without limits on its link."""
    engine = given.get("engine", EngineKind.VLLM)
    settings = EngineSettings(
        name="",
        model="m",
        speed=SpeedFigures(
            prefill_base_s=0.0,
            prefill_s_per_token=given.get("prefill_s_per_token", 1e-4),
            step_base_s=given.get("step_base_s", 0.01),
            step_s_per_context_token=given.get("step_s_per_context_token", 0.0),
            step_s_per_sequence=given.get("step_s_per_sequence", 1e-3),
        ),
        layout=given.get("layout", KvLayout(16)),
        block_total=given.get("kv_tokens", 1_600_000) // 16,
        kv_bytes_per_token=100_000,
        link_bytes_per_s=given.get("link_bytes_per_s", 1e15),
        engine=engine,
        connector=given.get("connector", Connector.PDCOORD),
        running_max=given.get("running_max", 1_000),
        context_tokens_max=given.get("context_tokens_max", 4_096),
        step_tokens_max=1 << 20,
    )
    roles = given.get("roles", (Role.BOTH,) * count)
    return Kind(name, "v", settings, given.get("cost_per_hour"), tuple(roles))


def make_traffic(*demands: Demand, rate_per_s: float = 1.0) -> Traffic:
    return Traffic(rate_per_s, demands or (make_demand(),), 1_000, is_whole=True)


def make_demand(**given: Any) -> Demand:
    """Calls of 1,000 tokens to compute and 100 to answer."""
    uncached: Sequence[int] = given.get("uncached", (1_000,))
    output = given.get("output_tokens", 100.0)
    prompt = given.get("prompt_tokens", 1_000.0)
    return Demand(
        name=given.get("name", "d"),
        can_split=given.get("can_split", True),
        share=given.get("share", 1.0),
        prompt_tokens=prompt,
        output_tokens=output,
        uncached=tuple(uncached),
        context_steps=output * (prompt + output / 2),
        ttft_s_max=given.get("ttft_s_max"),
        tpot_s_max=given.get("tpot_s_max"),
    )


@pytest.fixture
def kind() -> Callable[..., Kind]:
    return make_kind


@pytest.fixture
def traffic() -> Callable[..., Traffic]:
    return make_traffic


@pytest.fixture
def demand() -> Callable[..., Demand]:
    return make_demand


@pytest.fixture(scope="session")
def makers() -> tuple[Callable[..., Kind], Callable[..., Traffic], Callable[..., Demand]]:
    """For properties, which may not use a fixture of each test."""
    return make_kind, make_traffic, make_demand
