"""Metrics of the process itself: its tasks, and how long its certificates are good."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from pdcoord.runtime.metricspec import MetricSpec, MetricType
from pdcoord.wire.validity import Validity

TASKS = MetricSpec(
    "pdcoord_gateway_tasks",
    MetricType.GAUGE,
    (),
    "asyncio tasks that have not ended.",
    "Some for the process and a few for each call. Rising while `in_flight` does not: a defect; restart the "
    "replica and report it.",
)
CERTIFICATE_BEGINS = MetricSpec(
    "pdcoord_gateway_certificate_begins_timestamp_seconds",
    MetricType.GAUGE,
    ("use",),
    "From when on the certificate in force is good, in Unix seconds, by what it is for: listener (the front "
    "door, or the picker's pages), admin, upstream, control, extproc (the picker's gRPC port). No series "
    "where there is none.",
    "With the next one it tells how old the certificate may become.",
)
CERTIFICATE_EXPIRES = MetricSpec(
    "pdcoord_gateway_certificate_expires_timestamp_seconds",
    MetricType.GAUGE,
    ("use",),
    "Until when it is good; what was renewed on disk counts once it is in force.",
    "Alert long before: who has to verify it refuses every connection from then on. See whether it is "
    "renewed at all, then `secret_reloads_total`.",
)
CERTIFICATE_USES = ("listener", "admin", "upstream", "control", "extproc")
PROCESS_METRICS = (TASKS, CERTIFICATE_BEGINS, CERTIFICATE_EXPIRES)

_Samples = Iterable[tuple[MetricSpec, Iterable[tuple[tuple[str, ...], float]]]]


def task_samples() -> _Samples:
    """Counted when somebody asks, in the loop that answers; 0 outside of any."""
    try:
        count = len(asyncio.all_tasks())
    except RuntimeError:
        count = 0
    yield TASKS, [((), float(count))]


def certificate_samples(validities: Mapping[str, Callable[[], Validity | None]]) -> _Samples:
    """Of what is in force when somebody asks, by use."""
    found = {use: validity for use, read in validities.items() if (validity := read()) is not None}
    yield CERTIFICATE_BEGINS, [((use,), validity.begins_s) for use, validity in found.items()]
    yield CERTIFICATE_EXPIRES, [((use,), validity.ends_s) for use, validity in found.items()]
