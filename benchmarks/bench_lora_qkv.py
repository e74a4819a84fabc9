"""lora_qkv: the query, key and value projections of an attention layer, each NF4 with LoRA.

The shape of a cell is that of the three weights stacked: its out_features are those of q, k and v
together. As in the models here, q has as many out_features as in_features, and k and v share the
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from benchmarks.composed import Composition
from benchmarks.shapes import Cell


def _layers(cell: Cell) -> tuple[Cell, ...]:
    n, k = cell.out_features, cell.in_features
    key_features = (n - k) // 2 if n > k else n // 4
    sizes = (n - 2 * key_features, key_features, key_features)
    return tuple(replace(cell, out_features=size) for size in sizes)


def _split(grad: Tensor, layers: Sequence[Cell]) -> tuple[Tensor, ...]:
    # The attention gives three separate gradients, not views into one.
    sizes = [layer.out_features for layer in layers]
    return tuple(part.contiguous() for part in grad.split(sizes, dim=-1))


BENCH = Composition(
    op="lora_qkv",
    layers=_layers,
    combine=lambda forwards, x: tuple(forward(x) for forward in forwards),
    outputs=3,
    split=_split,
).bench(shapes=((6144, 4096), (960, 576)))
