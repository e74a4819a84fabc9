"""Tables on the console: every contender of a cell, all ratios of an op, changes between runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import CELL_KEY, cell_key, result_of
from benchmarks.statistics import CONTROL_TOLERANCE, Summary, change_threshold, geometric_mean
from benchmarks.timing import HOST

OURS, CONTROL, REFERENCE = "pylora", "pylora (control)", "pylora reference"
# Ours without LoRA: what LoRA costs, not a peer to win against.
BASE_ONLY = "pylora, no LoRA"


def duration(seconds: float) -> str:
    for limit, unit, scale in ((1e-3, "us", 1e6), (1, "ms", 1e3)):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def size(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def ratio_to_ours(cell: Mapping[str, Any], contender: str) -> float | None:
    """How many times faster than the contender ours is; None where either was not timed."""
    ours, other = result_of(cell, OURS), result_of(cell, contender)
    return other["median_s"] / ours["median_s"] if ours and other else None


def cell_title(cell: Mapping[str, Any]) -> str:
    words = [cell["mode"], shape_name(cell)]
    words += [f"M={cell['rows']}"] if cell["rows"] else []
    words += [f"r={cell['rank']}"] if cell["rank"] else []
    return " ".join([*words, cell["dtype"], cell["timing"]])


def shape_name(cell: Mapping[str, Any]) -> str:
    return f"{cell['out_features']}x{cell['in_features']}"


def cell_table(op: str, cell: Mapping[str, Any]) -> str:
    """Every contender of one cell, losing ones marked, absent ones with the reason."""
    is_host = cell["timing"] == HOST  # its ratios are those of `host_tables`
    compared = () if is_host else ("pylora is", "GB/s", "GFLOP/s", "of limit")
    rows = [("", "median", "p20..p80", "n", *compared, "path")]
    remarks = []
    for result in cell["results"]:
        name = result["contender"]
        if result["median_s"] is None:
            remarks.append(f"    {name}: {result['status']}: {result['note']}")
            continue
        ratio = ratio_to_ours(cell, name)
        verdict = "" if name == OURS or ratio is None else f"{ratio:.2f}x"
        if ratio is not None and ratio < 1 and name not in (OURS, CONTROL, BASE_ONLY):
            verdict += " LOSES"
        if result["status"] != "ok":
            remarks.append(f"    {name} {result['status']}: {result['note']}")
        rows.append(
            (
                name + ("" if result["status"] == "ok" else " !"),
                duration(result["median_s"]),
                f"{duration(result['p20_s'])}..{duration(result['p80_s'])}",
                str(result["samples"]),
                *((verdict, *shares_of_work(result)) if compared else ()),
                result["path"],
            )
        )
    control = cell["control_ratio"]
    if control is not None and abs(control - 1) > CONTROL_TOLERANCE:
        remarks.append(
            f"    control off: the same contender twice differs by {control - 1:+.1%}; "
            f"within {CONTROL_TOLERANCE:.0%} it must be for these ratios to count"
        )
    head = f"{op} {cell_title(cell)}"
    if not is_host:
        head += f"   limit {duration(cell['floor_s'])}"
    return "\n".join([head, *(f"    {line}" for line in aligned(rows)), *remarks])


def shares_of_work(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """GB/s, GFLOP/s and the share of the limit; dashes for host time, which has none of them."""
    if result["of_roofline"] is None:
        return "-", "-", "-"
    return (
        f"{result['bytes_per_s'] / 1e9:.1f}",
        f"{result['flop_per_s'] / 1e9:.0f}",
        f"{result['of_roofline']:.0%}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first and the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            text.ljust(width) if i in (0, last) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def contenders_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names that were timed somewhere, in the order of the results."""
    names = (r["contender"] for c in cells for r in c["results"] if r["median_s"] is not None)
    return [name for name in dict.fromkeys(names) if name not in (OURS, CONTROL)]


def marked(ratio: float | None, contender: str) -> str:
    """The ratio, with a star where ours loses."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}{'*' if ratio < 1 and contender != BASE_ONLY else ''}"


def summary_table(run: Mapping[str, Any]) -> str:
    """One line a cell: our time, and how many times faster it is than each contender."""
    names = contenders_of(run["cells"])
    rows = [("", "pylora", "of limit", "control", *names, "")]
    for cell in run["cells"]:
        ours = result_of(cell, OURS)
        ratios = [ratio_to_ours(cell, name) for name in names]
        control = cell["control_ratio"]
        rows.append(
            (
                cell_title(cell),
                duration(ours["median_s"]) if ours else "-",
                f"{ours['of_roofline']:.0%}" if ours else "-",
                f"{control - 1:+.1%}" if control else "-",
                *map(marked, ratios, names),
                "",
            )
        )
    note = "how many times faster pylora is; * marks a cell it loses, - what was not timed"
    return "\n".join([f"{run['op']}: {note}", *(f"  {line}" for line in aligned(rows))])


def _summary(result: Mapping[str, Any]) -> Summary:
    return Summary(result["samples"], result["median_s"], result["p20_s"], result["p80_s"])


def compare_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, int]:
    """(table, number of cells where ours became slower beyond the noise).

    The change of the contenders that are not ours shows how the machine itself changed.
    """
    earlier = {cell_key(cell): cell for cell in before["cells"]}
    rows = [("cell", "contender", "before", "after", "change", "noise", "verdict")]
    slower, unmatched, drift = 0, 0, []
    for cell in after["cells"]:
        old = earlier.get(cell_key(cell))
        if old is None:
            unmatched += 1
            continue
        controls = [c["control_ratio"] for c in (old, cell) if c["control_ratio"]]
        for result in cell["results"]:
            a, b = result_of(old, result["contender"]), result_of(cell, result["contender"])
            if a is None or b is None or result["contender"] == CONTROL:
                continue
            change = b["median_s"] / a["median_s"] - 1
            threshold = change_threshold(_summary(a), _summary(b), controls)
            verdict = "same" if abs(change) <= threshold else "faster" if change < 0 else "SLOWER"
            is_ours = result["contender"].startswith(OURS)
            slower += verdict == "SLOWER" and result["contender"] == OURS
            drift += [] if is_ours else [1 + change]
            rows.append(
                (
                    cell_title(cell),
                    result["contender"],
                    duration(a["median_s"]),
                    duration(b["median_s"]),
                    f"{change:+.1%}",
                    f"±{threshold:.1%}",
                    verdict,
                )
            )
    lines = aligned(rows)
    if drift:
        lines.append(f"peers changed by {geometric_mean(drift) - 1:+.1%}: the machine, not us")
    if unmatched:
        lines.append(f"{unmatched} cells are only in the second run ({', '.join(CELL_KEY)} differ)")
    return "\n".join(lines), slower
