"""The speeds this project aims at on a CPU, as data, and what runs measured against them.
Those on a GPU are in cuda_goals.py.

Every goal counts LoRA r=16 on our side and none on the other. "Best mode" of bitsandbytes is the
faster of its train and eval modes in the same cell. A goal is met where it is met for every shape.
A goal of host time is one number of microseconds, on the CPU that the run names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from benchmarks.report import cuda_goals, host_tables
from benchmarks.report.tables import BASE_ONLY, OURS, aligned
from benchmarks.results import result_of
from benchmarks.shapes import FORWARD, GRAD_FORWARD, HOST_SHAPES, QUICK_SHAPES, TRAINING

RATIO, LIMIT, SURCHARGE, MEMORY, TIME = "ratio", "limit", "surcharge", "memory", "time"
BNB_TRAIN, BNB_EVAL = "bitsandbytes train", "bitsandbytes eval"
BEST = (BNB_TRAIN, BNB_EVAL)
DENSE = ("dense bf16",)
_PANEL_BYTES = 2 << 20


@dataclass(frozen=True)
class Goal:
    """ratio: at least `target` times as fast as the fastest of `against`; limit: at least that
    share of the roofline; surcharge: at most that much slower than ours without LoRA; memory: at
    most `target` times what is allowed; time: at most `target` seconds for `contender`."""

    op: str
    mode: str
    rows: int
    kind: str
    target: float
    against: tuple[str, ...] = ()
    needs: str = ""
    contender: str = OURS
    shapes: tuple[tuple[int, int], ...] = QUICK_SHAPES

    def __str__(self) -> str:
        where = f"M={self.rows} {self.mode}" if self.rows else self.op.removeprefix("nf4_")
        if self.kind == RATIO:
            best = "bitsandbytes, best mode" if self.against == BEST else self.against[0]
            return f"{where}: {self.target:g}x {best}"
        if self.kind == LIMIT:
            what = self.needs or "DRAM read"
            return f"{where}: {self.target:.2f} of {what}"
        if self.kind == SURCHARGE:
            return f"{where}: LoRA costs at most {self.target:.0%}"
        if self.kind == TIME:
            what, mode = host_tables.label(self.contender), host_tables.TITLES[self.mode]
            return f"host time of {what}, {mode}: at most {self.written(self.target)}"
        return f"{where}: memory beyond y at most x, dx and 2 MiB a thread"

    def met_by(self, value: float) -> bool:
        is_at_most = self.kind in (SURCHARGE, MEMORY, TIME)
        return value <= self.target if is_at_most else value >= self.target

    def written(self, value: float) -> str:
        if self.kind == SURCHARGE:
            return f"{value:+.1%}"
        if self.kind == TIME:
            return f"{value * 1e6:.1f} us"
        return f"{value:.2f}" + ("x" if self.kind == RATIO else "")


def _forward(rows: int, *goals: tuple[float, tuple[str, ...]]) -> list[Goal]:
    return [Goal("lora_linear", FORWARD, rows, RATIO, target, peer) for target, peer in goals]


def _host(target: float, mode: str, contender: str = OURS) -> Goal:
    return Goal("host", mode, 1, TIME, target, contender=contender, shapes=HOST_SHAPES)


CPU_GOALS: tuple[Goal, ...] = (
    *_forward(1, (1.5, BEST), (3.4, DENSE)),
    Goal("lora_linear", FORWARD, 1, LIMIT, 0.80),
    *_forward(4, (1.3, BEST), (1.8, DENSE)),
    *_forward(16, (4.0, BEST), (1.7, DENSE)),
    *_forward(64, (9.0, BEST), (1.6, DENSE)),
    *_forward(512, (10.0, (BNB_EVAL,)), (1.7, (BNB_TRAIN,)), (1.0, DENSE)),
    Goal("lora_linear", FORWARD, 512, LIMIT, 0.30, needs="AMX peak"),
    Goal("lora_linear", TRAINING, 512, RATIO, 1.8, (BNB_TRAIN,)),
    Goal("lora_linear", TRAINING, 512, RATIO, 1.0, DENSE),
    Goal("lora_linear", TRAINING, 512, MEMORY, 1.0),
    *(Goal("lora_linear", FORWARD, rows, SURCHARGE, 0.10, (BASE_ONLY,)) for rows in (1, 16, 512)),
    Goal("nf4_dequantize", FORWARD, 0, RATIO, 3.0, ("bitsandbytes",)),
    Goal("nf4_quantize", FORWARD, 0, RATIO, 20.0, ("bitsandbytes",)),
    _host(16e-6, FORWARD),
    _host(12e-6, FORWARD, "pylora nn.NF4Linear"),
    _host(40e-6, GRAD_FORWARD),
)


@dataclass(frozen=True)
class Outcome:
    """A goal with its value for each shape, None where it was not measured; `met` is None where
    nothing was, or where the goal does not apply to the machine, which `note` then says."""

    goal: Goal
    values: dict[tuple[int, int], float | None]
    met: bool | None
    note: str = ""


def outcomes(runs: Iterable[Mapping[str, Any]]) -> list[Outcome]:
    """Every CPU goal against the CPU runs among these."""
    by_op = {run["op"]: run for run in runs if run["machine"]["device"] == "cpu"}
    found = []
    for goal in CPU_GOALS if by_op else ():
        run = by_op.get(goal.op)
        if run is not None and goal.needs == "AMX peak":
            if "amx_bf16" not in run["machine"]["flags"]:
                nothing = dict.fromkeys(goal.shapes)
                found.append(Outcome(goal, nothing, None, "this CPU has no AMX"))
                continue
        values = {shape: _value(goal, run, shape) for shape in goal.shapes}
        measured = [value for value in values.values() if value is not None]
        met = all(map(goal.met_by, measured)) if measured else None
        found.append(Outcome(goal, values, met, "" if measured else "not measured"))
    return found


def _value(goal: Goal, run: Mapping[str, Any] | None, shape: tuple[int, int]) -> float | None:
    wanted = (goal.mode, *shape, goal.rows)
    for cell in run["cells"] if run is not None else ():
        key = (cell["mode"], cell["out_features"], cell["in_features"], cell["rows"])
        ours = result_of(cell, goal.contender)
        if key == wanted and cell["dtype"] == "bfloat16" and ours is not None:
            return _measured(goal, run, cell, ours)
    return None


def _measured(
    goal: Goal, run: Mapping[str, Any], cell: Mapping[str, Any], ours: Mapping[str, Any]
) -> float | None:
    if goal.kind == LIMIT:
        return ours["of_roofline"]
    if goal.kind == TIME:
        return ours["median_s"]
    if goal.kind == MEMORY:
        return _memory_share(run, cell, ours)
    peers = [result_of(cell, name) for name in goal.against]
    times = [peer["median_s"] for peer in peers if peer is not None]
    if not times:
        return None
    ratio = min(times) / ours["median_s"]
    return 1 / ratio - 1 if goal.kind == SURCHARGE else ratio


def _memory_share(
    run: Mapping[str, Any], cell: Mapping[str, Any], ours: Mapping[str, Any]
) -> float | None:
    """Peak extra memory without y, over x, dx and 2 MiB a thread."""
    if ours["extra_memory_bytes"] is None:
        return None
    size = getattr(torch, cell["dtype"]).itemsize * cell["rows"]
    allowed = 2 * size * cell["in_features"] + _PANEL_BYTES * run["machine"]["threads"]
    return (ours["extra_memory_bytes"] - size * cell["out_features"]) / allowed


def verdict(outcome: Outcome) -> str:
    return {True: "met", False: "MISSED", None: outcome.note}[outcome.met]


def by_shapes(
    found: Iterable[Outcome],
) -> list[tuple[tuple[tuple[int, int], ...], list[Outcome]]]:
    """Consecutive goals of the same shapes together: a table has a column for each shape."""
    return [(shapes, list(group)) for shapes, group in groupby(found, lambda o: o.goal.shapes)]


def goals_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Goals on a CPU that the CPU runs among these say something about, and all goals on a GPU if
    there is a GPU run."""
    tables = [cuda_goals.goals_table(runs)]
    if any(run["machine"]["device"] == "cpu" for run in runs):
        tables.insert(0, _cpu_table(runs))
    return "\n\n".join(table for table in tables if table)


def _cpu_table(runs: Sequence[Mapping[str, Any]]) -> str:
    found = [o for o in outcomes(runs) if o.met is not None or o.note.startswith("this")]
    if not found:
        return "no CPU goal was measured"
    met = sum(o.met is True for o in found)
    missed = sum(o.met is False for o in found)
    lines = [f"goals: {met} met, {missed} missed"]
    for shapes, group in by_shapes(found):
        rows = [("goal", *(f"{n}x{k}" for n, k in shapes), "")]
        for outcome in group:
            values = outcome.values.values()
            cells = ("-" if v is None else outcome.goal.written(v) for v in values)
            rows.append((str(outcome.goal), *cells, verdict(outcome)))
        lines += [f"  {line}" for line in aligned(rows)]
    return "\n".join(lines)
