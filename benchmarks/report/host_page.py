"""The part of the page about host times: a picture and a table for each shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from benchmarks.report import host_tables, plots
from benchmarks.report.host_tables import COLUMNS, TITLES, HostTime
from benchmarks.results import OURS, file_stem
from benchmarks.shapes import HOST_MODES

Cells = Mapping[str, Mapping[str, Any]]


def host_section(run: Mapping[str, Any], figures: dict[str, bytes]) -> Iterator[str]:
    """Gives the HTML in pieces, and adds the PNG of each picture to `figures` by its file name."""
    yield f"<p>{escape(host_tables.EXPLANATION)}</p>"
    for cells in host_tables.groups(run):
        title = host_tables.title(cells)
        yield f"<h3>{escape(title)}</h3>"
        figure = plots.host_times(cells, f"host time of one call: {title}")
        svg, figures[_file_name(run, cells)] = plots.rendered(figure)
        yield f"<section>{svg}</section>{_table(cells)}"
        yield f"<p>{escape(host_tables.control_line(cells))}</p>"


def _file_name(run: Mapping[str, Any], cells: Cells) -> str:
    cell = next(iter(cells.values()))
    shape = f"{cell['out_features']}x{cell['in_features']}"
    return f"{file_stem(run)}-{shape}-m{cell['tokens']}.png"


def _table(cells: Cells) -> str:
    modes = [mode for mode in HOST_MODES if mode in cells]
    columns = "".join(f"<th>{text}</th>" for m in modes for text in (TITLES[m], *COLUMNS))
    rows = []
    for name in host_tables.contenders(cells):
        times = "".join(_cells(host_tables.host_time(cells[mode], name)) for mode in modes)
        style = "l ours" if name.startswith(OURS) else "l"
        rows.append(f'<tr><td class="{style}">{escape(host_tables.label(name))}</td>{times}</tr>')
    return (
        f'<section><table><tr><th class="l">us a call</th>{columns}</tr>{"".join(rows)}</table>'
        "</section>"
    )


def _cells(time: HostTime | None) -> str:
    if time is None:
        return '<td class="none">-</td>' + "<td></td>" * len(COLUMNS)
    first, *others = time.written()
    return f"<td><b>{first}</b></td>" + "".join(f"<td>{text}</td>" for text in others)
