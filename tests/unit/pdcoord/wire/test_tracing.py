"""Tracing is off unless asked for, and what cannot be had is said at start."""

import importlib.util
import sys
from pathlib import Path

import pytest
import structlog

from pdcoord.wire.tracing import TracingError, is_asked_for, start_tracing

HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


def start(environment: dict[str, str]) -> object:
    return start_tracing(
        environment, "pdcoord-test", version="0", count=lambda *_: None, log=structlog.get_logger()
    )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        HERE | {"OTEL_SDK_DISABLED": "true"},
        HERE | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_it_is_off_unless_a_collector_is_named(environment: dict[str, str]) -> None:
    assert not is_asked_for(environment)
    assert start(environment) is None


def test_the_library_is_not_even_imported_where_it_is_off() -> None:
    text = Path(sys.modules["pdcoord.wire.tracing"].__file__ or "").read_text()
    heads = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert not any("opentelemetry" in line or "otlp" in line for line in heads)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"),
        ({"OTEL_TRACES_SAMPLER": "sometimes"}, "OTEL_TRACES_SAMPLER is 'sometimes'"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is 'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector:4317"}, "'collector:4317'"),
        ({"OTEL_TRACES_SAMPLER_ARG": "zz"}, "OTEL_TRACES_SAMPLER_ARG is 'zz', expected a share from 0 to 1"),
        ({"OTEL_TRACES_SAMPLER_ARG": "1.5"}, "OTEL_TRACES_SAMPLER_ARG is '1.5'"),
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "abc"}, "OTEL_EXPORTER_OTLP_TIMEOUT is 'abc', expected seconds"),
        ({"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "nan"}, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT is 'nan'"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, "OTEL_BSP_MAX_QUEUE_SIZE is 'many'"),
    ],
)
def test_what_cannot_be_had_is_named(extra: dict[str, str], named: str) -> None:
    with pytest.raises(TracingError) as caught:
        start(HERE | extra)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TracingError, match=r"install pdcoord\[tracing\]"):
        start(HERE)
