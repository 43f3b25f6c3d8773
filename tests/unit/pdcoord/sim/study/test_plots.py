from collections.abc import Callable
from pathlib import Path

import pytest

from pdcoord.sim.study.plots import (
    Bar,
    Curve,
    Panel,
    Point,
    draw_bars,
    draw_panels,
    draw_time_line,
)
from pdcoord.sim.study.results import CallResult
from pdcoord.sim.study.timelines import time_line

PNG = b"\x89PNG"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_figures_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    curves = [
        Curve("pdcoord", [Point(1.0, 2.0, 1.5, 2.5), Point(2.0, 3.0)]),
        Curve("llm-d", [Point(1.0, 1.0)], is_dashed=True),
    ]
    panels = [Panel(name, "rate", "s", curves, is_log=name == "b", bound=1.5) for name in "abc"]
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for path in paths:
        draw_panels(path, "title", panels)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert first.startswith(PNG if suffix == ".png" else b"<?xml")


def test_bars_and_time_lines_are_drawn(tmp_path: Path, make_result: Callable[..., CallResult]) -> None:
    bars = [Bar("pdcoord", {"a": 0.7, "b": 0.3}), Bar("round-robin", {f"w{i}": 0.05 for i in range(14)})]
    draw_bars(tmp_path / "bars.png", "title", "share", bars)
    line = time_line([make_result(number) for number in range(20)])
    draw_time_line(tmp_path / "line.png", "title", line)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("bars.png", "line.png"))
