"""`python -m benchmarks report`: an HTML page that needs no other file, and PNGs of its plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks import heap, results
from benchmarks.report import cuda_goals, goals, plots
from benchmarks.report.host_page import host_section
from benchmarks.report.models_page import models_section
from benchmarks.report.tables import (
    contenders_of,
    device_seconds,
    duration,
    has_host_times,
    ratio_to_ours,
    seconds_as_called,
    shape_name,
    shares_of_work,
    size,
)
from benchmarks.results import BASE_ONLY, CONTROL, OURS, result_of, write_atomically
from benchmarks.shapes import layers_named
from benchmarks.statistics import BUSY, CONTROL_TOLERANCE
from benchmarks.timing import HOST

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f7f8fa; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; color: #3e4c59; }
p, .facts { color: #52606d; margin: 4px 0 10px; } .facts b { color: #1f2933; font-weight: 600; }
section, details { background: #fff; border: 1px solid #e4e7eb; border-radius: 8px;
  padding: 12px 16px; margin: 10px 0; overflow-x: auto; }
summary { cursor: pointer; color: #3e4c59; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th { text-align: right; font-weight: 600; color: #52606d; padding: 5px 9px;
  border-bottom: 2px solid #e4e7eb; vertical-align: bottom; }
td { text-align: right; padding: 4px 9px; border-bottom: 1px solid #eef0f3; white-space: nowrap; }
th.l, td.l { text-align: left; }
td.variant { color: #6b7785; white-space: normal; min-width: 220px; }
tr.first td { border-top: 2px solid #e4e7eb; }
.ours { font-weight: 600; color: #2563eb; } .win { background: #e8f6ee; }
.lose { background: #fdecea; color: #9b1c1c; } .none { color: #a3adb8; }
.tag { border-radius: 10px; padding: 1px 9px; font-size: 12.5px; }
svg { max-width: 100%; height: auto; }
"""

_EXPLANATION = f"""<p>Times are medians of single calls. Contenders take turns in a new random order
in each round, each over more memory than the last-level cache holds, and every result was first
checked against float64. On a GPU a time is that of the device alone; "host" is the time that Python
and the driver need to issue a call, and each of many calls from Python takes the slower of the two.
A ratio is a contender's time over pylora's: above 1 pylora is faster, below 1 it loses. The control
is a second copy of pylora; if it differs by more than {CONTROL_TOLERANCE:.0%}, the ratios beside it
are in doubt. The limit is the time for the bytes and FLOP that the contender's own format needs at
least, at the speeds measured in the same run. <sup>!</sup> marks a peer whose result fails the
numerics rule.</p>"""

Run = Mapping[str, Any]
Seconds = Callable[[Run], float]


def write_report(runs: Sequence[Run], models: Sequence[Run], out: Path) -> list[Path]:
    """Writes report.html and a PNG of each picture into `out`, and returns their paths.

    runs      those of ops
    models    those of whole models
    """
    figures: dict[str, bytes] = {}
    body = [_header([*runs, *models])]
    for run in models:
        body += models_section(run, figures)
    if runs:
        body += [_EXPLANATION, *_goals(runs)]
    for run in runs:
        body += _op(run, figures)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>pylora benchmarks</title><style>{_STYLE}</style>"
        f"<main>{''.join(body)}</main></html>"
    )
    written = [out / "report.html", *(out / name for name in figures)]
    write_atomically(written[0], page)
    for name, png in figures.items():
        write_atomically(out / name, png)
    return written


def _header(runs: Sequence[Run]) -> str:
    """Returns the machine, the versions and the commit; if runs differ in them, those of each."""
    lines = []
    for value in dict.fromkeys(map(_facts, runs)):
        ops = [
            results.title(run) if "op" in run else "whole models"
            for run in runs
            if _facts(run) == value
        ]
        which = "" if len(ops) == len(runs) else f"<b>{', '.join(ops)}</b>: "
        lines.append(f'<div class="facts">{which}{value}</div>')
    return f"<h1>pylora benchmarks</h1>{''.join(lines)}"


