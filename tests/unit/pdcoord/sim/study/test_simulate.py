import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdcoord.sim.study.lines import read_results
from pdcoord.sim.study.simulate import Order, simulate


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def order(files: Any, **changed: Any) -> Order:
    fields = {
        "policy": files.policy,
        "fleet": files.fleet,
        "workload": files.workload,
        "routers": ["pdcoord"],
    }
    return Order(**{**fields, **changed})


def test_equal_orders_write_equal_files(files: Any, tmp_path: Path, console: Console) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        made = order(files, routers=["ours", "dynamo+cross"], rate_scales=[0.5, 1.0], out=folder)
        assert simulate(made, console) == 0
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    assert {
        "summary.json",
        "rates.png",
        "ways.png",
        "pdcoord-x1.jsonl",
        "timeline-dynamo+cross-x0.5.png",
    } <= set(names)
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_the_summary_adds_up_what_the_lines_say(files: Any, tmp_path: Path, console: Console) -> None:
    assert simulate(order(files, out=tmp_path / "out"), console) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    (run,) = summary["runs"]
    results, bad = read_results((tmp_path / "out" / run["results"]).read_bytes())
    assert not bad
    assert run["summary"]["calls"] == len(results) == 40
    assert sum(way["calls"] for way in run["ways"]) == 40
    assert set(run["kinds"]) == {"short", "long"}
    assert sum(kind["calls"] for kind in run["kinds"].values()) == 40
    shown = console.file.getvalue()
    assert "engine mi-2 is in no pool" in shown
    assert "within objectives" in shown


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"routers": ["nobody"]}, "nobody"),
        ({"rate_scales": [0.0]}, "--rate-scale"),
        ({"rate_scales": [float("nan")]}, "--rate-scale"),
        ({"until_s": -1.0}, "--until-s"),
        ({"signal_age_s": -1.0}, "--signal-age-s"),
        ({"policy": Path("missing.yaml")}, "missing.yaml"),
        ({"fleet": Path("missing.yaml")}, "missing.yaml"),
        ({"workload": Path("missing.yaml")}, "missing.yaml"),
    ],
)
def test_what_cannot_be_run_is_named(
    files: Any, console: Console, changed: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(order(files, **changed), console) == 2
    said = capsys.readouterr().err
    assert said.startswith("pdcoord simulate: ")
    assert named in said
