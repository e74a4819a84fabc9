"""nf4_linear: y = x @ W^T straight from the 4-bit weight; the backward gives dx = grad @ W."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks import contenders_peers, contenders_torch
from benchmarks.contender import Bench, linear_work
from benchmarks.operands import Operands
from pylora import reference


def oracle(
    operands: Operands, x: Tensor, grad: Tensor | None, has_lora: bool = False
) -> tuple[Any, tuple[Any, ...]]:
    """(y,) in a forward; (y, dx) where there is a grad."""
    w = operands.nf4()
    q, n, k = w.op_arguments(), w.out_features, w.in_features

    def compute(x: Tensor, grad: Tensor | None, *q: Any) -> tuple[Tensor, ...]:
        y = reference.nf4_linear(x, *q, n, None)
        return (y,) if grad is None else (y, reference.nf4_linear_backward(grad, *q, k))

    return compute, (x, grad, *q)


BENCH = Bench(
    op="nf4_linear",
    contenders=(*contenders_torch.LINEAR, *contenders_peers.LINEAR),
    work=linear_work,
    oracle=oracle,
)
