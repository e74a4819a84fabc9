"""lora_mlp: down(silu(gate(x)) * up(x)), each NF4 with LoRA.

A shape is that of gate and of up, intermediate x in_features; down has it transposed.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn.functional import silu

from benchmarks.composed import Composition
from benchmarks.shapes import Cell


def _layers(cell: Cell) -> tuple[Cell, ...]:
    # Each is a plain linear layer: result_features means something else for the op itself.
    up = replace(cell, op="lora_linear")
    down = replace(up, out_features=cell.in_features, in_features=cell.out_features)
    return (up, up, down)


BENCH = Composition(
    op="lora_mlp",
    layers=_layers,
    combine=lambda forwards, x: forwards[2](silu(forwards[0](x)) * forwards[1](x)),
).bench(shapes=((14336, 4096), (1536, 576)))
