"""The page of engines' metrics against the table, the emulator, the connector and what routing reads."""

from pathlib import Path
from typing import Any

import pytest

from pdcoord.core.fleet import EngineKind
from pdcoord.feeds import samples
from pdcoord.sim.emulator_metrics import EngineMetrics
from pdcoord.sim.engine_metrics import OURS, SGLANG, VLLM, EngineMetric, labels_of, render_page

ROOT = Path(__file__).parents[4]
ALL = {metric.name: metric for metric in (*OURS, *VLLM, *SGLANG)}


def test_the_page_is_what_the_table_says() -> None:
    assert (ROOT / "docs" / "metrics-engine.md").read_text(encoding="utf-8") == render_page(), "make docs"


def test_names_are_unique_and_counters_say_so() -> None:
    assert len(ALL) == len(OURS) + len(VLLM) + len(SGLANG)
    for metric in ALL.values():
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_what_routing_reads_is_in_the_table() -> None:
    for name in samples._NAMES:
        base = name.decode().removesuffix("_count")
        assert base in ALL or base == "vllm:gpu_cache_usage_perc", "the name of vLLM 0.10 and before"


@pytest.mark.parametrize("table", [VLLM, SGLANG], ids=["vllm", "sglang"])
def test_the_emulator_shows_what_the_table_says(table: tuple[EngineMetric, ...], bench: Any) -> None:
    kind = EngineKind.VLLM if table is VLLM else EngineKind.SGLANG
    metrics = EngineMetrics(bench.start("engine", engine=kind))
    found = {}
    for family in metrics._registry.collect():
        suffix = "_total" if family.type == "counter" else ""
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + suffix] = (family.type, labels)
    assert found == {each.name: (each.kind, set(labels_of(each))) for each in table if each.is_emulated}
