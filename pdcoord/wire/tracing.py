"""Spans of calls, for gateway, endpoint picker and sidecar alike: off unless OTEL_* name a collector.

Where it is off there is no `Tracing` at all, and callers hold None: no span object is made, no clock read.
The part that knows OpenTelemetry is `otlp`, which is imported only where it is on.
"""

import importlib.util
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from pdcoord.protocol.trace import TraceContext

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_HTTP = "http/protobuf"
_SAMPLERS = frozenset(
    {
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    }
)
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_TIMEOUT_S_MAX = 3_600.0
_EXPORTERS = frozenset({"", "otlp", "none"})
FLUSH_S_MAX = 5.0

Value = str | int | float | bool | None
Attributes = Mapping[str, Value]
"""Of a span or an event; None leaves a name out. Never a prompt, a key or a ticket."""


class TracingError(ValueError):
    """Tracing was asked for and cannot be had; the message is one line with the remedy."""


class Kind(StrEnum):
    """What a span is of: a call that came, one that was sent, or work of our own."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


class Fate(StrEnum):
    """What became of a span that ended: the label `what` of the metric of spans."""

    EXPORTED = "exported"
    FAILED = "failed"
    DROPPED = "dropped"


CountSpans = Callable[[Fate, int], None]
"""Hears of spans that went out or were lost; called from another thread."""


class Span(Protocol):
    """One span; times are those of `time.monotonic`."""

    @property
    def context(self) -> TraceContext:
        """What the next one is told."""
        ...

    def set(self, attributes: Attributes) -> None: ...

    def event(self, name: str, attributes: Attributes, at_s: float) -> None: ...

    def end(self, at_s: float, error: str = "") -> None:
        """End it, once; `error` is a short word, empty if all went well."""
        ...


class Tracing(Protocol):
    """Begins spans; one for a process."""

    def begin(
        self,
        name: str,
        kind: Kind,
        *,
        parent: TraceContext | None,
        at_s: float,
        attributes: Attributes | None = None,
    ) -> Span:
        """A span under `parent`, or the first of a new trace."""
        ...

    def close(self, deadline_s: float = FLUSH_S_MAX) -> None:
        """Send what waits, for at most so long; blocks."""
        ...


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether OTEL_* variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    return bool(environment.get(TRACES_ENDPOINT) or environment.get(ENDPOINT))


def start_tracing(
    environment: Mapping[str, str],
    service: str,
    *,
    version: str,
    count: CountSpans,
    log: FilteringBoundLogger,
) -> Tracing | None:
    """Tracing as OTEL_* variables ask for it; None if they do not.

    Args:
        environment: the process's own, since the library reads it once more.
        service: the name where OTEL_SERVICE_NAME gives none.

    Raises:
        TracingError: if it cannot be done as asked.
    """
    if not is_asked_for(environment):
        return None
    _check(environment)
    if importlib.util.find_spec("opentelemetry") is None:
        where = TRACES_ENDPOINT if environment.get(TRACES_ENDPOINT) else ENDPOINT
        raise TracingError(f"{where} is set, but OpenTelemetry is not installed: install pdcoord[tracing]")
    try:
        from pdcoord.wire.otlp import OtlpTracing  # noqa: PLC0415  # an extra that may be absent
    except ImportError as error:
        message = f"OpenTelemetry cannot be used: {error.msg}; install pdcoord[tracing]"
        raise TracingError(message) from error
    return OtlpTracing.of(environment, service, version=version, count=count, log=log)


def _check(environment: Mapping[str, str]) -> None:
    """Refuse what the library would only warn of, or not know."""
    for name in _PROTOCOLS:
        protocol = environment.get(name, "").strip()
        if protocol and protocol != _HTTP:
            raise TracingError(f"{name} is {protocol!r}, expected {_HTTP!r} (port 4318 of most collectors)")
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter not in _EXPORTERS:
        raise TracingError(f"OTEL_TRACES_EXPORTER is {exporter!r}, expected 'otlp' or 'none'")
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    if sampler and sampler not in _SAMPLERS:
        expected = ", ".join(sorted(_SAMPLERS))
        raise TracingError(f"OTEL_TRACES_SAMPLER is {sampler!r}, expected one of {expected}")
    _check_number(environment, "OTEL_TRACES_SAMPLER_ARG", "a share from 0 to 1", 1.0)
    for name in _TIMEOUTS:
        _check_number(environment, name, f"seconds from 0 to {_TIMEOUT_S_MAX:g}", _TIMEOUT_S_MAX)
    for name in (TRACES_ENDPOINT, ENDPOINT):
        endpoint = environment.get(name, "")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise TracingError(f"{name} is {endpoint!r}, expected a URL such as http://collector:4318")


def _check_number(environment: Mapping[str, str], name: str, expected: str, highest: float) -> None:
    text = environment.get(name, "").strip()
    try:
        value = float(text or "0")
    except ValueError:
        value = -1.0
    if not 0 <= value <= highest:
        raise TracingError(f"{name} is {text!r}, expected {expected}")


def without_none(attributes: Attributes | None) -> dict[str, str | int | float | bool]:
    return {name: value for name, value in (attributes or {}).items() if value is not None}
