"""Pictures of a run: the speed-up and the share of the roofline against M, and the memory."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.report import host_tables
from benchmarks.report.tables import contenders_of, ratio_to_ours, shape_name
from benchmarks.results import BASE_ONLY, OURS, REFERENCE, result_of
from benchmarks.statistics import FEW_SAMPLES

INK, MUTED, GRID, OURS_COLOR, LOSING = "#1f2933", "#6b7785", "#e4e7eb", "#2563eb", "#fdecea"
# A word in a name -> the color. Contenders of the same color differ in the style of their line.
_FAMILIES = (
    ("pylora, dense", "#38bdf8"),
    ("dense + PEFT", "#4d7c0f"),
    ("PEFT", "#d97706"),
    ("bitsandbytes", "#b4237a"),
    ("addmm_", "#0d9488"),
    ("dequantize + linear", "#0d9488"),
    ("dense", "#4b5563"),
    ("torchao", "#7c3aed"),
    ("reference", "#a3adb8"),
    ("pylora", OURS_COLOR),
)
# A word in a name -> (the style of the line, the marker).
_MARKS = {
    "pylora dequantize": ("--", "s"),
    "eval": ("--", "s"),
    "fp16": ("--", "s"),
    "fp32": (":", "^"),
    "no LoRA": ("--", "s"),
}
# What tells two contenders apart that would look the same.
_OTHER_MARKS = tuple((line, mark) for mark in "DvPX<>" for line in ("-.", "--", ":", "-"))
_PANEL_WIDTH, _PANEL_HEIGHT = 3.9, 3.1

Cells = Sequence[Mapping[str, Any]]


def color_of(contender: str) -> str:
    return next((color for word, color in _FAMILIES if word in contender), MUTED)


def styles_of(contenders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns a style for each contender; no two are the same."""
    styles: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        first = next((mark for word, mark in _MARKS.items() if word in contender), ("-", "o"))
        for line, marker in (first, *_OTHER_MARKS):
            style = {"color": color_of(contender), "linestyle": line, "marker": marker}
            if style not in styles.values():
                break
        else:
            raise ValueError(f"{contender} has no style of its own: add one to _OTHER_MARKS")
        styles[contender] = style
    return styles


def speedup(cells: Cells, title: str) -> Figure:
    """Draws how many times faster pylora is. There is a panel for each shape; in the shaded part
    pylora loses.

    If the cells have several M, lines show the ratio against M, otherwise bars. The reference is
    left out unless it is alone: it is so slow that it would flatten all other lines.
    """
    names = [n for n in contenders_of(cells) if n not in (BASE_ONLY, REFERENCE)] or [REFERENCE]
    if len({cell["tokens"] for cell in cells}) > 1:
        return _lines(cells, names, ratio_to_ours, title, "times faster than", log=True)
    return _bars(cells, names, ratio_to_ours, title, lambda ratio: f"{ratio:.2f}x", line_at=1.0)


def of_limit(cells: Cells, title: str) -> Figure:
    """Draws the share of the measured limit that each contender reaches with its least work."""
    names = [OURS, *(n for n in contenders_of(cells) if n != BASE_ONLY)]

    def share(cell: Mapping[str, Any], name: str) -> float | None:
        result = result_of(cell, name)
        return 100 * result["of_roofline"] if result else None

    if len({cell["tokens"] for cell in cells}) > 1:
        return _lines(cells, names, share, title, "% of the limit", log=False)
    return _bars(cells, names, share, title, lambda percent: f"{percent:.0f}%", line_at=100.0)


def memory(cells: Cells, title: str) -> Figure | None:
    """Draws the peak extra memory of a call at the largest M; None if it was not measured."""

    def extra(cell: Mapping[str, Any], name: str) -> float | None:
        result = result_of(cell, name)
        known = result is not None and result["extra_memory_bytes"] is not None
        return result["extra_memory_bytes"] / 2**20 if known else None

    names = [OURS, *(n for n in contenders_of(cells) if n != BASE_ONLY)]
    measured = [c for c in cells if any(extra(c, name) is not None for name in names)]
    if not measured:
        return None
    largest = max(cell["tokens"] for cell in measured)
    measured = [cell for cell in measured if cell["tokens"] == largest]
    return _bars(measured, names, extra, title, lambda mib: f"{mib:.0f} MiB")


