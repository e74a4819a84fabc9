"""lora_mlp: down(silu(gate(x)) * up(x)), where each of the three layers is NF4 with LoRA.

The shape of a cell is that of the gate and up layers, intermediate x in_features. The down layer
has the transposed shape.
"""

from __future__ import annotations

from dataclasses import replace

from torch.nn.functional import silu

from benchmarks.composed import Composition
from benchmarks.shapes import Cell


def _layers(cell: Cell) -> tuple[Cell, ...]:
    # The op of each is lora_linear, because `Cell.result_features` is another number for lora_mlp.
    up = replace(cell, op="lora_linear")
    down = replace(up, out_features=cell.in_features, in_features=cell.out_features)
    return (up, up, down)


BENCH = Composition(
    op="lora_mlp",
    layers=_layers,
    combine=lambda forwards, x: forwards[2](silu(forwards[0](x)) * forwards[1](x)),
).bench(shapes=((14336, 4096), (1536, 576)))
