"""Host times of a run, read from its JSON: a row for each path, the modes side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tables import CONTROL, OURS, aligned, shape_name
from benchmarks.results import result_of
from benchmarks.shapes import FORWARD, GRAD_FORWARD, HOST_MODES, TRAINING
from benchmarks.statistics import CONTROL_TOLERANCE

MODULE, LINEAR = "pylora nn.LoRALinear", "F.linear"
TITLES = {FORWARD: "no_grad", GRAD_FORWARD: "forward, grad", TRAINING: "forward + backward"}
# Behind the time of a mode.
COLUMNS = ("less C", "/linear", "/PEFT")
NOT_TIMED = ("-", "", "", "")
EXPLANATION = (
    "Median time of a call, as one of several in a row, on a layer that stays in the caches. "
    "less C: the time without the C call, which is what Python and torch add to it; /linear: over "
    "the time of F.linear; /PEFT: over the time of PEFT on bitsandbytes, in its faster mode."
)
_PEFT = ("bitsandbytes + PEFT train", "bitsandbytes + PEFT eval")
_LORA_C_CALL, _NF4_C_CALL = "pylora C call lora_linear", "pylora C call nf4_linear"

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class HostTime:
    """One contender in one mode; seconds.

    beyond_c     without the C call; None for a peer, and for a path that makes no C call
    of_linear    how many times F.linear's time it takes; None if that was not measured
    of_peft      how many times the time of PEFT over bitsandbytes it takes; None likewise
    """

    seconds: float
    beyond_c: float | None
    of_linear: float | None
    of_peft: float | None

    def written(self) -> tuple[str, str, str, str]:
        """The time in us, and what COLUMNS names."""
        less_c = "" if self.beyond_c is None else f"{self.beyond_c * 1e6:.1f}"
        ratios = ("" if r is None else f"{r:.2f}" for r in (self.of_linear, self.of_peft))
        of_linear, of_peft = ratios
        return f"{self.seconds * 1e6:.1f}", less_c, of_linear, of_peft


def label(contender: str) -> str:
    """The contender whose ratios to the others are told is named for what it is."""
    return contender.replace(OURS, MODULE) if contender in (OURS, CONTROL) else contender


def groups(run: Mapping[str, Any]) -> list[dict[str, Cell]]:
    """The cells of each shape and number of rows, by mode."""
    found: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in run["cells"]:
        key = (cell["out_features"], cell["in_features"], cell["rows"], cell["dtype"])
        found.setdefault(key, {})[cell["mode"]] = cell
    return list(found.values())


def contenders(cells: Mapping[str, Cell]) -> list[str]:
    """The names that were timed in some mode, in the order of the results, without the control."""
    names = (r["contender"] for c in cells.values() for r in c["results"] if r["samples"])
    return [name for name in dict.fromkeys(names) if name != CONTROL]


def host_time(cell: Cell, contender: str) -> HostTime | None:
    """None if the contender was not timed in this cell."""
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


def _beyond_c(cell: Cell, result: Mapping[str, Any]) -> float | None:
    name = result["contender"]
    if not name.startswith(OURS) or " plan " in name or " C call " in name:
        return None
    c_call = result_of(cell, _LORA_C_CALL if result["has_lora"] else _NF4_C_CALL)
    return result["median_s"] - c_call["median_s"] if c_call else None


def _fastest(cell: Cell, names: Sequence[str]) -> float | None:
    times = [result["median_s"] for name in names if (result := result_of(cell, name))]
    return min(times, default=None)


def host_tables(run: Mapping[str, Any]) -> str:
    """A table for each shape and number of rows."""
    return "\n\n".join([f"{run['op']}: {EXPLANATION}", *map(_table, groups(run))])


def title(cells: Mapping[str, Cell]) -> str:
    cell = next(iter(cells.values()))
    return f"{shape_name(cell)}, M={cell['rows']}, r={cell['rank']}, {cell['dtype']}"


def _table(cells: Mapping[str, Cell]) -> str:
    modes = [mode for mode in HOST_MODES if mode in cells]
    rows = [("us a call", *(text for m in modes for text in (TITLES[m], *COLUMNS)), "")]
    for name in contenders(cells):
        times = (host_time(cells[mode], name) for mode in modes)
        written = (text for t in times for text in (t.written() if t else NOT_TIMED))
        rows.append((label(name), *written, ""))
    return "\n".join([title(cells), *(f"  {x}" for x in aligned(rows)), control_line(cells)])


def control_line(cells: Mapping[str, Cell]) -> str:
    """How much the same layer, timed twice, differs in each mode."""
    off = [
        f"{TITLES[mode]} {cell['control_ratio'] - 1:+.1%}"
        for mode, cell in cells.items()
        if cell["control_ratio"]
    ]
    return (
        f"control, {MODULE} against itself: {', '.join(off)}; "
        f"beyond {CONTROL_TOLERANCE:.0%} the machine was too busy for these times to count"
    )
