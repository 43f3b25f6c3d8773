"""The whole command on small files: text, JSON, exit status, and the simulator beside the prediction."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdcoord.commands import app

FLEET = """\
apiVersion: pdcoord.io/v1alpha1
kind: EmulatedFleet
seed: 7
model: demo/llama-8b
engines:
  - {name: p, profile: intel-gaudi3-8b, role: prefill, port: 0, link_gbit_per_s: 400, cost_per_hour: 2}
  - {name: d, profile: amd-mi300x-8b, role: decode, port: 0, link_gbit_per_s: 400, cost_per_hour: 3}
"""
WORKLOAD = """\
apiVersion: pdcoord.io/v1alpha1
kind: Workload
slo: {ttft_ms: 3000, tpot_ms: 80}
load: {stages: [{rate: 1, duration: 60}, {rate: 3, duration: 60}]}
parts:
  - name: documents
    rag: {documents: 60, document_len: 2000, question_len: 50, output_len: 100}
"""


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    return ["plan", "--fleet", str(tmp_path / "fleet.yaml"), "--workload", str(tmp_path / "workload.yaml")]


def test_advice_is_checked_in_the_simulator(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdcoord.sim.advise.check.CHECK_CALLS", 300)
    monkeypatch.setattr("pdcoord.sim.advise.check.CHECK_S_MIN", 20.0)
    result = CliRunner().invoke(app, [*files, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["offered_per_s"] == pytest.approx(2.0, rel=0.25)
    assert {kind["name"] for kind in report["kinds"]} == {"intel-gaudi3-8b", "amd-mi300x-8b"}
    assert report["as_written"]["roles"]["amd-mi300x-8b"]["decode"] == 1
    shares = [each["share"] for each in report["advised"]["bottlenecks"]]
    assert shares == sorted(shares, reverse=True)
    assert report["advised"]["goodput_per_s"] >= 0.98 * report["as_written"]["goodput_per_s"] > 2.0
    assert report["costs"]["per_hour"] == 5.0
    checks = report["checks"]
    assert checks[0]["roles"] == "advised"
    # Neither is exact: the one knows no chance, the other no long run.
    best = max(each["simulated_goodput_per_s"] for each in checks)
    assert 0.3 * report["advised"]["goodput_per_s"] < best <= 1.3 * report["advised"]["goodput_per_s"]


def test_text_names_roles_bottleneck_and_cost(files: list[str]) -> None:
    result = CliRunner().invoke(app, [*files, "--no-check"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for words in ("Advised roles", "Bottleneck: ", "per million tokens", "What one more engine buys"):
        assert words in result.stdout
    assert "simulator" not in result.stdout


def test_a_bad_file_and_a_fleet_without_hope_say_so(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "workload.yaml").write_text(WORKLOAD.replace("tpot_ms: 80", "tpot_ms: 5"))
    result = CliRunner().invoke(app, files)
    assert result.exit_code == 1
    assert "no advice: slo.tpot_ms is 5, no more than the" in result.stderr
    (tmp_path / "workload.yaml").write_text(WORKLOAD.replace("rag:", "rug:"))
    result = CliRunner().invoke(app, files)
    assert result.exit_code == 2
    assert "parts[0].rug: is not a known key" in result.stderr.replace("\n", " ")
