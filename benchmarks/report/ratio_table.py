"""A table of the README with the ratios of one run: the times of peers over those of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report.tables import shape_name
from benchmarks.results import result_of
from benchmarks.shapes import TRAINING
from benchmarks.statistics import CONTROL_TOLERANCE, FEW_SAMPLES

# What a row compares: its name, ours and the peer.
Pair = tuple[str, str, str]
Run = Mapping[str, Any]
# A row: its title, and the ratios by the number of tokens.
Row = tuple[str, Mapping[int, float | None]]
FEW_TOKENS, GOAL_FEW, GOAL_MANY = 64, 1.05, 0.99


def grid(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table of Markdown; the first line is its head."""
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))


def ratio(cell: Run, ours: str, peer: str) -> float | None:
    """Returns the peer's time over ours, or None if either has too few samples."""
    results = result_of(cell, ours), result_of(cell, peer)
    if any(result is None or result["samples"] < FEW_SAMPLES for result in results):
        return None
    first, second = results
    assert first is not None and second is not None
    return float(second["median_s"] / first["median_s"])


def ratio_text(value: float | None) -> str:
    """Writes a ratio, in bold type if we lose."""
    if value is None:
        return "-"
    return f"**{value:.2f}**" if value < 1 else f"{value:.2f}"


def reaches_goal(value: float, tokens: int) -> bool:
    return value >= (GOAL_FEW if tokens <= FEW_TOKENS else GOAL_MANY)


def ratio_table(run: Run, pairs: Iterable[Pair], has_goal: bool = False) -> str:
    """Returns the rows of one run, and sentences that count the ratios and the noisy cells.

    has_goal    the sentences also count the ratios that reach the goal
    """
    rows = list(_rows(run, tuple(pairs)))
    tokens = sorted({count for _, ratios in rows for count in ratios})
    lines = [["", *map(str, tokens)]]
    lines += [[title, *(ratio_text(ratios.get(m)) for m in tokens)] for title, ratios in rows]
    return f"{grid(lines)}\n{_counts(rows, has_goal)} {_noise(run)}\n"


def _rows(run: Run, pairs: Sequence[Pair]) -> Iterator[Row]:
    cells_of: dict[tuple[str, str], list[Run]] = {}
    for cell in run["cells"]:
        cells_of.setdefault((shape_name(cell), cell["mode"]), []).append(cell)
    for (shape, mode), cells in cells_of.items():
        for name, ours, peer in pairs:
            ratios = {cell["tokens"]: ratio(cell, ours, peer) for cell in cells}
            if any(value is not None for value in ratios.values()):
                yield f"{shape} {'f+b' if mode == TRAINING else mode}, {name}", ratios


def _counts(rows: Sequence[Row], has_goal: bool) -> str:
    measured = [(v, m) for _, ratios in rows for m, v in ratios.items() if v is not None]
    won = f"Of {len(measured)} ratios, {sum(value >= 1 for value, _ in measured)} are at least 1"
    if not has_goal:
        return f"{won}."
    met = sum(reaches_goal(*pair) for pair in measured)
    return (
        f"{won}, and {met} reach the goal of {GOAL_FEW} up to {FEW_TOKENS} tokens and\n"
        f"{GOAL_MANY} above."
    )


def _noise(run: Run) -> str:
    controls = [cell["control_ratio"] for cell in run["cells"] if cell["control_ratio"]]
    noisy = sum(abs(control - 1) > CONTROL_TOLERANCE for control in controls)
    return (
        f"Two copies of pylora differed by more than {CONTROL_TOLERANCE:.0%}\nin {noisy} of"
        f" {len(controls)} measurements, which shows how noisy the machine is."
    )
