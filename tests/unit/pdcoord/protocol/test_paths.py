"""A sidecar's report of its paths: what is written is read, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdcoord.protocol.headers import HostPort
from pdcoord.protocol.paths import PATHS_MAX, PathReport, PathsReport, decode_paths, encode_paths

figures = st.none() | st.floats(0.0, 1e15)
reports = st.builds(
    PathReport,
    target=st.just(HostPort("p:1")),
    kv_address=st.just(HostPort("p:2")),
    probe_count=st.integers(0, 1 << 40),
    age_s=st.floats(0.0, 1e9),
    failure=st.sampled_from(["", "unreachable"]),
    verdict=st.sampled_from(["", "native"]),
    transport=st.text(max_size=8),
    is_degraded=st.booleans(),
    latency_s=figures,
    bandwidth_bytes_per_s=figures,
)


@given(paths=st.lists(reports, max_size=4), interval_s=st.floats(1e-3, 1e6), is_agent_up=st.booleans())
def test_a_report_is_read_as_it_was_written(
    paths: list[PathReport], interval_s: float, *, is_agent_up: bool
) -> None:
    report = PathsReport(interval_s=interval_s, is_agent_up=is_agent_up, paths=tuple(paths))
    assert decode_paths(encode_paths(report)) == report


PATH = {"target": "p:1", "kv_address": "p:2"}
GOOD = {"interval_s": 1.0, "is_agent_up": True, "paths": [PATH], "version": 1}


def test_what_a_later_sidecar_adds_is_not_in_the_way() -> None:
    report = decode_paths(json.dumps({**GOOD, "more": 1}).encode())
    assert report is not None
    assert report.paths[0].probe_count == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        json.dumps({**GOOD, "version": 2}).encode(),
        json.dumps({**GOOD, "interval_s": 0.0}).encode(),
        json.dumps({**GOOD, "interval_s": "1"}).encode(),
        json.dumps({**GOOD, "paths": [{"target": "p:1"}]}).encode(),
        json.dumps({**GOOD, "paths": [PATH] * (PATHS_MAX + 1)}).encode(),
        json.dumps({**GOOD, "paths": [{**PATH, "age_s": -1.0}]}).encode(),
        json.dumps({**GOOD, "paths": [{**PATH, "latency_s": -1.0}]}).encode(),
        json.dumps({**GOOD, "paths": [{**PATH, "bandwidth_bytes_per_s": -1.0}]}).encode(),
        json.dumps({**GOOD, "paths": [{**PATH, "probe_count": -1}]}).encode(),
        json.dumps({**GOOD, "paths": [{**PATH, "age_s": float("inf")}]}).encode(),
    ],
)
def test_what_no_sidecar_of_this_version_writes_is_refused(raw: bytes) -> None:
    assert decode_paths(raw) is None
