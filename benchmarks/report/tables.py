"""Tables on the console: every contender of a cell, all ratios of an op, changes between runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def device_seconds(result: Mapping[str, Any]) -> float:
    """The median time of one call; on a GPU, that of the device alone."""
    return result["median_s"]


def seconds_as_called(result: Mapping[str, Any]) -> float:
    """What each of many calls from Python takes: the host issues the next call while the device
    computes this one, so the slower of the two decides."""
    return max(result["median_s"], result["host_s"] or 0.0)


def has_host_times(cell: Mapping[str, Any]) -> bool:
    return any(result["host_s"] is not None for result in cell["results"])


def ratio_to_ours(
    cell: Mapping[str, Any],
    contender: str,
    seconds: Callable[[Mapping[str, Any]], float] = device_seconds,
) -> float | None:
    """How many times faster than the contender ours is; None if either was not timed."""
    ours, other = result_of(cell, OURS), result_of(cell, contender)
    return seconds(other) / seconds(ours) if ours and other else None


def times_faster(ratio: float | None, contender: str) -> str:
    """The ratio in a table of one cell; a peer that is faster than ours is marked."""
    if ratio is None or contender == OURS:
        return ""
    loses = ratio < 1 and contender not in (CONTROL, BASE_ONLY)
    return f"{ratio:.2f}x{' LOSES' if loses else ''}"


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
    with_host = has_host_times(cell)
    host_columns = ("host", "as called") if with_host else ()
    compared = ("pylora is", *host_columns, "GB/s", "GFLOP/s", "of limit")
    titles = ("median", "p20..p80", "n", *(() if is_host else compared))
    rows: list[tuple[str, ...]] = [("", *titles, "path")]
    remarks = []
    for result in cell["results"]:
        name = result["contender"]
        if result["median_s"] is None:
            remarks.append(f"    {name}: {result['status']}: {result['note']}")
            continue
        if result["status"] != "ok":
            remarks.append(f"    {name} {result['status']}: {result['note']}")
        if result["timing_note"]:
            remarks.append(f"    {name}: {result['timing_note']}")
        host: tuple[str, ...] = ()
        if with_host:
            as_called = times_faster(ratio_to_ours(cell, name, seconds_as_called), name)
            host = ("-" if result["host_s"] is None else duration(result["host_s"]), as_called)
        faster = times_faster(ratio_to_ours(cell, name), name)
        comparison = () if is_host else (faster, *host, *shares_of_work(result))
        rows.append(
            (
                name + ("" if result["status"] == "ok" else " !"),
                duration(result["median_s"]),
                f"{duration(result['p20_s'])}..{duration(result['p80_s'])}",
                str(result["samples"]),
                *comparison,
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
    """One line a cell: our time, and how many times faster it is than each contender. If the host's
    time is known, a second table has the ratios of calls from Python."""
    note = "how many times faster pylora is; * marks a cell it loses, - what was not timed"
    lines = [f"{run['op']}: {note}", *_ratio_lines(run["cells"], device_seconds)]
    with_host = [cell for cell in run["cells"] if has_host_times(cell)]
    if with_host:
        lines.append(f"{run['op']} as called from Python: the slower of host and device")
        lines += _ratio_lines(with_host, seconds_as_called)
    return "\n".join(lines)


def _ratio_lines(
    cells: Sequence[Mapping[str, Any]], seconds: Callable[[Mapping[str, Any]], float]
) -> list[str]:
    names, with_host = contenders_of(cells), any(map(has_host_times, cells))
    head = ("", "pylora", *(["host"] if with_host else []), "of limit", "control")
    rows = [(*head, *names, "")]
    for cell in cells:
        ours, control = result_of(cell, OURS), cell["control_ratio"]
        host = duration(ours["host_s"]) if ours and ours["host_s"] is not None else "-"
        rows.append(
            (
                cell_title(cell),
                duration(ours["median_s"]) if ours else "-",
                *([host] if with_host else []),
                f"{ours['of_roofline']:.0%}" if ours else "-",
                f"{control - 1:+.1%}" if control else "-",
                *(marked(ratio_to_ours(cell, name, seconds), name) for name in names),
                "",
            )
        )
    return [f"  {line}" for line in aligned(rows)]


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
