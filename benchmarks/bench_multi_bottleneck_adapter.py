"""multi_bottleneck_adapter: eight bottleneck adapters; each of eight runs of tokens has its own.

The shape of a cell is that of a down projection, [bottleneck, hidden]. Eager torch splits the
batch, runs every adapter on its part and joins the results, as BatchSplit of the `adapters` library
does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pylora.functional as F
from benchmarks.bench_bottleneck_adapter import (
    SHAPES,
    adapter_work,
    contenders,
    draw_adapter,
    in_torch,
    trainable,
)
from benchmarks.contender import Bench, BuiltLayer, Contender, Work, item_size
from benchmarks.contenders_torch import explained
from benchmarks.layer_tensors import LayerTensors
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell

ADAPTERS = 8


def _adapters(tensors: LayerTensors, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    def draw() -> list[tuple[Tensor, ...]]:
        return [draw_adapter(tensors) for _ in range(ADAPTERS)]

    return [trainable(drawn, dtype) for drawn in tensors.remembered("adapters", draw)]


def _ids(tensors: LayerTensors, tokens: int) -> Tensor:
    def draw() -> Tensor:
        return (torch.arange(tokens) * ADAPTERS // max(tokens, 1)).to(tensors.device)

    return tensors.remembered(f"multi_bottleneck_adapter ids {tokens}", draw)


def _pylora(tensors: LayerTensors, dtype: torch.dtype) -> BuiltLayer:
    adapters = _adapters(tensors, dtype)
    records = [F.AdapterTensors(*adapter) for adapter in adapters]

    def arguments(x: Tensor) -> tuple[Any, ...]:
        return x, records, _ids(tensors, x.shape[0])

    return BuiltLayer(
        lambda x: F.multi_bottleneck_adapter(*arguments(x)),
        lambda x: explained("multi_bottleneck_adapter", *arguments(x)),
        tuple(tensor for adapter in adapters for tensor in adapter),
    )


def split_in_torch(x: Tensor, adapters: list[tuple[Tensor, ...]]) -> Tensor:
    """Runs each adapter on its part of the tokens with torch's own functions."""
    ends = [-(-x.shape[0] * (place + 1) // ADAPTERS) for place in range(ADAPTERS)]
    parts = x.split([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
    return torch.cat(
        [in_torch(part, *adapter) for part, adapter in zip(parts, adapters, strict=True)]
    )


def _eager(tensors: LayerTensors, dtype: torch.dtype) -> BuiltLayer:
    adapters = _adapters(tensors, dtype)
    return BuiltLayer(
        lambda x: split_in_torch(x, adapters),
        lambda x: f"split, {ADAPTERS} x (linear, relu, linear, add), cat",
        tuple(tensor for adapter in adapters for tensor in adapter),
    )


def _oracle(
    tensors: LayerTensors, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    weights = [[t.detach() for t in adapter] for adapter in _adapters(tensors, x.dtype)]

    def compute(x: Tensor, grad: Tensor | None, weights: Any) -> tuple[Tensor, ...]:
        needed = grad is not None
        leaf = x.detach().requires_grad_(needed)
        adapters = [tuple(t.detach().requires_grad_(needed) for t in a) for a in weights]
        with torch.set_grad_enabled(needed):
            y = split_in_torch(leaf, adapters)
            leaves = [leaf, *(tensor for adapter in adapters for tensor in adapter)]
            grads = torch.autograd.grad(y, leaves, grad) if needed else ()
        return (y.detach(), *grads)

    return compute, (x, grad, weights)


def _work(cell: Cell, contender: Contender) -> Work:
    """Returns the work of one adapter, and the reads and writes of the other adapters' weights."""
    single = adapter_work(cell, contender)
    others = (ADAPTERS - 1) * item_size(cell, contender) * 2 * cell.numel
    reads = {FORWARD: 1, BACKWARD: 1, TRAINING: 2}[cell.mode]
    writes = 0 if cell.mode == FORWARD else 1
    return Work(
        single.flop, single.bytes_read + reads * others, single.bytes_written + writes * others
    )


BENCH = Bench(
    op="multi_bottleneck_adapter",
    contenders=contenders(_pylora, _eager),
    work=_work,
    oracle=_oracle,
    shapes=SHAPES,
    tokens=(512,),
    modes=(FORWARD, TRAINING),
    in_quick=False,
)
