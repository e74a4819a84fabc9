"""Tables on the console: the contenders of a cell, the ratios of an op, changes between two runs.

A ratio says how many times faster pylora is than a contender: the contender's time over ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import (
    BASE_ONLY,
    CELL_KEY,
    CONTROL,
    OURS,
    cell_key,
    result_of,
)
from benchmarks.statistics import CONTROL_TOLERANCE, Summary, change_threshold, geometric_mean
from benchmarks.timing import HOST


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
    """Returns the median time of one call. On a GPU it is the time of the device alone."""
    return result["median_s"]


def seconds_as_called(result: Mapping[str, Any]) -> float:
    """Returns the time of one of many calls in a row from Python. The host issues the next call
    while the device computes this one, so the slower of the two decides."""
    return max(result["median_s"], result["host_s"] or 0.0)


def has_host_times(cell: Mapping[str, Any]) -> bool:
    return any(result["host_s"] is not None for result in cell["results"])


def ratio_to_ours(
    cell: Mapping[str, Any],
    contender: str,
    seconds: Callable[[Mapping[str, Any]], float] = device_seconds,
) -> float | None:
    """Returns how many times faster than the contender we are, or None if either was not timed."""
    ours, other = result_of(cell, OURS), result_of(cell, contender)
    return seconds(other) / seconds(ours) if ours and other else None


def times_faster(ratio: float | None, contender: str) -> str:
    """Writes a ratio for the table of a cell, with the word LOSES if the peer is faster."""
    if ratio is None or contender == OURS:
        return ""
    loses = ratio < 1 and contender not in (CONTROL, BASE_ONLY)
    return f"{ratio:.2f}x{' LOSES' if loses else ''}"


def cell_title(cell: Mapping[str, Any]) -> str:
    words = [cell["mode"], shape_name(cell)]
    words += [f"M={cell['tokens']}"] if cell["tokens"] else []
    words += [f"r={cell['rank']}"] if cell["rank"] else []
    return " ".join([*words, cell["dtype"], cell["timing"]])


def shape_name(cell: Mapping[str, Any]) -> str:
    return f"{cell['out_features']}x{cell['in_features']}"


def cell_table(op: str, cell: Mapping[str, Any]) -> str:
    """Returns a table of all contenders of a cell. Below it are the reasons of those that were not
    timed, and remarks on the others."""
    is_host = cell["timing"] == HOST  # `host_tables` has the ratios of host times
    with_host = has_host_times(cell)
    host_columns = ("host", "as called") if with_host else ()
    compared = ("pylora is", *host_columns, "GB/s", "GFLOP/s", "of limit")
    titles = ("median", "p20..p80", "n", *(() if is_host else compared))
    rows: list[tuple[str, ...]] = [("", *titles, "variant")]
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
                result["variant"],
            )
        )
    control = cell["control_ratio"]
    if control is not None and abs(control - 1) > CONTROL_TOLERANCE:
        remarks.append(
            f"    the control is off: two copies of the same contender differ by "
            f"{control - 1:+.1%}; these ratios count only if that is within {CONTROL_TOLERANCE:.0%}"
        )
    head = f"{op} {cell_title(cell)}"
    if not is_host:
        head += f"   limit {duration(cell['floor_s'])}"
    return "\n".join([head, *(f"    {line}" for line in aligned(rows)), *remarks])


def shares_of_work(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Writes GB/s, GFLOP/s and the share of the limit. Host times have none of the three, which
    gives dashes."""
    if result["of_roofline"] is None:
        return "-", "-", "-"
    return (
        f"{result['bytes_per_s'] / 1e9:.1f}",
        f"{result['flop_per_s'] / 1e9:.0f}",
        f"{result['of_roofline']:.0%}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table. Each column is as wide as its widest text. The first and the
    last column are aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last_column = len(widths) - 1
    return [
        "  ".join(
            text.ljust(width) if i in (0, last_column) else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def contenders_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the contenders beside pylora that were timed in any of these cells."""
    names = (r["contender"] for c in cells for r in c["results"] if r["median_s"] is not None)
    return [name for name in dict.fromkeys(names) if name not in (OURS, CONTROL)]


def marked(ratio: float | None, contender: str) -> str:
    """Writes a ratio for the table of an op, with a star if we lose."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}{'*' if ratio < 1 and contender != BASE_ONLY else ''}"


def summary_table(run: Mapping[str, Any]) -> str:
    """Returns a line for each cell with our time and the ratio to each contender. If the host's
    time is known, a second table has the ratios of calls from Python."""
    note = "how many times faster pylora is; * marks a ratio that it loses, - one not measured"
    lines = [f"{run['op']}: {note}", *_ratio_lines(run["cells"], device_seconds)]
    with_host = [cell for cell in run["cells"] if has_host_times(cell)]
    if with_host:
        lines.append(f"{run['op']} as called from Python: the slower of host and device counts")
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


def _device_summary(result: Mapping[str, Any]) -> Summary:
    return Summary(result["samples"], result["median_s"], result["p20_s"], result["p80_s"])


def _host_summary(result: Mapping[str, Any]) -> Summary | None:
    """Summarizes the host's time to issue a call to a GPU; None if there is none. Results of an
    older schema do not know how the samples spread: their noise counts as zero."""
    median = result["host_s"]
    if median is None:
        return None
    p20, p80 = result["host_p20_s"], result["host_p80_s"]
    return Summary(result["samples"], median, median if p20 is None else p20, p80 or median)


def _host_control_ratio(cell: Mapping[str, Any]) -> float | None:
    """Returns the host's time of the control over that of ours; None if either is unknown."""
    summaries = [_host_summary(r) for r in (result_of(cell, CONTROL), result_of(cell, OURS)) if r]
    medians = [summary.median for summary in summaries if summary is not None]
    return medians[0] / medians[1] if len(medians) == 2 else None


def compare_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, int]:
    """Returns (the table, how many of our times became slower by more than the noise).

    A contender has a row for its time and, if it ran on a GPU, one for the host's time to issue a
    call. The peers did not change between the runs, so what they show is a change of the machine.
    """
    earlier = {cell_key(cell): cell for cell in before["cells"]}
    rows = [("cell", "contender", "before", "after", "change", "noise", "verdict")]
    slower, unmatched, peer_ratios = 0, 0, []
    for cell in after["cells"]:
        old_cell = earlier.get(cell_key(cell))
        if old_cell is None:
            unmatched += 1
            continue
        controls = [c["control_ratio"] for c in (old_cell, cell) if c["control_ratio"]]
        host_controls = [r for r in map(_host_control_ratio, (old_cell, cell)) if r]
        for result in cell["results"]:
            name = result["contender"]
            old, new = result_of(old_cell, name), result_of(cell, name)
            if old is None or new is None or name == CONTROL:
                continue
            if not name.startswith(OURS):
                peer_ratios.append(new["median_s"] / old["median_s"])
            pairs = [(name, _device_summary(old), _device_summary(new), controls)]
            old_host, new_host = _host_summary(old), _host_summary(new)
            if old_host is not None and new_host is not None:
                pairs.append((f"{name}: host", old_host, new_host, host_controls))
            for label, old_times, new_times, ratios in pairs:
                change, verdict = _change(old_times, new_times, ratios)
                slower += verdict == "SLOWER" and name == OURS
                times = (duration(old_times.median), duration(new_times.median))
                rows.append((cell_title(cell), label, *times, *change, verdict))
    lines = aligned(rows)
    if peer_ratios:
        lines.append(
            f"peers changed by {geometric_mean(peer_ratios) - 1:+.1%}: the machine, not pylora"
        )
    if unmatched:
        lines.append(f"{unmatched} cells are only in the second run ({', '.join(CELL_KEY)} differ)")
    return "\n".join(lines), slower


def _change(old: Summary, new: Summary, controls: Sequence[float]) -> tuple[tuple[str, str], str]:
    """Returns ((the change, the noise) in words, the verdict: same, faster or SLOWER)."""
    change = new.median / old.median - 1
    threshold = change_threshold(old, new, controls)
    verdict = "same" if abs(change) <= threshold else "faster" if change < 0 else "SLOWER"
    return (f"{change:+.1%}", f"±{threshold:.1%}"), verdict
