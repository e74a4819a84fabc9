"""The README's tables of the peak extra memory of a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.models.table import MIB
from benchmarks.report.ratio_table import Pair, grid
from benchmarks.report.tables import shape_name
from benchmarks.shapes import TRAINING


def memory_table(run: Mapping[str, Any], pairs: Iterable[Pair]) -> str:
    """Returns a row for each cell whose memory was measured, in MiB, and a column for each
    contender of the pairs; "" if no memory was measured."""
    names = list(dict.fromkeys(name for _, *both in pairs for name in both))
    rows = {
        f"{shape_name(cell)}, {cell['tokens']}": {
            result["contender"]: result["extra_memory_bytes"] / MIB
            for result in cell["results"]
            if result["contender"] in names and result["extra_memory_bytes"] is not None
        }
        for cell in run["cells"]
        if cell["mode"] == TRAINING
    }
    rows = {title: sizes for title, sizes in rows.items() if sizes}
    if not rows:
        return ""
    # A contender that cannot train, such as bitsandbytes in eval mode, has no column.
    names = [name for name in names if any(name in sizes for sizes in rows.values())]
    lines = [["", *names]]
    for title, sizes in rows.items():
        lines.append([title, *(_text(sizes.get(name)) for name in names)])
    return grid(lines)


def _text(mebibytes: float | None) -> str:
    return "-" if mebibytes is None else f"{mebibytes:.1f}"
