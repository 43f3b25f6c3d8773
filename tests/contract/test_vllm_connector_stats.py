"""The connector's figures through vLLM's own classes, as its loggers use them; needs vLLM installed."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: run it in its environment",
    ),
    # vLLM and torch warn of each other.
    pytest.mark.filterwarnings("ignore"),
]


def figures(**members: Any) -> Any:
    from transfer.engines.vllm.stats import PdcoordStats

    return PdcoordStats.of(**members)


def test_figures_of_all_workers_and_steps_add_up() -> None:
    from transfer.engines.vllm.connector import PdcoordConnector

    one = figures(seconds=[0.1], loaded_bytes=5, failures={"peer-lost": 1}, staging_bytes={0: 7})
    other = figures(seconds=[0.3], loaded_bytes=6, failures={"peer-lost": 2, "malformed": 1})
    assert figures().is_empty()
    assert not figures(staging_bytes={0: 0}).is_empty()
    rebuilt = PdcoordConnector.build_kv_connector_stats(one.to_dict())
    assert rebuilt is not None
    total = rebuilt.aggregate(other)
    assert total.data == {
        "seconds": [0.1, 0.3],
        "loaded_bytes": 11,
        "failures": {"peer-lost": 3, "malformed": 1},
        "staging_bytes": {"0": 7},
    }
    assert total.reduce() == {"loads": 2, "mean load (ms)": 200.0, "MB": 0.0, "failures": 4}


def test_metrics_show_them() -> None:
    import prometheus_client

    from transfer.engines.vllm.connector import PdcoordConnector

    registry = prometheus_client.CollectorRegistry()

    def kind_of(cls: Any) -> Any:
        return lambda **members: cls(**members, registry=registry)

    kinds = (prometheus_client.Gauge, prometheus_client.Counter, prometheus_client.Histogram)
    metrics = PdcoordConnector.build_prom_metrics(
        SimpleNamespace(kv_transfer_config=None), {cls: kind_of(cls) for cls in kinds}, ["engine"], {0: ["0"]}
    )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:pdcoord_{name}", {"engine": "0"} | labels)

    assert value("loaded_bytes_total") == 0
    metrics.observe(
        figures(seconds=[0.2], loaded_bytes=9, failures={"malformed": 2}, staging_bytes={0: 4, 1: 5}).data
    )
    metrics.observe(figures(staging_bytes={1: 0}).data)
    assert value("loaded_bytes_total") == 9
    assert value("load_seconds_count") == 1
    assert value("failures_total", kind="malformed") == 2
    assert value("staging_bytes") == 4
