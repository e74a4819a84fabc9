"""The speeds that pylora aims at on a GPU, as data, and whether runs reached them.

The goals were set for an H200, as ratios within one run, for weights of 4096 x 4096 and more.
pylora has LoRA with r=16; dense bf16 has none. A forward is timed in a CUDA graph, which gives the
time of the device alone. A goal for eager calls takes the slower of host and device. A goal for a
backward does so too, since no backward is timed in a graph. A goal is met if every cell that it is
about meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.tables import (
    aligned,
    device_seconds,
    ratio_to_ours,
    seconds_as_called,
    shape_name,
)
from benchmarks.results import BASE_ONLY, OURS, result_of
from benchmarks.shapes import BACKWARD, FORWARD
from benchmarks.timing import EAGER, GRAPH

RATIO, LIMIT, SURCHARGE = "ratio", "limit", "surcharge"
PEFT, DECODED, DENSE = "bitsandbytes + PEFT train", "dequantize + linear + addmm_", "dense bf16"
LEAST_NUMEL = 4096 * 4096
MANY = 1 << 30  # as the most tokens of a goal: there is no upper bound

CellResult = Mapping[str, Any]

# The words of a goal about the shape of the weight -> the test for a cell.
SHAPES: dict[str, Callable[[CellResult], bool]] = {
    "": lambda cell: True,
    "4096x4096": lambda cell: shape_name(cell) == "4096x4096",
    "larger than 4096x4096": lambda cell: cell["out_features"] * cell["in_features"] > LEAST_NUMEL,
    "N <= 8192": lambda cell: cell["out_features"] <= 8192,
    "N > 8192": lambda cell: cell["out_features"] > 8192,
}


@dataclass(frozen=True)
class CudaGoal:
    """One goal on a GPU. What `target` means depends on `measure`:

    ratio      at least `target` times as fast as `against`
    limit      at least this share of the measured limit
    surcharge  at most this share slower than pylora without LoRA

    tokens   the least and the most tokens of a cell; 0 and 0 for an op that takes no x
    shapes   a key of SHAPES
    stretch  a second, higher target
    """

    op: str
    mode: str
    tokens: tuple[int, int]
    measure: str
    target: float
    against: str = ""
    shapes: str = ""
    timing: str = GRAPH
    stretch: float | None = None

    def __str__(self) -> str:
        op = "" if self.op == "lora_linear" else f"{self.op} "
        least, most = self.tokens
        tokens = f" M={least}" if least == most else f" M={least}-{most}"
        tokens = f" M>={least}" if most == MANY else "" if most == 0 else tokens
        where = f"{op}{self.mode}{tokens}{f', {self.shapes}' if self.shapes else ''}"
        where += ", eager" if self.timing == EAGER and self.mode == FORWARD else ""
        if self.measure == RATIO:
            return f"{where}: {self.target:g}x {self.against}"
        if self.measure == LIMIT:
            return f"{where}: {self.target:.2f} of the limit"
        return f"{where}: LoRA costs at most {self.target:.0%}"

    def met_by(self, value: float) -> bool:
        return value <= self.target if self.measure == SURCHARGE else value >= self.target

    def written(self, value: float) -> str:
        if self.measure == SURCHARGE:
            return f"{value:+.1%}"
        return f"{value:.2f}" + ("x" if self.measure == RATIO else "")

    def is_about(self, cell: CellResult) -> bool:
        return (
            cell["mode"] == self.mode
            and cell["timing"] == self.timing
            and cell["dtype"] == "bfloat16"
            and self.tokens[0] <= cell["tokens"] <= self.tokens[1]
            and cell["out_features"] * cell["in_features"] >= LEAST_NUMEL
            and SHAPES[self.shapes](cell)
        )

    def value_in(self, cell: CellResult) -> float | None:
        """Returns what `target` is compared with, or None if one of the two was not timed."""
        ours = result_of(cell, OURS)
        if ours is None:
            return None
        if self.measure == LIMIT:
            return ours["of_roofline"]
        seconds = seconds_as_called if self.timing == EAGER else device_seconds
        ratio = ratio_to_ours(cell, self.against, seconds)
        return 1 / ratio - 1 if ratio is not None and self.measure == SURCHARGE else ratio


def _forward(
    tokens: tuple[int, int],
    *ratios: tuple[float, str],
    limit: float | None = None,
    shapes: str = "",
) -> list[CudaGoal]:
    """Returns the goals for the forward of lora_linear with these tokens and shapes."""
    place = ("lora_linear", FORWARD, tokens)
    goals = [CudaGoal(*place, RATIO, target, peer, shapes) for target, peer in ratios]
    if limit is not None:
        goals.append(CudaGoal(*place, LIMIT, limit, shapes=shapes))
    return goals


def _large_forward() -> list[CudaGoal]:
    place = ("lora_linear", FORWARD, (2048, MANY))
    peers = ((PEFT, 1.2, 1.35), (DECODED, 1.05, 1.15), (DENSE, 0.90, 0.97))
    ratios = [CudaGoal(*place, RATIO, low, peer, stretch=high) for peer, low, high in peers]
    return [*ratios, CudaGoal(*place, LIMIT, 0.85)]


def _backward() -> list[CudaGoal]:
    place = ("lora_linear", BACKWARD, (2048, MANY), RATIO)
    peers = ((PEFT, 1.25), (DECODED, 1.08), (DENSE, 0.88))
    return [CudaGoal(*place, target, peer, timing=EAGER) for peer, target in peers]


def _several_layers(op: str) -> list[CudaGoal]:
    return [
        CudaGoal(op, FORWARD, (1, 16), RATIO, 2.5, PEFT),
        CudaGoal(op, FORWARD, (17, MANY), RATIO, 1.25, PEFT),
        CudaGoal(op, FORWARD, (1, MANY), RATIO, 1.08, DECODED),
    ]


_LARGER = "larger than 4096x4096"

CUDA_GOALS: tuple[CudaGoal, ...] = (
    *_forward((1, 4), (2.0, PEFT), (4.0, DECODED), (2.4, DENSE), limit=0.70, shapes=_LARGER),
    CudaGoal("lora_linear", FORWARD, (1, 4), RATIO, 3.0, PEFT, _LARGER, EAGER),
    *_forward((1, 4), (2.0, PEFT), (4.0, DECODED), (1.7, DENSE), limit=0.45, shapes="4096x4096"),
    *_forward((8, 16), (4.0, PEFT), shapes="N <= 8192"),
    *_forward((8, 16), (1.8, PEFT), shapes="N > 8192"),
    *_forward((8, 16), (3.0, DECODED), (2.0, DENSE), limit=0.60),
    *_forward((64, 64), (2.5, PEFT), (2.5, DECODED), (1.3, DENSE), limit=0.45),
    *_forward((128, 128), (2.0, PEFT), (2.0, DECODED), (1.0, DENSE)),
    *_forward((256, 256), (1.5, PEFT), (1.5, DECODED), (0.8, DENSE)),
    *_forward((512, 1024), (1.3, PEFT), (1.15, DECODED), (0.75, DENSE), limit=0.70),
    *_large_forward(),
    *_backward(),
    *_several_layers("lora_qkv"),
    *_several_layers("lora_mlp"),
    CudaGoal("nf4_dequantize", FORWARD, (0, 0), RATIO, 1.3, "bitsandbytes"),
    CudaGoal("nf4_dequantize", FORWARD, (0, 0), LIMIT, 0.80),
    CudaGoal("nf4_quantize", FORWARD, (0, 0), RATIO, 2.0, "bitsandbytes"),
    CudaGoal("nf4_quantize", FORWARD, (0, 0), LIMIT, 0.60),
    CudaGoal("lora_linear", FORWARD, (1, 16), SURCHARGE, 0.10, BASE_ONLY),
    CudaGoal("lora_linear", FORWARD, (2048, MANY), SURCHARGE, 0.03, BASE_ONLY),
)


@dataclass(frozen=True)
class CudaGoalOutcome:
    """A goal, the number of cells that it was measured in, and the worst value with its place."""

    goal: CudaGoal
    cells: int
    worst: float | None = None
    where: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.worst is None else self.goal.met_by(self.worst)

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "not measured"
        stretch = self.goal.stretch
        if self.met and stretch is not None and self.worst is not None:
            return f"met, {'and' if self.worst >= stretch else 'not'} the stretch of {stretch:g}x"
        return "met" if self.met else "MISSED"


def goal_outcomes(runs: Iterable[Mapping[str, Any]]) -> list[CudaGoalOutcome]:
    """Compares every GPU goal with the GPU runs among these; empty if there is no such run."""
    by_op = {run["op"]: run for run in runs if run["machine"]["device"] == "cuda"}
    return [_outcome(goal, by_op.get(goal.op)) for goal in CUDA_GOALS] if by_op else []


def _outcome(goal: CudaGoal, run: Mapping[str, Any] | None) -> CudaGoalOutcome:
    values = []
    for cell in run["cells"] if run is not None else ():
        value = goal.value_in(cell) if goal.is_about(cell) else None
        if value is not None:
            tokens = f" M={cell['tokens']}" if cell["tokens"] else ""
            values.append((value, f"{shape_name(cell)}{tokens}"))
    if not values:
        return CudaGoalOutcome(goal, 0)
    worst = (max if goal.measure == SURCHARGE else min)(values)
    return CudaGoalOutcome(goal, len(values), *worst)


HEAD = ("goal on a GPU", "worst", "in", "cells", "")


def row(outcome: CudaGoalOutcome) -> tuple[str, ...]:
    """Returns the texts below HEAD for one goal."""
    worst = "-" if outcome.worst is None else outcome.goal.written(outcome.worst)
    return (str(outcome.goal), worst, outcome.where, str(outcome.cells), outcome.verdict)


def title(outcomes: Sequence[CudaGoalOutcome]) -> str:
    counts = {value: sum(o.met is value for o in outcomes) for value in (True, False, None)}
    return f"{counts[True]} met, {counts[False]} missed, {counts[None]} not measured"


def goals_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of every goal with its worst cell; "" if no run was on a GPU."""
    outcomes = goal_outcomes(runs)
    if not outcomes:
        return ""
    lines = aligned([HEAD, *map(row, outcomes)])
    return "\n".join([f"goals on a GPU: {title(outcomes)}", *(f"  {line}" for line in lines)])
