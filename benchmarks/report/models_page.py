"""The part of the page about whole models: a picture of the ratios, and the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.models.results import ACCELERATED, PEER
from benchmarks.models.table import EXPLANATION, HEAD, rows
from benchmarks.report.plots import INK, LOSING, MUTED, OURS_COLOR, rendered


def models_section(run: Mapping[str, Any], figures: dict[str, bytes]) -> Iterator[str]:
    """Gives the HTML in pieces, and adds the PNG of the picture to `figures` by its file name."""
    yield f"<h2>Whole models</h2><p>{escape(EXPLANATION.format(**run))}</p>"
    svg, figures[f"models-{len(figures) + 1}.png"] = rendered(ratios(run))
    yield f"<section>{svg}</section>"
    head = "".join(
        f'<th class="l">{escape(name)}</th>' if column < 2 else f"<th>{escape(name)}</th>"
        for column, name in enumerate(HEAD)
    )
    yield f"<section><table><tr>{head}</tr>"
    before = ""
    for model, contender, *cells in rows(run):
        first = ' class="first"' if model != before else ""
        style = "l ours" if contender in (ACCELERATED, "pylora") else "l"
        values = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        if not cells[1]:  # the contender was left out, and the first cell says why
            values = f'<td class="variant" colspan="{len(cells)}">{escape(cells[0])}</td>'
        shown = escape(model) if model != before else ""
        yield f'<tr{first}><td class="l">{shown}</td><td class="{style}">{escape(contender)}</td>'
        yield f"{values}</tr>"
        before = model
    yield "</table></section>"


def ratios(run: Mapping[str, Any]) -> Figure:
    """Draws for each model how many times less time and memory it takes once it is accelerated."""
    pairs = []
    for model in run["models"]:
        by_name = {result["contender"]: result for result in model["results"]}
        pairs.append((model["model"], by_name[PEER], by_name[ACCELERATED]))
    quantities = (
        ("time of a training step", lambda result: result["step"]["median"]),
        ("time of a decoded token", lambda result: result.get("token", {}).get("median")),
        ("peak memory of a step", lambda result: result["peak_bytes"]),
    )
    figure, panels = pyplot.subplots(
        1, len(quantities), figsize=(11.5, 1.2 + 0.27 * len(pairs)), layout="constrained"
    )
    names = [name for name, _, _ in pairs]
    for axes, (title, value) in zip(panels, quantities, strict=True):
        found = [(value(peer), value(ours)) for _, peer, ours in pairs]
        values = [peer / ours if peer and ours else 0.0 for peer, ours in found]
        bars = axes.barh(names, values, color=OURS_COLOR, height=0.66)
        labels = [f"{v:.2f}" if v else "-" for v in values]
        axes.bar_label(bars, labels, padding=3, color=INK, fontsize=8.5)
        axes.axvspan(0, 1, color=LOSING, zorder=0)
        axes.axvline(1, color=INK, linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.18, y=0.02)
        axes.set_xlim(left=0)
        axes.set_title(title, color=INK, fontsize=10.5)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(colors=MUTED, labelsize=8.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if axes is not panels[0]:
            axes.set_yticklabels([])
    figure.suptitle(
        f"{PEER} over the same, accelerated: above 1 pylora takes less", color=INK, fontsize=12
    )
    return figure
