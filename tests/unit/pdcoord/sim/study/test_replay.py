import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdcoord.sim.study.replay import ReplayOrder, replay
from pdcoord.sim.study.simulate import Order, simulate


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def log(files: Any, tmp_path: Path, console: Console) -> Path:
    """Traffic that was served in turn."""
    made = Order(
        policy=files.policy,
        fleet=files.fleet,
        workload=files.workload,
        routers=["round-robin"],
        out=tmp_path / "out",
    )
    assert simulate(made, console) == 0
    return tmp_path / "out" / "round-robin-x1.jsonl"


def test_every_request_is_decided_again(files: Any, log: Path, tmp_path: Path, console: Console) -> None:
    log.write_bytes(b"not a line\n" + log.read_bytes())
    out = tmp_path / "differences.jsonl"
    assert replay(ReplayOrder(log=log, policy=files.policy, fleet=files.fleet, out=out), console) == 0
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len(lines) == 40
    changed = sum(line["is_changed"] for line in lines)
    assert 0 < changed < 40
    assert {line["before"]["why"] for line in lines} == {"alone"}
    shown = console.file.getvalue()
    assert f"{changed} of 40 decisions changed" in shown
    assert f"{log}:1: left out" in shown


def test_the_same_router_decides_the_same(files: Any, log: Path, tmp_path: Path, console: Console) -> None:
    out = tmp_path / "differences.jsonl"
    order = ReplayOrder(log=log, policy=files.policy, fleet=files.fleet, router="round-robin", out=out)
    assert replay(order, console) == 0
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [line["before"]["decode"] for line in lines] == [line["after"]["decode"] for line in lines]


def test_without_a_fleet_a_selector_needs_endpoints(
    files: Any, log: Path, tmp_path: Path, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    order = ReplayOrder(log=log, policy=files.policy)
    assert replay(order, console) == 2
    assert "fast" in capsys.readouterr().err
    endpoints = tmp_path / "endpoints.yaml"
    endpoints.write_text(
        "apiVersion: pdcoord.io/v1alpha1\nkind: Endpoints\nendpoints:\n"
        '  - {name: g, address: "10.0.9.9:8000", labels: {vendor: gaudi}}\n'
    )
    assert replay(ReplayOrder(log=log, policy=files.policy, endpoints=endpoints), console) == 0
    assert "what the policy believes" in console.file.getvalue()


@pytest.mark.parametrize("raw", [b"", b"junk\n", b'{"event": "policy.replaced"}\n'])
def test_a_log_without_calls_is_refused(
    files: Any, tmp_path: Path, console: Console, raw: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(raw)
    assert replay(ReplayOrder(log=empty, policy=files.policy, fleet=files.fleet), console) == 2
    assert "holds no call" in capsys.readouterr().err
