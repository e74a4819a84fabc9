"""The speeds that pylora aims at on a CPU, as data, and whether runs reached them.

The goals for a GPU are in cuda_goals.py. In every goal pylora has LoRA with r=16 and the others
have none. The "best mode" of bitsandbytes is the faster of its train and eval modes in the same
cell. A goal is met if it is met for every shape. A goal for host time is a number of microseconds
on the CPU that the run names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from benchmarks import heap
from benchmarks.report import cuda_goals, host_tables
from benchmarks.report.cuda_goals import LIMIT, RATIO, SURCHARGE
from benchmarks.report.tables import aligned
from benchmarks.results import BASE_ONLY, OURS, result_of
from benchmarks.shapes import FORWARD, GRAD_FORWARD, HOST_SHAPES, QUICK_SHAPES, TRAINING

MEMORY, TIME = "memory", "time"
NO_AMX = "this CPU has no AMX"
BNB_TRAIN, BNB_EVAL = "bitsandbytes train", "bitsandbytes eval"
BEST = (BNB_TRAIN, BNB_EVAL)
DENSE = ("dense bf16",)
# A goal for memory allows each thread so much for a decoded panel of the weight.
_PANEL_BYTES = 2 << 20


@dataclass(frozen=True)
class Goal:
    """One goal on a CPU. What `target` means depends on `measure`:

    ratio      at least `target` times as fast as the fastest of `against`
    limit      at least this share of the roofline
    surcharge  at most this share slower than pylora without LoRA
    memory     at most `target` times the memory that is allowed
    time       at most `target` seconds for `contender`
    """

    op: str
    mode: str
    tokens: int
    measure: str
    target: float
    against: tuple[str, ...] = ()
    needs: str = ""
    contender: str = OURS
    shapes: tuple[tuple[int, int], ...] = QUICK_SHAPES

    def __str__(self) -> str:
        where = f"M={self.tokens} {self.mode}" if self.tokens else self.op.removeprefix("nf4_")
        if self.measure == RATIO:
            best = "bitsandbytes, best mode" if self.against == BEST else self.against[0]
            return f"{where}: {self.target:g}x {best}"
        if self.measure == LIMIT:
            what = self.needs or "DRAM read"
            return f"{where}: {self.target:.2f} of {what}"
        if self.measure == SURCHARGE:
            return f"{where}: LoRA costs at most {self.target:.0%}"
        if self.measure == TIME:
            what, mode = host_tables.label(self.contender), host_tables.TITLES[self.mode]
            return f"host time of {what}, {mode}: at most {self.written(self.target)}"
        return f"{where}: memory beyond y at most x, dx and 2 MiB a thread"

    def met_by(self, value: float) -> bool:
        is_at_most = self.measure in (SURCHARGE, MEMORY, TIME)
        return value <= self.target if is_at_most else value >= self.target

    def written(self, value: float) -> str:
        if self.measure == SURCHARGE:
            return f"{value:+.1%}"
        if self.measure == TIME:
            return f"{value * 1e6:.1f} us"
        return f"{value:.2f}" + ("x" if self.measure == RATIO else "")


def _forward(tokens: int, *goals: tuple[float, tuple[str, ...]]) -> list[Goal]:
    return [Goal("lora_linear", FORWARD, tokens, RATIO, target, peer) for target, peer in goals]


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
    *(Goal("lora_linear", FORWARD, M, SURCHARGE, 0.10, (BASE_ONLY,)) for M in (1, 16, 512)),
    Goal("nf4_dequantize", FORWARD, 0, RATIO, 3.0, ("bitsandbytes",)),
    Goal("nf4_quantize", FORWARD, 0, RATIO, 20.0, ("bitsandbytes",)),
    _host(16e-6, FORWARD),
    _host(12e-6, FORWARD, "pylora nn.NF4Linear"),
    _host(40e-6, GRAD_FORWARD),
)


@dataclass(frozen=True)
class GoalOutcome:
    """A goal and what was measured.

    values  for each shape; None if it was not measured
    met     None if nothing was measured, or if the goal does not apply to the machine
    note    the reason if `met` is None
    """

    goal: Goal
    values: dict[tuple[int, int], float | None]
    met: bool | None
    note: str = ""


def goal_outcomes(runs: Iterable[Mapping[str, Any]]) -> list[GoalOutcome]:
    """Compares every CPU goal with the CPU runs among these; empty if there is no such run. The
    goals are about the default heap, and so a run with a kept one does not count."""
    by_op = {
        run["op"]: run
        for run in runs
        if run["machine"]["device"] == "cpu" and run["machine"]["heap"] == heap.DEFAULT
    }
    outcomes = []
    for goal in CPU_GOALS if by_op else ():
        run = by_op.get(goal.op)
        if run is not None and goal.needs == "AMX peak":
            if "amx_bf16" not in run["machine"]["flags"]:
                nothing = dict.fromkeys(goal.shapes)
                outcomes.append(GoalOutcome(goal, nothing, None, NO_AMX))
                continue
        values = {shape: _value(goal, run, shape) for shape in goal.shapes}
        measured = [value for value in values.values() if value is not None]
        met = all(map(goal.met_by, measured)) if measured else None
        outcomes.append(GoalOutcome(goal, values, met, "" if measured else "not measured"))
    return outcomes


def _value(goal: Goal, run: Mapping[str, Any] | None, shape: tuple[int, int]) -> float | None:
    place = (goal.mode, *shape, goal.tokens)
    for cell in run["cells"] if run is not None else ():
        key = (cell["mode"], cell["out_features"], cell["in_features"], cell["tokens"])
        ours = result_of(cell, goal.contender)
        if key == place and cell["dtype"] == "bfloat16" and ours is not None:
            return _measured(goal, run, cell, ours)
    return None


def _measured(
    goal: Goal, run: Mapping[str, Any], cell: Mapping[str, Any], ours: Mapping[str, Any]
) -> float | None:
    if goal.measure == LIMIT:
        return ours["of_roofline"]
    if goal.measure == TIME:
        return ours["median_s"]
    if goal.measure == MEMORY:
        return _memory_share(run, cell, ours)
    peers = [result_of(cell, name) for name in goal.against]
    times = [peer["median_s"] for peer in peers if peer is not None]
    if not times:
        return None
    ratio = min(times) / ours["median_s"]
    return 1 / ratio - 1 if goal.measure == SURCHARGE else ratio


def _memory_share(
    run: Mapping[str, Any], cell: Mapping[str, Any], ours: Mapping[str, Any]
) -> float | None:
    """Returns the peak extra memory without y, as a share of x, dx and 2 MiB a thread."""
    if ours["extra_memory_bytes"] is None:
        return None
    size = getattr(torch, cell["dtype"]).itemsize * cell["tokens"]
    allowed = 2 * size * cell["in_features"] + _PANEL_BYTES * run["machine"]["threads"]
    return (ours["extra_memory_bytes"] - size * cell["out_features"]) / allowed


def verdict(outcome: GoalOutcome) -> str:
    return {True: "met", False: "MISSED", None: outcome.note}[outcome.met]


def by_shapes(
    outcomes: Iterable[GoalOutcome],
) -> list[tuple[tuple[tuple[int, int], ...], list[GoalOutcome]]]:
    """Groups consecutive goals that have the same shapes, since a table has a column a shape."""
    groups = groupby(outcomes, lambda outcome: outcome.goal.shapes)
    return [(shapes, list(group)) for shapes, group in groups]


def goals_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the CPU goals that these runs measured and, if there is a GPU run among
    them, a table of all GPU goals."""
    tables = [cuda_goals.goals_table(runs)]
    if any(run["machine"]["device"] == "cpu" for run in runs):
        tables.insert(0, _cpu_table(runs))
    return "\n\n".join(table for table in tables if table)


def _cpu_table(runs: Sequence[Mapping[str, Any]]) -> str:
    outcomes = [o for o in goal_outcomes(runs) if o.met is not None or o.note == NO_AMX]
    if not outcomes:
        return "no CPU goal was measured"
    met = sum(outcome.met is True for outcome in outcomes)
    missed = sum(outcome.met is False for outcome in outcomes)
    lines = [f"goals: {met} met, {missed} missed"]
    for shapes, group in by_shapes(outcomes):
        rows = [("goal", *(f"{n}x{k}" for n, k in shapes), "")]
        for outcome in group:
            values = outcome.values.values()
            cells = ("-" if v is None else outcome.goal.written(v) for v in values)
            rows.append((str(outcome.goal), *cells, verdict(outcome)))
        lines += [f"  {line}" for line in aligned(rows)]
    return "\n".join(lines)
