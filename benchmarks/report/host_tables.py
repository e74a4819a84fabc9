"""The table of the host times of a run: it has a row for each contender and shows the modes side by
side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tables import aligned, shape_name
from benchmarks.results import CONTROL, OURS, result_of
from benchmarks.shapes import FORWARD, GRAD_FORWARD, HOST_MODES, TRAINING
from benchmarks.statistics import CONTROL_TOLERANCE

MODULE, LINEAR = "pylora nn.LoRALinear", "F.linear"
TITLES = {FORWARD: "no_grad", GRAD_FORWARD: "forward, grad", TRAINING: "forward + backward"}
# These columns follow the time of each mode.
COLUMNS = ("less C", "/linear", "/PEFT")
NOT_TIMED = ("-", "", "", "")
EXPLANATION = (
    "The median time of one of several calls in a row, on a layer that stays in the caches. "
    "less C: the time without the C call, which is what Python and torch add; /linear: the time "
    "over that of F.linear; /PEFT: the time over that of PEFT on bitsandbytes in its faster mode."
)
_PEFT = ("bitsandbytes + PEFT train", "bitsandbytes + PEFT eval")
_LORA_C_CALL, _NF4_C_CALL = "pylora C call lora_linear", "pylora C call nf4_linear"

CellResult = Mapping[str, Any]


@dataclass(frozen=True)
class HostTime:
    """The time of one contender in one mode, in seconds.

    beyond_c     the time without the C call; None for a peer, and for a part that makes no C call
    of_linear    the time over that of F.linear; None if F.linear was not measured
    of_peft      the time over that of PEFT on bitsandbytes; None if PEFT was not measured
    """

    seconds: float
    beyond_c: float | None
    of_linear: float | None
    of_peft: float | None

    def written(self) -> tuple[str, str, str, str]:
        """Returns the time in us and the texts below COLUMNS."""
        less_c = "" if self.beyond_c is None else f"{self.beyond_c * 1e6:.1f}"
        ratios = ("" if r is None else f"{r:.2f}" for r in (self.of_linear, self.of_peft))
        of_linear, of_peft = ratios
        return f"{self.seconds * 1e6:.1f}", less_c, of_linear, of_peft


def label(contender: str) -> str:
    """Returns the name to show. The contender "pylora" is a module here, and is shown as one."""
    return contender.replace(OURS, MODULE) if contender in (OURS, CONTROL) else contender


def groups(run: Mapping[str, Any]) -> list[dict[str, CellResult]]:
    """Returns, for each shape and number of tokens, the cells by mode."""
    cells: dict[tuple[Any, ...], dict[str, CellResult]] = {}
    for cell in run["cells"]:
        key = (cell["out_features"], cell["in_features"], cell["tokens"], cell["dtype"])
        cells.setdefault(key, {})[cell["mode"]] = cell
    return list(cells.values())


def contenders(cells: Mapping[str, CellResult]) -> list[str]:
    """Returns the names that were timed in some mode, without the control."""
    names = (r["contender"] for c in cells.values() for r in c["results"] if r["samples"])
    return [name for name in dict.fromkeys(names) if name != CONTROL]


def host_time(cell: CellResult, contender: str) -> HostTime | None:
    """Returns the contender's time in this cell, or None if it was not timed."""
    result = result_of(cell, contender)
    if result is None:
        return None
    seconds = result["median_s"]
    linear = _fastest(cell, (LINEAR,))
    peft = _fastest(cell, _PEFT)
    return HostTime(
        seconds,
        _beyond_c(cell, result),
        seconds / linear if linear else None,
        seconds / peft if peft else None,
    )


def _beyond_c(cell: CellResult, result: Mapping[str, Any]) -> float | None:
    name = result["contender"]
    if not name.startswith(OURS) or " plan " in name or " C call " in name:
        return None
    c_call = result_of(cell, _LORA_C_CALL if result["has_lora"] else _NF4_C_CALL)
    return result["median_s"] - c_call["median_s"] if c_call else None


def _fastest(cell: CellResult, names: Sequence[str]) -> float | None:
    times = [result["median_s"] for name in names if (result := result_of(cell, name))]
    return min(times, default=None)


def host_tables(run: Mapping[str, Any]) -> str:
    """Returns the explanation and a table for each shape and number of tokens."""
    return "\n\n".join([f"{run['op']}: {EXPLANATION}", *map(_table, groups(run))])


def title(cells: Mapping[str, CellResult]) -> str:
    cell = next(iter(cells.values()))
    return f"{shape_name(cell)}, M={cell['tokens']}, r={cell['rank']}, {cell['dtype']}"


def _table(cells: Mapping[str, CellResult]) -> str:
    modes = [mode for mode in HOST_MODES if mode in cells]
    rows = [("us a call", *(text for m in modes for text in (TITLES[m], *COLUMNS)), "")]
    for name in contenders(cells):
        times = (host_time(cells[mode], name) for mode in modes)
        written = (text for t in times for text in (t.written() if t else NOT_TIMED))
        rows.append((label(name), *written, ""))
    return "\n".join([title(cells), *(f"  {x}" for x in aligned(rows)), control_line(cells)])


def short_table(cells: Mapping[str, CellResult], names: Sequence[str]) -> list[list[str]]:
    """Returns the head and the rows of a table with the times of these contenders in us."""
    modes = [mode for mode in HOST_MODES if mode in cells]
    lines = [["", *(TITLES[mode] for mode in modes)]]
    for name in names:
        times = [host_time(cells[mode], name) for mode in modes]
        if any(times):
            lines.append([label(name), *(time.written()[0] if time else "-" for time in times)])
    return lines


def control_line(cells: Mapping[str, CellResult]) -> str:
    """Says by how much two copies of the same layer differ in each mode."""
    differences = [
        f"{TITLES[mode]} {cell['control_ratio'] - 1:+.1%}"
        for mode, cell in cells.items()
        if cell["control_ratio"]
    ]
    return (
        f"control, two copies of {MODULE}: {', '.join(differences)}; "
        f"beyond {CONTROL_TOLERANCE:.0%} the machine was too busy for these times to count"
    )
