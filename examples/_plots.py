"""Pictures of training runs. They are drawn from numbers alone and never open a window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _files import replacing_file

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
ACCENT = "#2563eb"
COLORS = {
    "qlora": "#2563eb",
    "lora": "#0d9488",
    "hybrid": "#9333ea",
    "full": "#d97706",
    "peft": "#6b7280",
}


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without a bias towards its start."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(average / total)
    return result


def save_loss_curve(
    path: Path, losses: Sequence[float], before: float, after: float | None, title: str
) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=ACCENT, alpha=0.25, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color=ACCENT, linewidth=2, label="training, smoothed")
    points = [(0, before)] if after is None else [(0, before), (len(losses), after)]
    axes.plot(
        *zip(*points, strict=True), "o", color=INK, markersize=7, label="validation", zorder=3
    )
    for number, (step, value) in enumerate(points):
        axes.annotate(
            f"{value:.2f}",
            (step, value),
            textcoords="offset points",
            xytext=(-9, -4) if number == 0 else (9, -4),  # outwards, where no curve is
            ha="right" if number == 0 else "left",
            color=INK,
        )
    axes.set(title=title, xlabel="step", ylabel="loss per token of the completion")
    axes.legend(frameon=False)
    axes.margins(x=0.09, y=0.1)
    _plain_frame(axes)
    _save(figure, path)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set_color(INK)
    axes.tick_params(colors=MUTED, labelcolor=INK)


def _save(figure: Any, path: Path) -> None:
    with replacing_file(path) as temporary:
        figure.savefig(temporary)
    pyplot.close(figure)


def save_comparison(path: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Training curves, and one bar a method for loss, memory and speed. `results`: summaries."""
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7), dpi=120, layout="constrained")
    (curves, final), (memory, speed) = grid
    for result in results:
        curves.plot(
            range(1, len(result["losses"]) + 1),
            smoothed(result["losses"]),
            color=COLORS[result["method"]],
            linestyle="--" if result["method"] == "peft" else "-",
            label=result["method"],
            linewidth=1.8,
        )
    curves.set(title="Training loss, smoothed", xlabel="step")
    curves.legend(frameon=False)
    _plain_frame(curves)
    mebibytes = [
        (r["memory_bytes"]["peak"] - r["memory_bytes"]["libraries"]) / 2**20 for r in results
    ]
    losses = [r["after"]["loss"] for r in results]
    speeds = [r["tokens_per_second"] for r in results]
    for axes, heading, values, form in (
        (final, "Validation loss after training", losses, "{:.3f}"),
        (memory, "Peak memory above the libraries, MiB", mebibytes, "{:.0f}"),
        (speed, "Tokens per second in training", speeds, "{:.0f}"),
    ):
        names = [r["method"] for r in results]
        bars = axes.barh(names, values, color=[COLORS[name] for name in names], height=0.65)
        axes.bar_label(bars, labels=[form.format(v) for v in values], padding=4, color=INK)
        axes.invert_yaxis()
        axes.set_title(heading)
        axes.margins(x=0.15)
        _plain_frame(axes)
        axes.grid(axis="y", visible=False)
    figure.suptitle(title, color=INK)
    _save(figure, path)
