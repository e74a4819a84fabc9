"""The table of results: a line for each experiment, by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.primitives.runner import OK
from benchmarks.statistics import summarize

_UNKNOWN = "-"


def results_table(records: Sequence[dict[str, Any]]) -> str:
    """Returns the table. It has the median, the spread (p80 - p20, over the median), the ideal and
    what follows from the samples."""
    lines: list[str] = []
    width = max((len(record["name"]) for record in records), default=0)
    group = None
    for record in records:
        if record["group"] != group:
            group = record["group"]
            title = f"{group}"
            head = f"{'median':>10} {'spread':>7} {'ideal':>8}  unit"
            lines += ["", f"{title:{width}} {head}"]
        lines.append(f"{record['name']:{width}} {_numbers(record)}")
    counts = {status: 0 for status in ("ok", "error", "skipped")}
    for record in records:
        counts[record["status"]] += 1
    lines += ["", ", ".join(f"{count} {status}" for status, count in counts.items())]
    return "\n".join(lines).lstrip("\n")


def _numbers(record: dict[str, Any]) -> str:
    if record["median"] is None:
        return f"{record['status']}: {record['reason']}"
    summary = summarize(record["samples"])
    middle = summary.median
    spread = (summary.p80 - summary.p20) / middle if middle else 0.0
    derived = "  ".join(f"{name} {_short(value)}" for name, value in record["derived"].items())
    text = (
        f"{_short(middle):>10} {100 * spread:6.1f}% {_short(record['ideal']):>8}  {record['unit']}"
    )
    text += f"  ({derived})" if derived else ""
    return text if record["status"] == OK else f"{text}  {record['status']}: {record['reason']}"


def _short(value: Any) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.4g}" if isinstance(value, float) else str(value)
