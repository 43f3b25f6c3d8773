"""The table of paths shows what is known, and no column for what nothing is known of."""

import json
from typing import Any

import msgspec
import pytest

from pdcoord.runtime.paths_table import UNREACHABLE, describe_paths, show_paths

PATH = {
    "prefill": "fast/p0",
    "decode": "wide/d0",
    "verdict": "regroup",
    "verdict_reason": "layouts differ in block_tokens",
    "breaker": "closed",
    "bandwidth_gbit_per_s": 100.0,
    "bytes_in_flight": 0,
}
PROBE = {
    "verdict": "regroup",
    "transport": "UCX tcp/eth0",
    "is_degraded": True,
    "latency_ms": 0.2512,
    "bandwidth_gbit_per_s": 11.04,
    "age_ms": 5000.0,
    "failure": "",
}


def lines_of(*paths: dict[str, Any], total: int | None = None) -> list[str]:
    return list(describe_paths({"total": total or len(paths), "paths": list(paths)}))


def test_paths_without_probes_have_no_columns_for_them() -> None:
    closed = PATH | {
        "prefill": "fast/p1",
        "breaker": "open",
        "bandwidth_gbit_per_s": 0.0,
        "bytes_in_flight": 7,
    }
    assert lines_of(PATH, closed) == [
        "prefill  decode   verdict  breaker  Gbit/s  bytes in flight  reason",
        "fast/p0  wide/d0  regroup  closed   100     -                layouts differ in block_tokens",
        "fast/p1  wide/d0  regroup  open     -       7                layouts differ in block_tokens",
    ]


def test_what_probes_found_is_shown_where_there_is_any() -> None:
    other = PATH | {"prefill": "fast/p1", "probe": None}
    head, probed, unprobed = lines_of(PATH | {"probe": PROBE}, other)
    for title in ("probed", "transport", "degraded", "latency ms", "measured Gbit/s", "age ms"):
        assert title in head
    assert "UCX tcp/eth0  yes       0.251       11               5000" in probed
    assert unprobed.count("-  ") >= 6
    assert "failure" not in head


def test_layouts_are_shown_where_a_canary_failed() -> None:
    canary = {
        "state": "untried",
        "is_enforced": True,
        "fault": "canary-untried",
        "detail": "",
        "position": None,
        "age_ms": None,
        "prefill_layout": "nvidia pdcoord: block_tokens=16",
        "decode_layout": "amd pdcoord: block_tokens=128",
    }
    shut = PATH | {"breaker": "open", "fault": "canary-untried"}
    head, row = lines_of(shut | {"canary": canary})
    assert "layout" not in head
    assert "untried" in row
    failed = canary | {"state": "failed", "fault": "canary-tokens", "detail": "tokens differ"}
    head, row = lines_of(shut | {"fault": "canary-tokens", "canary": failed})
    assert "prefill layout" in head
    for words in ("failed", "canary-tokens", "tokens differ", "block_tokens=16", "amd pdcoord"):
        assert words in row


def test_more_paths_than_were_asked_for_are_told_of() -> None:
    assert lines_of(PATH, total=9)[-1].startswith("1 of 9 paths")


def test_a_fleet_without_pairs_is_said_so() -> None:
    assert lines_of() == ["no paths: the policy in force has no prefill endpoint beside a decode endpoint"]


@pytest.mark.parametrize("page", [{}, {"paths": 5}, {"paths": [5]}])
def test_another_answer_is_no_table(page: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="without a list of paths"):
        list(describe_paths(page))


def test_the_gateways_own_answer_is_understood(bench: Any) -> None:
    page = json.loads(msgspec.json.encode(bench.loop.paths_view(100)))
    head, *rows = describe_paths(page)
    assert len(rows) == page["total"] > 0
    assert head.startswith("prefill")
    assert all(row.startswith(path["prefill"]) for row, path in zip(rows, page["paths"], strict=True))


@pytest.mark.parametrize(
    ("url", "said"),
    [("https://127.0.0.1:1", "give --admin-ca-file"), ("http://", "is neither http://host:port")],
)
def test_an_address_that_cannot_be_asked_is_said_so(
    url: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_paths(url, as_json=False) == UNREACHABLE
    assert said in capsys.readouterr().err