def host_times(cells: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Draws the microseconds of a call, a panel for each mode. The dark part is the C call."""
    names = host_tables.contenders(cells)
    labels = [host_tables.label(name) for name in names]
    figure, panels = _panels(len(cells), 0.9 + 0.25 * len(names))
    for index, (axes, (mode, cell)) in enumerate(zip(panels, cells.items(), strict=True)):
        times = [host_tables.host_time(cell, name) for name in names]
        colors = [color_of(name) for name in names]
        values = [0.0 if t is None else t.seconds * 1e6 for t in times]
        beyond = [0.0 if t is None or t.beyond_c is None else t.beyond_c * 1e6 for t in times]
        bars = axes.barh(labels, values, color=colors, height=0.66)
        c_calls = [v - b if b else 0.0 for v, b in zip(values, beyond, strict=True)]
        axes.barh(labels, c_calls, color=INK, height=0.66)
        written = ["-" if t is None else f"{t.seconds * 1e6:.1f}" for t in times]
        axes.bar_label(bars, written, padding=3, color=INK, fontsize=8.5)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(host_tables.TITLES[mode])
        _frame(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("us a call (dark: the C call)")
        if index:
            axes.set_yticklabels([])
    figure.suptitle(title, color=INK, fontsize=12)
    return figure


def _lines(
    cells: Cells, names: Sequence[str], value: Any, title: str, what: str, log: bool
) -> Figure:
    shapes = list(dict.fromkeys(map(shape_name, cells)))
    figure, panels = _panels(len(shapes))
    styles, any_hollow = styles_of(names), False
    for axes, shape in zip(panels, shapes, strict=False):
        here = sorted((c for c in cells if shape_name(c) == shape), key=lambda c: c["tokens"])
        for name in names:
            points = [(c["tokens"], value(c, name), _has_few_samples(c, name)) for c in here]
            points = [point for point in points if point[1] is not None]
            if points:
                any_hollow |= _line(axes, points, name, styles[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(*_ticks([c["tokens"] for c in here]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=shape, xlabel="M (tokens)")
        _frame(axes)
        if log:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.axhline(1, color=INK, linewidth=1.2)
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0.7), high)
            axes.axhspan(min(low, 0.7), 1, color=LOSING, zorder=0)
        else:
            axes.set_ylim(0, max(100, axes.get_ylim()[1]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f}%"))
    if any_hollow:
        title = f"{title}\nA hollow point is a median of fewer than {FEW_SAMPLES} samples."
    _finish(figure, panels, title, what, len(shapes))
    return figure


def _ticks(tokens: Sequence[int]) -> tuple[list[int], list[str]]:
    """Returns the ticks and their labels, which are empty where they would overlap."""
    labels, last = [], 0.0
    for m in tokens:
        labels.append(str(m) if m >= 1.6 * last else "")
        last = m if labels[-1] else last
    return list(tokens), labels


def _line(
    axes: Axes, points: Sequence[tuple[int, float, bool]], name: str, style: Mapping[str, Any]
) -> bool:
    """Draws the points (M, value, if it has few samples) of a contender; returns True if one is
    hollow."""
    tokens, values, _ = zip(*points, strict=True)
    width = 2.6 if name == OURS else 1.6
    axes.plot(tokens, values, label=name, linewidth=width, markersize=4.5, **style)
    hollow = [(m, v) for m, v, has_few in points if has_few]
    if hollow:
        over = {**style, "linestyle": "none", "markerfacecolor": "white", "markersize": 4.5}
        axes.plot(*zip(*hollow, strict=True), zorder=3, **over)
    return bool(hollow)


def _has_few_samples(cell: Mapping[str, Any], name: str) -> bool:
    """Returns True if the contender or ours, with which it is compared, has few samples."""
    results = result_of(cell, name), result_of(cell, OURS)
    return any(result is not None and result["samples"] < FEW_SAMPLES for result in results)


def _bars(
    cells: Cells,
    names: Sequence[str],
    value: Any,
    title: str,
    written: Any,
    line_at: float | None = None,
) -> Figure:
    present = [n for n in names if any(value(c, n) is not None for c in cells)]
    figure, panels = _panels(len(cells), 0.9 + 0.29 * len(present))
    for index, (axes, cell) in enumerate(zip(panels, cells, strict=False)):
        values = [value(cell, name) for name in present]
        colors = [color_of(name) for name in present]
        bars = axes.barh(present, [v or 0 for v in values], color=colors, height=0.66)
        labels = ["-" if v is None else written(v) for v in values]
        axes.bar_label(bars, labels, padding=3, color=INK, fontsize=8.5)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_title(shape_name(cell) + (f", M={cell['tokens']}" if cell["tokens"] else ""))
        _frame(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        if line_at is not None:
            axes.axvline(line_at, color=INK, linewidth=1.2)
        if index % _columns(len(cells)):
            axes.set_yticklabels([])
    for axes in panels[len(cells) :]:
        axes.remove()
    figure.suptitle(title, color=INK, fontsize=12)
    return figure


def _columns(count: int) -> int:
    return min(count, 3)


def _panels(count: int, height: float = _PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    columns = _columns(count)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(max(_PANEL_WIDTH * columns, 7.0), height * rows + 0.7),
        layout="constrained",
        squeeze=False,
    )
    return figure, list(grid.flat)


def _finish(figure: Figure, panels: list[Axes], title: str, what: str, count: int) -> None:
    for index in range(0, count, _columns(count)):
        panels[index].set_ylabel(what, color=INK)
    for axes in panels[count:]:
        axes.remove()
    handles_by_label = {}
    for axes in panels[:count]:
        handles, labels = axes.get_legend_handles_labels()
        handles_by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(
        handles_by_label.values(),
        handles_by_label.keys(),
        loc="outside lower center",
        ncols=1 + _columns(count),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, color=INK, fontsize=12)


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set(color=INK, fontsize=10.5)
    axes.xaxis.label.set_color(INK)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)


def rendered(figure: Figure) -> tuple[str, bytes]:
    """Returns (SVG to put into a page, PNG). The same figure always gives the same bytes."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pylora"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.savefig(png, format="png", dpi=130)
    pyplot.close(figure)
    text = svg.getvalue()
    return text[text.index("<svg") :], png.getvalue()