def _facts(run: Run) -> str:
    machine, limits, commit = run["machine"], run.get("roofline"), run["commit"]
    caches = ", ".join(f"{name} {size(count)}" for name, count in machine["caches"].items())
    known = f"commit {commit['hash'][:10]}" if commit else "no commit"
    dirty = " <b>with uncommitted changes</b>" if commit and commit["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    if (machine["load"] or 0) > BUSY:
        dirty += f", <b>machine not idle: load average {machine['load']:.1f}</b>"
    kept = f", heap {machine['heap']}" if machine["heap"] != heap.DEFAULT else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    measured = suite = ""
    if limits is not None:
        measured = (
            f"measured limits: read {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, copy "
            f"{limits['copy_bytes_per_s'] / 1e9:.1f} GB/s, bf16 matmul "
            f"{limits['matmul_flop_per_s'] / 1e12:.2f} TFLOP/s<br>"
        )
        suite = f"{run['suite']} suite, "
    return (
        f"<b>{escape(machine['gpu'] or machine['cpu'])}</b>{escape(driver)}, "
        f"{machine['threads']} of {machine['cores']} cores, {caches}{kept}<br>{measured}"
        f"{escape(versions)}<br>{suite}{known}{dirty}, {run['date'][:10]}"
    )


def _goals(runs: Sequence[Run]) -> Iterator[str]:
    yield from _cuda_goals(runs)
    outcomes = goals.goal_outcomes(runs)
    if all(outcome.met is None for outcome in outcomes):
        return
    met, missed = (sum(o.met is value for o in outcomes) for value in (True, False))
    yield f"<h2>Goals on a CPU: {met} met, {missed} missed</h2>"
    yield "<p>LoRA r=16 is included on our side only. Each column is one shape of the weight.</p>"
    for shapes, group in goals.by_shapes(outcomes):
        if any(outcome.met is not None for outcome in group):
            yield _goals_table(shapes, group)


def _goals_table(shapes: Sequence[tuple[int, int]], group: Sequence[goals.GoalOutcome]) -> str:
    head = "".join(f"<th>{n} x {k}</th>" for n, k in shapes)
    rows = []
    for outcome in group:
        cells = "".join(_goal_cell(outcome.goal, v) for v in outcome.values.values())
        style = {True: "win", False: "lose", None: "none"}[outcome.met]
        word = escape(goals.verdict(outcome))
        rows.append(
            f'<tr><td class="l">{escape(str(outcome.goal))}</td>{cells}'
            f'<td class="l"><span class="tag {style}">{word}</span></td></tr>'
        )
    return (
        f'<section><table><tr><th class="l">goal</th>{head}<th></th></tr>{"".join(rows)}</table>'
        "</section>"
    )


def _cuda_goals(runs: Sequence[Run]) -> Iterator[str]:
    outcomes = cuda_goals.goal_outcomes(runs)
    if not outcomes:
        return
    yield f"<h2>Goals on a GPU: {cuda_goals.title(outcomes)}</h2>"
    yield "<p>The worst cell that each goal was measured in decides.</p>"
    head = "".join(f'<th class="l">{escape(column)}</th>' for column in cuda_goals.HEAD)
    rows = []
    for outcome in outcomes:
        *cells, verdict = map(escape, cuda_goals.row(outcome))
        style = {True: "win", False: "lose", None: "none"}[outcome.met]
        columns = "".join(f'<td class="l">{text}</td>' for text in cells)
        rows.append(f'<tr>{columns}<td class="l"><span class="tag {style}">{verdict}</span></td>')
    yield f"<section><table><tr>{head}</tr>{'</tr>'.join(rows)}</tr></table></section>"


def _goal_cell(goal: goals.Goal, value: float | None) -> str:
    if value is None:
        return '<td class="none">-</td>'
    return f'<td class="{"win" if goal.met_by(value) else "lose"}">{goal.written(value)}</td>'


def _op(run: Run, figures: dict[str, bytes]) -> Iterator[str]:
    yield f"<h2>{results.title(run)}</h2>"
    if any(cell["timing"] == HOST for cell in run["cells"]):
        yield from host_section(run, figures)
        yield _details(run)
        return
    for mode, timing in dict.fromkeys((c["mode"], c["timing"]) for c in run["cells"]):
        cells = [c for c in run["cells"] if (c["mode"], c["timing"]) == (mode, timing)]
        title = mode if timing == "eager" else f"{mode}, {timing}"
        yield f"<h3>{title}: how many times faster pylora is</h3>"
        yield _ratio_table(cells)
        if any(map(has_host_times, cells)):
            yield f"<h3>{title}, as called from Python: how many times faster pylora is</h3>"
            yield _ratio_table(cells, seconds_as_called)
        what = f"{results.title(run)} {title}"
        pictures = {
            "speedup": plots.speedup(cells, f"{what}: how many times faster pylora is"),
            "limit": plots.of_limit(cells, f"{what}: share of the measured limit"),
            "memory": plots.memory(cells, f"{what}: peak extra memory of one call"),
        }
        for picture, figure in pictures.items():
            if figure is None:
                continue
            svg, png = plots.rendered(figure)
            name = f"{results.file_stem(run)}-{mode.replace('+', '-')}-{timing}-{picture}.png"
            figures[name] = png
            yield f"<section>{svg}</section>"
    yield _details(run)


def _ratio_table(cells: Sequence[Run], seconds: Seconds = device_seconds) -> str:
    names, with_host = contenders_of(cells), any(map(has_host_times, cells))
    columns = ("pylora", *(["host"] if with_host else []), "of limit", *names, "control")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows, shape_above = [], None
    for cell in cells:
        ours, control = result_of(cell, OURS), cell["control_ratio"]
        off = control is not None and abs(control - 1) > CONTROL_TOLERANCE
        shape = shape_name(cell)
        layers = layers_named(cell["out_features"], cell["in_features"])
        first = (
            f'<td class="l" title="{escape(layers)}">{shape if shape != shape_above else ""}</td>'
        )
        opening = '<tr class="first">' if shape != shape_above else "<tr>"
        rows.append(
            f"{opening}{first}"
            f"<td>{cell['tokens'] or ''}</td>"
            f'<td class="ours">{duration(ours["median_s"]) if ours else "-"}</td>'
            + (f"<td>{_host(ours)}</td>" if with_host else "")
            + f"<td>{format(ours['of_roofline'], '.0%') if ours else '-'}</td>"
            + "".join(_ratio_cell(cell, name, seconds) for name in names)
            + f'<td class="{"lose" if off else "none"}">'
            f"{format(control - 1, '+.1%') if control else '-'}</td></tr>"
        )
        shape_above = shape
    return (
        f'<section><table><tr><th class="l">out x in</th><th>M</th>{head}</tr>'
        f"{''.join(rows)}</table></section>"
    )


def _host(result: Run | None) -> str:
    return duration(result["host_s"]) if result and result["host_s"] is not None else "-"


def _ratio_cell(cell: Run, name: str, seconds: Seconds) -> str:
    ratio, result = ratio_to_ours(cell, name, seconds), result_of(cell, name)
    if ratio is None:
        return '<td class="none">-</td>'
    style = "" if name == BASE_ONLY else "win" if ratio >= 1 else "lose"
    mark = "" if result["status"] == "ok" else f'<sup title="{escape(result["note"])}">!</sup>'
    return f'<td class="{style}">{ratio:.2f}{mark}</td>'


def _details(run: Run) -> str:
    """Returns every number of every contender, and the reason if one was not timed."""
    columns = ("median", "p20", "p80", "samples", "host", "GB/s", "GFLOP/s", "of limit")
    columns += ("extra memory",)
    head = "".join(f"<th>{column}</th>" for column in columns)
    rows = []
    for cell in run["cells"]:
        m = f", M={cell['tokens']}" if cell["tokens"] else ""
        title = f"{cell['mode']}, {shape_name(cell)}{m}, {cell['timing']}"
        for index, result in enumerate(cell["results"]):
            first = f'<td class="l">{title if index == 0 else ""}</td>'
            name = escape(result["contender"])
            style = ' class="first"' if index == 0 else ""
            ours = " ours" if result["contender"] in (OURS, CONTROL) else ""
            rows.append(
                f'<tr{style}>{first}<td class="l{ours}" title="{escape(result["version"])}">'
                f"{name}</td>{_numbers(result)}</tr>"
            )
    return (
        "<details><summary>Every number, with the kernel variant and how accurate it was</summary>"
        f'<table><tr><th class="l">cell</th><th class="l">contender</th>{head}'
        f'<th class="l">variant, accuracy</th></tr>{"".join(rows)}</table></details>'
    )


def _numbers(result: Run) -> str:
    notes = (result["variant"], result["note"], result["timing_note"])
    note = escape(". ".join(text for text in notes if text))
    if result["median_s"] is None:
        status = f'<td class="l none" colspan="9">{result["status"]}</td>'
        return f'{status}<td class="l variant">{note}</td>'
    values = (
        duration(result["median_s"]),
        duration(result["p20_s"]),
        duration(result["p80_s"]),
        str(result["samples"]),
        _host(result),
        *shares_of_work(result),
        size(result["extra_memory_bytes"]) or "-",
    )
    marked = note if result["status"] == "ok" else f"<b>{escape(result['status'])}</b>: {note}"
    return "".join(f"<td>{v}</td>" for v in values) + f'<td class="l variant">{marked}</td>'
