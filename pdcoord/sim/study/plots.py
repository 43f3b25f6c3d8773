"""Plots of runs, the same bytes for the same figures: PNG, or SVG where the file's name ends so."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pdcoord.sim.study.results import OURS
from pdcoord.sim.study.timelines import TimeLine

_COLOURS = (*mpl.color_sequences["tab10"], *mpl.color_sequences["Dark2"])
_HATCHES = ("", "//", "..", "xx", "\\\\", "++")


@dataclass(frozen=True, slots=True)
class Point:
    """One figure, with the least and the most of it where it was taken several times."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """One router's points; dashed for what is shown beside another curve of the same name."""

    label: str
    points: Sequence[Point]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram.

    Attributes:
        bound: an objective, drawn across; None for none.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    is_log: bool = False
    bound: float | None = None


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of stacked shares.

    Attributes:
        parts: share by name of the part, in the order to stack them.
    """

    label: str
    parts: dict[str, float]


def draw_panels(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Diagrams side by side, two in a row, with one legend."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with _style():
        figure = Figure(figsize=(6.0 * columns, 3.4 * rows + 0.8), layout="constrained")
        figure.suptitle(title)
        grid = figure.subplots(rows, columns, squeeze=False)
        colours = _colours_of([curve.label for panel in panels for curve in panel.curves])
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, panel, colours)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        _legend(figure, list(grid.flat))
        _save(figure, path)


def draw_bars(path: Path, title: str, x_label: str, bars: Sequence[Bar]) -> None:
    """One horizontal bar a row, its parts stacked."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    with _style():
        height = 1.2 + 0.42 * len(bars) + 0.2 * len(names)
        figure = Figure(figsize=(10.0, height), layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots()
        offsets = [0.0] * len(bars)
        for index, name in enumerate(names):
            widths = [bar.parts.get(name, 0.0) for bar in bars]
            axes.barh(
                range(len(bars)),
                widths,
                left=offsets,
                label=name,
                color=_COLOURS[index % len(_COLOURS)],
                hatch=_HATCHES[index // len(_COLOURS) % len(_HATCHES)],
            )
            offsets = [offset + width for offset, width in zip(offsets, widths, strict=True)]
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        _legend(figure, [axes])
        _save(figure, path)


def draw_time_line(path: Path, title: str, line: TimeLine) -> None:
    """Waiting, generating and context of every pool over time."""
    parts = ("waiting", "generating", "context_tokens")
    labels = ("calls without a first token", "calls generating", "tokens of context")
    with _style():
        figure = Figure(figsize=(10.0, 7.5), layout="constrained")
        figure.suptitle(title)
        all_axes = list(figure.subplots(len(parts), 1, sharex=True))
        for axes, part, label in zip(all_axes, parts, labels, strict=True):
            for index, (name, pool) in enumerate(line.pools.items()):
                colour = _COLOURS[index % len(_COLOURS)]
                axes.plot(line.middles_s, getattr(pool, part), label=name, color=colour, linewidth=1.2)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        if any(line.held):
            all_axes[0].plot(
                line.middles_s, line.held, label="held, no route yet", color="black", linestyle=":"
            )
        all_axes[-1].set_xlabel("seconds from the start")
        _legend(figure, all_axes)
        _save(figure, path)


def _style() -> AbstractContextManager[None]:
    # A fixed salt, or the names inside an SVG would differ each time.
    return mpl.rc_context({"font.size": 9.0, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "pdcoord"})


def _draw_panel(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    for curve in panel.curves:
        xs = [point.x for point in curve.points]
        is_ours = curve.label == OURS
        axes.plot(
            xs,
            [point.y for point in curve.points],
            label=curve.label,
            color=colours[curve.label],
            linestyle="--" if curve.is_dashed else "-",
            linewidth=2.4 if is_ours else 1.2,
            marker="o",
            markersize=3,
            zorder=3 if is_ours else 2,
        )
        lows = [point.y if point.low is None else point.low for point in curve.points]
        highs = [point.y if point.high is None else point.high for point in curve.points]
        axes.fill_between(xs, lows, highs, color=colours[curve.label], alpha=0.12, linewidth=0)
    if panel.bound is not None:
        axes.axhline(panel.bound, color="grey", linestyle=":", linewidth=1.0)
    if panel.is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _colours_of(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, ours black."""
    others = [label for label in dict.fromkeys(labels) if label != OURS]
    found = {label: mpl.colors.to_hex(_COLOURS[i % len(_COLOURS)]) for i, label in enumerate(others)}
    return {**found, OURS: "#000000"}


def _legend(figure: Figure, all_axes: Sequence[Axes]) -> None:
    shown: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if shown:
        columns = min(3, len(shown))
        figure.legend(
            list(shown.values()), list(shown), loc="outside lower center", ncols=columns, fontsize=8
        )


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    is_svg = path.suffix == ".svg"
    # matplotlib writes its own version into a PNG, and the time into an SVG.
    metadata = {"Date": None} if is_svg else {"Software": None}
    figure.savefig(path, dpi=110, metadata=metadata)
