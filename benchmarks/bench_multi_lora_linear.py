"""multi_lora_linear: one NF4 weight, eight LoRA adapters, each row of x with one of them or none.

bitsandbytes + PEFT serves such a batch in inference alone (`adapter_names`). Contenders without
LoRA do less work than ours and are compared with all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import pylora.functional as F
from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import Bench, Contender, Layer, Work, item_size, linear_work
from benchmarks.contenders_torch import explained, on_reference
from benchmarks.operands import Operands
from benchmarks.shapes import BACKWARD, FORWARD, TRAINING, Cell

ADAPTERS = 8


def adapter_ids(operands: Operands, rows: int) -> Tensor:
    """An adapter for each row, about one in nine the base alone."""

    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(-1, ADAPTERS, (rows,), generator=generator)
        return ids.to(operands.device)

    return operands.remembered(f"ids {rows}", draw)


def _pylora(operands: Operands) -> Layer:
    w, (A, B) = operands.nf4(), operands.lora_stacks(ADAPTERS)
    scalings = torch.full((ADAPTERS,), operands.scaling, device=operands.device)

    def arguments(x: Tensor) -> tuple[Any, ...]:
        return x, w, A, B, adapter_ids(operands, x.shape[0]), scalings

    return Layer(
        lambda x: F.multi_lora_linear(*arguments(x)),
        lambda x: explained("multi_lora_linear", *arguments(x)),
        (A, B),
    )


def _one_by_one(operands: Operands) -> Layer:
    """nf4_linear on everything, then each adapter's rows as PEFT adds them."""
    w, (A, B) = operands.nf4(), operands.lora_stacks(ADAPTERS)

    def forward(x: Tensor) -> Tensor:
        return added_up(F.nf4_linear(x, w), x, A, B, operands)

    return Layer(forward, lambda x: "nf4_linear, and three matmuls an adapter", (A, B))


def added_up(y: Tensor, x: Tensor, A: Tensor, B: Tensor, operands: Operands) -> Tensor:
    ids = adapter_ids(operands, x.shape[0])
    for index in range(ADAPTERS):
        rows = (ids == index).nonzero()[:, 0]
        delta = linear(linear(x[rows], A[index]), B[index]) * operands.scaling
        y = y.index_add(0, rows, delta)
    return y


def _oracle(
    operands: Operands, x: Tensor, grad: Tensor | None, has_lora: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    stacks = [t.detach() for t in operands.lora_stacks(ADAPTERS)] if has_lora else []

    def compute(x: Tensor, grad: Tensor | None, stacks: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(grad is not None) for t in (x, *stacks)]
        with torch.set_grad_enabled(grad is not None):
            y = linear(leaves[0], operands.dense_once(x.dtype))
            if stacks:
                y = added_up(y, *leaves, operands)
            found = torch.autograd.grad(y, leaves, grad) if grad is not None else ()
        return (y.detach(), *found)

    return compute, (x, grad, stacks)


def _work(cell: Cell, contender: Contender) -> Work:
    """That of lora_linear, and the other adapters' weights read, their gradients written."""
    one = linear_work(cell, contender)
    if not contender.has_lora:
        return one
    others = min(ADAPTERS, cell.rows) - 1
    lora = others * item_size(cell, contender) * cell.rank * (cell.out_features + cell.in_features)
    reads = {FORWARD: 1, BACKWARD: 1, TRAINING: 2}[cell.mode]
    writes = 0 if cell.mode == FORWARD else 1
    return Work(one.flop, one.bytes_read + reads * lora, one.bytes_written + writes * lora)


_OURS, _BASE_ONLY, _REFERENCE, *_ = contenders_torch.LORA

BENCH = Bench(
    op="multi_lora_linear",
    contenders=(
        Contender(_OURS.name, _pylora, _OURS.packages, is_ours=True),
        _BASE_ONLY,
        Contender(
            _REFERENCE.name, lambda operands: on_reference(_pylora(operands)), _REFERENCE.packages
        ),
        Contender("pylora nf4_linear, adapters one by one", _one_by_one, _OURS.packages),
        *contenders_torch.DENSE,
        *contenders_peers.mixed_batch(ADAPTERS, adapter_ids),
        *contenders_peers.LINEAR[:2],
    ),
    work=_work,
    oracle=_oracle,
    rank=16,
    shapes=((4096, 4096), (14336, 4096)),
    in_quick=False,
)
